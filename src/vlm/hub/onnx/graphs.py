"""The three graphs of a model, with the names that the files of onnx-community have.

`vision_encoder` (encoder and connector), `embed_tokens`, and `decoder_model_merged`: the language model on embeddings,
with earlier keys and values as inputs and all of them as outputs. An empty cache makes the same graph read a prompt.

Shapes: I images, B rows, T new tokens, P earlier tokens, N tokens an image, D text width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedConfig

from vlm.models import VLMForConditionalGeneration

VISION_ENCODER, EMBED_TOKENS, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
LARGEST_PROTOBUF = 2**31 - 2**24
"""Bytes of weights above which they are written beside a graph: a protobuf holds 2 GB."""


class VisionEncoder(nn.Module):
    """Pixels to what takes the place of placeholders: `(I, 3 * encoders, height, width) -> (I, N, D)`."""

    def __init__(self, model: VLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode and map images, see the class."""
        return self.model.get_image_features(pixel_values)


class Decoder(nn.Module):
    """The language model on embeddings, with a cache that is passed in and out."""

    def __init__(self, model: VLMForConditionalGeneration):
        super().__init__()
        self.language_model = model.language_model
        self.text_config: PreTrainedConfig = model.config.text_config

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits `(B, T, vocabulary)`, then keys and values of each layer.

        Args:
            inputs_embeds: `(B, T, D)`.
            attention_mask: `(B, P + T)`, 0 at padding.
            position_ids: `(B, T)`.
            past: key and value of each layer in turn, `(B, heads, P, head_dim)`.
        """
        cache: Any = DynamicCache(zip(past[::2], past[1::2], strict=True))
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._make_masks(attention_mask, inputs_embeds),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (outputs.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    def _make_masks(self, attention_mask: Tensor, embeddings: Tensor) -> Tensor | dict[str, Tensor]:
        """Return what is added to attention scores, `(B, 1, T, P + T)`; by kind of layer where there are several."""
        total, new = attention_mask.shape[1], embeddings.shape[1]
        keys = torch.arange(total)[None, :]
        queries = (torch.arange(new) + (total - new))[:, None]
        seen = (keys <= queries)[None, None] & attention_mask[:, None, None, :].bool()
        window = getattr(self.text_config, "sliding_window", None)
        near = seen if window is None else seen & (keys > queries - window)[None, None]
        lowest = torch.finfo(embeddings.dtype).min
        masks = {
            kind: torch.where(mask, 0.0, lowest).to(embeddings.dtype)
            for kind, mask in (("full_attention", seen), ("sliding_attention", near))
        }
        if getattr(self.text_config, "layer_types", None) is not None:
            return masks
        return masks["sliding_attention"]


def write_graphs(model: VLMForConditionalGeneration, folder: Path, pixel_shape: tuple[int, ...]) -> None:
    """Write the graphs of a model into a folder.

    Args:
        model: the model, in evaluation mode, with `attn_implementation="eager"`, in float32.
        folder: where to.
        pixel_shape: `(3 * encoders, height, width)`.

    Raises:
        ValueError: PyTorch cannot turn a part into a graph; tells which and why.
    """
    text: PreTrainedConfig = model.config.text_config
    images, batch, new, past = Dim("images"), Dim("batch"), Dim("sequence"), Dim("past_sequence")
    _write(
        VisionEncoder(model),
        (torch.rand(2, *pixel_shape),),
        folder / VISION_ENCODER,
        ["pixel_values"],
        ["image_features"],
        ({0: images},),
    )
    ids = torch.zeros(2, 3, dtype=torch.long)
    embeddings = model.get_input_embeddings()
    _write(embeddings, (ids,), folder / EMBED_TOKENS, ["input_ids"], ["inputs_embeds"], ({0: batch, 1: new},))
    with torch.no_grad():
        embedded = embeddings(ids)
    caches = [torch.rand(2, *shape) for shape in cache_shapes(text, 5) for _ in ("key", "value")]
    mask, positions = torch.ones(2, 8, dtype=torch.long), torch.arange(5, 8).repeat(2, 1)
    names = [f"{number}.{kind}" for number in range(text.num_hidden_layers) for kind in ("key", "value")]
    _write(
        Decoder(model),
        (embedded, mask, positions, *caches),
        folder / DECODER,
        ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        (
            {0: batch, 1: new},
            {0: batch, 1: Dim("total_sequence")},
            {0: batch, 1: new},
            tuple({0: batch, 2: past} for _ in caches),
        ),
    )


def cache_shapes(text: PreTrainedConfig, length: int) -> list[tuple[int, int, int]]:
    """Return heads, tokens and width of the keys of each layer, for a number of tokens."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return [(heads, length, width)] * text.num_hidden_layers


def _write(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    file: Path,
    input_names: list[str],
    output_names: list[str],
    dynamic_shapes: tuple[object, ...],
) -> None:
    """Write one graph."""
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module.eval(),
                inputs,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(file, external_data=num_bytes > LARGEST_PROTOBUF)
    except Exception as error:  # whatever an operator without a translation raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{file.stem} has no ONNX graph: {type(error).__name__}: {reason[:200]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's reports of progress from the terminal."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
