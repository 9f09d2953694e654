"""What the model sees of an image or video: its size after the processor, or the number of its views; its tokens."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from vlm.data.processor import Processor
from vlm.data.sample import Clip, MediaSize
from vlm.data.vision.images import Medium

GRIDS = ("image_grid_thw", "video_grid_thw", "image_grid_hws")
"""Inputs with a row for each image or video: its patches in time, height and width, or in height and width."""
PIXELS = ("pixel_values", "pixel_values_videos", "input_image_embeds", "image_pixel_values")
"""Inputs that hold pixels: `(…, 3, height, width)`, or `(patches, values)`."""


def describe_views(processor: Processor, media: Sequence[Medium], sizes: Sequence[MediaSize]) -> list[str]:
    """Describe what the model sees of each image and video of a sample: `308×224, 88 tokens`.

    Args:
        processor: the run's.
        media: decoded images and videos, in order.
        sizes: their sizes, as `media_sizes_from_opened` returns them.

    Raises:
        ValueError: the processor refuses one of them.
    """
    if not media:
        return []
    counts = count_media_tokens(processor, len(media), sizes)
    if processor.tiling is not None:  # whether an image is tiled depends on the others
        views = processor.image_inputs(media, sizes)
        numbers = [max(int(number), 1) for number in views["image_views"]]
        shown = [_describe_tiles(number, views["pixel_values"]) for number in numbers]
    else:
        singles = range(len(media))
        shown = [_describe(processor, processor.image_inputs([media[i]], sizes[i : i + 1])) for i in singles]
    return [f"{view}, {number} tokens" for view, number in zip(shown, counts, strict=True)]


def count_media_tokens(processor: Processor, number: int, sizes: Sequence[MediaSize]) -> list[int]:
    """Return the number of tokens that each image and video takes: all that the processor writes in its place."""
    kinds = [isinstance(size, Clip) for size in sizes] or [False] * number
    tokens = [str(processor.video_token) if is_video else processor.image_token for is_video in kinds]
    _, spans = processor.tokenize("".join(tokens), (), sizes)
    counts, start = [], 0
    for token in tokens:
        end = start + len(token)
        counts.append(sum(first < end and last > start for first, last in spans))
        start = end
    return counts


def _describe(processor: Processor, inputs: Mapping[str, Tensor]) -> str:
    """Describe the inputs of a single image or video."""
    for name in GRIDS:
        if name in inputs:
            *steps, rows, columns = inputs[name][0].tolist()
            patch = getattr(processor.image_processor, "patch_size", 1)
            side = patch["height"] if isinstance(patch, Mapping) else patch
            times = f"{steps[0]} × " if steps and steps[0] > 1 else ""
            return f"{times}{columns * side}×{rows * side}"
    pixels = next((inputs[name] for name in PIXELS if name in inputs), None)
    if pixels is None:
        return "no pixels"
    if pixels.ndim < 4:
        return f"{pixels.shape[-2]} patches"
    return _describe_tiles(pixels.shape[:-3].numel(), pixels)


def _describe_tiles(number: int, pixels: Tensor) -> str:
    """Describe views, whose size the last two dimensions are."""
    size = f"{pixels.shape[-1]}×{pixels.shape[-2]}"
    return size if number == 1 else f"{number} views of {size}"
