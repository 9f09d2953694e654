"""Features of recent images, so that an image that is shown again is not encoded again.

For composed models only: models of families take no features in place of pixels.
"""

from collections import OrderedDict
from hashlib import blake2b
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.assembly.model_kinds import get_body, is_composed_model
from vlm.models import VLMForConditionalGeneration

MAX_BYTES = 2**28
"""Default size of the cache: about 230 images of CLIP-L at 336 pixels in half precision."""

Key = tuple[bytes, str, str]


class ImageFeatureCache:
    """Features of the most recent images, by the content of their pixels.

    The model's weights must not change: a model in training mode uses no cache and clears it. Thread-safe.

    Args:
        max_bytes: the largest size, on the model's device; the least recently used features are dropped first.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes = max_bytes
        self._bytes = 0
        self._features: OrderedDict[Key, Tensor] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Return the number of images whose features are kept."""
        return len(self._features)

    @torch.no_grad()
    def replace_pixels(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs with `image_features` and `image_index` in place of `pixel_values`, each image once.

        Inputs are returned unchanged where they have no images, the model is not composed, or it is training, or
        reads images at native resolution.

        Args:
            model: the model that reads them.
            inputs: a batch on the model's device; pixels `(I, 3 * encoders, height, width)`, normalised.
        """
        body = get_body(model)
        if not is_composed_model(body) or "pixel_values" not in inputs or body.native is not None:
            return inputs
        with self._lock:
            if body.training:
                self._features.clear()
                self._bytes = 0
                return inputs
            return self._replace_pixels(body, inputs)

    def _replace_pixels(self, body: VLMForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = inputs["pixel_values"]
        keys = [_make_key(image, body.dtype) for image in pixels]
        positions = {key: index for index, key in enumerate(keys)}  # each image once
        features = {key: self._features[key] for key in positions if key in self._features}
        if new := [key for key in positions if key not in features]:
            features |= zip(new, body.encode_images(pixels[[positions[key] for key in new]]), strict=True)
        order = {key: row for row, key in enumerate(positions)}
        self._store({key: features[key] for key in order})
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        index = torch.tensor([order[key] for key in keys], device=pixels.device)
        return {**others, "image_features": torch.stack([features[key] for key in order]), "image_index": index}

    def _store(self, shown: dict[Key, Tensor]) -> None:
        for key, features in shown.items():
            if key not in self._features:
                self._features[key] = features.clone()  # a row of a batch would keep the whole batch alive
                self._bytes += features.nbytes
            self._features.move_to_end(key)
        while self._bytes > self.max_bytes:
            self._bytes -= self._features.popitem(last=False)[1].nbytes


def _make_key(pixels: Tensor, dtype: torch.dtype) -> Key:
    """Return a key from an image's pixels, the device and the precision of its features."""
    content = pixels.detach().contiguous().cpu().view(torch.uint8).numpy()
    return blake2b(content.data, digest_size=16).digest(), str(pixels.device), str(dtype)
