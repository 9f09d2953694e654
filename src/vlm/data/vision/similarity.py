"""Images that look the same: a sketch of each image, and an index that finds the nearest one.

A perceptual hash of 64 bits (pHash: the signs of the lowest frequencies of a cosine transform) finds candidates, and
the colours of 16 x 16 points confirm them. The hash alone takes one flat drawing for another, and does not see colour:
of the 296,065 pairs of different images among 770 stamps it called 1,367 equal at 12 bits. docs/data-quality.md has
what was measured of both.
"""

import base64
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from vlm.data.vision.images import stored_size

HASH_SIDE, HASHED_SIDE, COLOUR_SIDE, REDUCED_SIDE = 8, 32, 16, 64
"""Frequencies of the hash in each direction; pixels that it is computed of; points of colour; pixels of the copy that
both are taken from."""
MAX_BITS = 12
"""The most bits, of 64, in which the hashes of near copies differ."""
MAX_DIFFERENCE = 0.1
"""The largest difference of the colours of near copies: its root mean square over the standard deviation of an image's
colours, so that the difference counts relative to the contrast of the image."""
MIN_CONTRAST = 4.0
"""The least contrast that is divided by, in levels of 256: nearly flat images differ by noise."""
NUM_COLOURS = 3 * COLOUR_SIDE**2
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
INITIAL_ROWS = 1024


@dataclass(frozen=True)
class ImageSketch:
    """What an image looks like: `bits` of the perceptual hash, and `colours`, bytes of 16 x 16 points in RGB."""

    bits: int
    colours: bytes

    def to_text(self) -> str:
        """Return the sketch as text, for files of JSON."""
        return base64.b64encode(self.bits.to_bytes(8, "big") + self.colours).decode()

    @classmethod
    def from_text(cls, text: str) -> "ImageSketch":
        """Return the sketch that `to_text` wrote."""
        content = base64.b64decode(text)
        return cls(int.from_bytes(content[:8], "big"), content[8:])


def sketch_image(image: Image.Image) -> ImageSketch:
    """Return the sketch of an image, turned upright and on white where it is transparent."""
    from scipy.fft import dctn  # slow to import

    if stored_size(image).orientation != 1:
        image = ImageOps.exif_transpose(image)
    small = _reduce(image)
    grey = small.convert("L").resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.LANCZOS)
    frequencies = np.asarray(dctn(np.asarray(grey, dtype=np.float32), norm="ortho"))[:HASH_SIDE, :HASH_SIDE].ravel()
    signs = frequencies > np.median(frequencies[1:])
    colours = small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.LANCZOS).tobytes()
    return ImageSketch(int.from_bytes(np.packbits(signs).tobytes(), "big"), colours)


def _reduce(image: Image.Image) -> Image.Image:
    """Return a copy of `REDUCED_SIDE` pixels a side in RGB."""
    if image.mode not in EIGHT_BIT_MODES:
        from vlm.models.pixels import as_rgb  # imports transformers, which most images do not need

        image = as_rgb(image)
    has_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    plain = image.convert("RGBA" if has_alpha else "RGB")
    small = plain.resize((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if not has_alpha:
        return small
    ground = Image.new("RGBA", small.size, "white")
    ground.alpha_composite(small)
    return ground.convert("RGB")


class SketchIndex:
    """Sketches by the order in which they were added; about 800 bytes each, compared with all of them at once."""

    def __init__(self):
        self._number = 0
        self._bits = np.empty(INITIAL_ROWS, np.uint64)
        self._colours = np.empty((INITIAL_ROWS, NUM_COLOURS), np.uint8)

    def __len__(self) -> int:
        """Return the number of sketches."""
        return self._number

    def add(self, sketch: ImageSketch) -> int:
        """Add a sketch and return its index."""
        if self._number == len(self._bits):
            self._bits = np.concatenate([self._bits, np.empty_like(self._bits)])
            self._colours = np.concatenate([self._colours, np.empty_like(self._colours)])
        self._bits[self._number] = sketch.bits
        self._colours[self._number] = np.frombuffer(sketch.colours, np.uint8)
        self._number += 1
        return self._number - 1

    def find(self, sketch: ImageSketch) -> int | None:
        """Return the index of the sketch that is nearest to another one; None if none is a near copy of it."""
        differing = np.bitwise_count(self._bits[: self._number] ^ np.uint64(sketch.bits))
        candidates = np.flatnonzero(differing <= MAX_BITS)
        if not len(candidates):
            return None
        colours = np.frombuffer(sketch.colours, np.uint8).astype(np.float32)
        others = self._colours[candidates].astype(np.float32)
        contrast = np.maximum(_contrast(others), _contrast(colours[None]))
        differences = np.sqrt(np.square(others - colours).mean(axis=1)) / np.maximum(contrast, MIN_CONTRAST)
        nearest = int(differences.argmin())
        return int(candidates[nearest]) if differences[nearest] <= MAX_DIFFERENCE else None


def _contrast(colours: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the colours of each image: `(images, colours)` -> `(images,)`."""
    channels = colours.reshape(len(colours), -1, 3)
    return (channels - channels.mean(axis=1, keepdims=True)).std(axis=(1, 2))
