"""Answering with the graphs of an export, by onnxruntime alone: what the read-back and other programs call."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vlm.hub.onnx.graphs import DECODER, EMBED_TOKENS, VISION_ENCODER

Array = np.ndarray[Any, Any]


class OnnxModel:
    """The three graphs of an export.

    Args:
        folder: the export.
        image_token_id: the placeholder of images.
    """

    def __init__(self, folder: Path, image_token_id: int):
        sessions: Any = [
            onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
            for name in (VISION_ENCODER, EMBED_TOKENS, DECODER)
        ]
        self.vision_encoder, self.embed_tokens, self.decoder = sessions
        self.image_token_id = image_token_id
        self.past = [entry for entry in self.decoder.get_inputs() if entry.name.startswith("past_key_values.")]

    def image_features(self, pixel_values: Array) -> Array:
        """Return `(I, N, D)` of pixels `(I, 3 * encoders, height, width)`."""
        return self.vision_encoder.run(None, {"pixel_values": pixel_values})[0]

    def embed(self, input_ids: Array, pixel_values: Array | None = None) -> Array:
        """Return the embeddings of a prompt, `(B, T, D)`, with features of images at the placeholders."""
        embeddings = self.embed_tokens.run(None, {"input_ids": input_ids})[0]
        if pixel_values is not None:
            features = self.image_features(pixel_values)
            embeddings[input_ids == self.image_token_id] = features.reshape(-1, features.shape[-1])
        return embeddings

    def decode(self, embeddings: Array, attention_mask: Array, cache: list[Array] | None = None) -> tuple[Array, Any]:
        """Return logits of new tokens, `(B, T, vocabulary)`, and the cache with them.

        Args:
            embeddings: `(B, T, D)` of the new tokens.
            attention_mask: `(B, P + T)`, 0 at padding.
            cache: what the last call returned; None before the first.
        """
        rows, new = embeddings.shape[:2]
        if cache is None:
            cache = [np.zeros((rows, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in self.past]
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -new:]
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention_mask, "position_ids": positions}
        names = [entry.name for entry in self.past]
        logits, *present = self.decoder.run(None, inputs | dict(zip(names, cache, strict=True)))
        return logits, present

    def generate(
        self,
        input_ids: Array,
        attention_mask: Array,
        pixel_values: Array | None,
        max_new_tokens: int,
        ends: tuple[int, ...] = (),
    ) -> Array:
        """Return the greedy tokens, `(B, new)`; stops when every row has written one of `ends`."""
        logits, cache = self.decode(self.embed(input_ids, pixel_values), attention_mask)
        tokens = [logits[:, -1].argmax(axis=-1)[:, None]]
        while len(tokens) < max_new_tokens and not np.isin(np.concatenate(tokens, axis=1), ends).any(axis=1).all():
            attention_mask = np.concatenate([attention_mask, np.ones_like(tokens[-1])], axis=1)
            logits, cache = self.decode(self.embed(tokens[-1]), attention_mask, cache)
            tokens.append(logits[:, -1].argmax(axis=-1)[:, None])
        return np.concatenate(tokens, axis=1)
