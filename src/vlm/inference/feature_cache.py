"""Images that were shown lately: of one that is shown again, the visual encoder's features are at hand.

May import the models. Of composed models alone: those of families take no features in place of pixels.
"""

from collections import OrderedDict
from hashlib import blake2b
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vlm.models import VLMForConditionalGeneration, VLMForPrediction

MAX_BYTES = 2**28
"""So much is remembered: of CLIP-L at 336 pixels in half precision, about 230 images."""

Key = tuple[bytes, str, str]


class ImageFeatureCache:
    """The features of the images that were shown last, by the content of their pixels.

    For a model whose weights do not change meanwhile: one in training mode has none, and what was known of it before
    is forgotten. Several threads may ask at once.

    Args:
        max_bytes: how much is kept at most, on the model's device; what was not shown for longest goes first.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes = max_bytes
        self._bytes = 0
        self._features: OrderedDict[Key, Tensor] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._features)

    @torch.no_grad()
    def replace_pixels(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with `image_features` in place of `pixel_values`, each image once, and `image_index` beside them.

        As they are where they have no images, or where the model is not composed, or in training mode.

        Args:
            model: that reads them, composed or with a composed body.
            inputs: of one batch, on its device; pixels `(I, 3 * encoders, height, width)`, normalised.
        """
        body = model.body if isinstance(model, VLMForPrediction) else model
        if not isinstance(body, VLMForConditionalGeneration) or "pixel_values" not in inputs:
            return inputs
        with self._lock:
            if body.training:
                self._features.clear()
                self._bytes = 0
                return inputs
            return self._replace_pixels(body, inputs)

    def _replace_pixels(self, body: VLMForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = inputs["pixel_values"]
        keys = [_make_key(one, body.dtype) for one in pixels]
        positions = {key: place for place, key in enumerate(keys)}  # each image once
        found = {key: self._features[key] for key in positions if key in self._features}
        if new := [key for key in positions if key not in found]:
            found |= zip(new, body.encode_images(pixels[[positions[key] for key in new]]), strict=True)
        order = {key: row for row, key in enumerate(positions)}
        self._store({key: found[key] for key in order})
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        index = torch.tensor([order[key] for key in keys], device=pixels.device)
        return {**others, "image_features": torch.stack([found[key] for key in order]), "image_index": index}

    def _store(self, shown: dict[Key, Tensor]) -> None:
        for key, features in shown.items():
            if key in self._features:
                self._features.move_to_end(key)
            else:
                self._features[key] = features.clone()  # a row of a batch would keep the whole batch alive
                self._bytes += features.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._features.popitem(last=False)[1].nbytes


def _make_key(pixels: Tensor, dtype: torch.dtype) -> Key:
    """A name for an image's pixels, and for where and in what its features are computed."""
    content = pixels.detach().contiguous().cpu().view(torch.uint8).numpy()
    return blake2b(content.data, digest_size=16).digest(), str(pixels.device), str(dtype)
