"""Maps pixels of a stored image to what the model sees, and back: resizing, padding to a square, cropping.

Tiles do not change where something is in an image: with tiles, coordinates are those of the whole image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlm.data.processor import Processor
from vlm.models.pixels import ImageProcessor, is_plain

Size = tuple[int, int]
"""Height and width in pixels."""
Values = tuple[float, ...]
"""Coordinates `x, y, x, y …`."""

PADDING_MODULES = (
    "image_processing_llava",
    "image_processing_pil_llava",
    "image_processing_deepseek_vl",
    "image_processing_pil_deepseek_vl",
)
"""Modules of transformers whose image processors pad an image to a square if `do_pad` is set."""
QWEN_MODULES = ("image_processing_qwen2_vl", "image_processing_pil_qwen2_vl")
"""Modules of the image processors that resize by `smart_resize`."""


@dataclass(frozen=True)
class ImageView:
    """What a model sees of an image: `seen = stored * scale + offset`, along each axis.

    Attributes:
        width: of the image turned upright, in pixels.
        height: likewise.
        seen_width: of what the model sees, in pixels of the resized image.
        seen_height: likewise.
        scale: along x and y.
        offset: along x and y, in pixels of the resized image; negative where the image is cropped.
        is_sized: whether the model sees exactly this many pixels; otherwise only proportions are known.
    """

    width: float
    height: float
    seen_width: float
    seen_height: float
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    is_sized: bool = True

    @property
    def seen_size(self) -> tuple[float, float]:
        """The width and height of what the model sees."""
        return self.seen_width, self.seen_height

    def to_shares(self, pixels: Values) -> Values:
        """Return pixels of the upright image as shares of the sides of what is seen; they may be outside 0 to 1."""
        sides = self.seen_size
        return tuple(
            (value * self.scale[index % 2] + self.offset[index % 2]) / sides[index % 2]
            for index, value in enumerate(pixels)
        )

    def to_pixels(self, shares: Values) -> Values:
        """Return shares of the sides of what is seen as pixels of the upright image, within its bounds."""
        sides, bounds = self.seen_size, (self.width, self.height)
        pixels = (
            (share * sides[index % 2] - self.offset[index % 2]) / self.scale[index % 2]
            for index, share in enumerate(shares)
        )
        return tuple(min(max(value, 0.0), bounds[index % 2]) for index, value in enumerate(pixels))

    def clip(self, pixels: Values) -> Values | None:
        """Return what the model sees of a box or point in pixels of the upright image; None: nothing."""
        axes = zip(self.offset, self.scale, self.seen_size, (self.width, self.height), strict=True)
        ends = [(max(-off / scale, 0.0), min((seen - off) / scale, side)) for off, scale, seen, side in axes]
        inside = tuple(_clip(value, *ends[index % 2]) for index, value in enumerate(pixels))
        starts, stops = pixels[:2], pixels[-2:]
        is_lost = any(
            inside[axis] == inside[axis - 2] and (starts[axis] != stops[axis] or inside[axis] != starts[axis])
            for axis in range(2)
        )
        return None if is_lost else inside

    def whole_image(self) -> "ImageView":
        """Return the view of a model that sees the image as it is stored, turned upright."""
        return ImageView(self.width, self.height, self.width, self.height)


def _clip(value: float, least: float, most: float) -> float:
    """Return the nearest number within rounded bounds; a number that is only just outside is not changed."""
    nearest = min(max(value, least), most)
    return value if abs(value - nearest) < 1e-6 else nearest


def make_views(processor: Processor, sizes: Sequence[Size]) -> list[ImageView]:
    """Return what a model sees of each image of one sample.

    Args:
        processor: the model's.
        sizes: upright height and width of each image, frames of videos left out.
    """
    image_mode = getattr(processor, "image_mode", None)  # families pad in their image processors
    if image_mode is not None:
        return _views_of_composed(processor, image_mode, sizes)
    return [_view_of_family(processor.image_processor, size) for size in sizes]


def _views_of_composed(processor: Processor, image_mode: str, sizes: Sequence[Size]) -> list[ImageView]:
    """Return the views of a composed model; if it has several encoders, the first one counts."""
    tiling, image_processor = processor.tiling, processor.image_processor
    if tiling is None:
        return [_plain_view(image_processor, size, pads=image_mode == "pad") for size in sizes]
    side = tiling.tile_size
    views = []
    for size, number in zip(sizes, tiling.num_views(sizes), strict=True):
        # One of several images is padded to a square and not tiled; of a tiled one, the whole is squashed.
        view = _padded(_whole(size)) if number == 1 else _whole(size)
        views.append(_resized(view, side, side))
    return views


def _view_of_family(image_processor: ImageProcessor, size: Size) -> ImageView:
    """Return the view of a family's model. Without cropping and padding, its tiles and sizes keep proportions."""
    module = type(image_processor).__module__.rpartition(".")[2]
    if module in QWEN_MODULES:
        return _resized(_whole(size), *_qwen_size(image_processor, size))
    if module in PADDING_MODULES:
        return _plain_view(image_processor, size, pads=bool(getattr(image_processor, "do_pad", False)))
    if is_plain(image_processor):
        return _plain_view(image_processor, size, pads=False)
    height, width = size
    return ImageView(width, height, width, height, is_sized=False)


def _qwen_size(image_processor: ImageProcessor, size: Size) -> Size:
    """Return the height and width to which Qwen's image processor resizes an image."""
    settings = vars(image_processor)
    factor = int(settings["patch_size"]) * int(settings["merge_size"])
    least, most = _side(image_processor.size, "shortest_edge"), _side(image_processor.size, "longest_edge")
    assert least is not None
    assert most is not None
    height, width = smart_resize(*size, factor=factor, min_pixels=least, max_pixels=most)
    return height, width


def _plain_view(image_processor: ImageProcessor, size: Size, *, pads: bool) -> ImageView:
    """Return the view of an image processor that may pad to a square, resizes, and may crop the centre."""
    view = _padded(_whole(size)) if pads else _whole(size)
    if image_processor.do_resize:
        view = _resized_as(view, image_processor.size)
    if image_processor.do_center_crop:
        height, width = _side(image_processor.crop_size, "height"), _side(image_processor.crop_size, "width")
        if height is not None and width is not None:
            view = _cropped(view, height, width)
    return view


def _side(sides: Mapping[str, int] | object, name: str) -> int | None:
    """Return one of the numbers of a processor's size, a mapping or a `SizeDict`; None if it has none."""
    value = sides.get(name) if isinstance(sides, Mapping) else getattr(sides, name, None)
    return value if isinstance(value, int) else None


def _whole(size: Size) -> ImageView:
    height, width = size
    return ImageView(width, height, width, height)


def _padded(view: ImageView) -> ImageView:
    """Return the view padded to a square of its longer side, as in `pixels.pad_to_square`."""
    side = max(view.seen_size)
    offset = (side - view.seen_width) // 2, (side - view.seen_height) // 2
    return ImageView(view.width, view.height, side, side, view.scale, offset)


def _resized_as(view: ImageView, sides: Mapping[str, int] | object) -> ImageView:
    """Return the view resized to a height and width, or so that its shorter side has a length."""
    height, width, shortest = (_side(sides, name) for name in ("height", "width", "shortest_edge"))
    if height is not None and width is not None:
        return _resized(view, height, width)
    if shortest is None or _side(sides, "longest_edge") is not None:
        return ImageView(view.width, view.height, *view.seen_size, view.scale, view.offset, is_sized=False)
    short, long = sorted(view.seen_size)
    longer = int(shortest * long / short)
    return _resized(view, *((shortest, longer) if view.seen_height <= view.seen_width else (longer, shortest)))


def _resized(view: ImageView, height: int, width: int) -> ImageView:
    """Return the view resized to a height and width."""
    factors = width / view.seen_width, height / view.seen_height
    scale = view.scale[0] * factors[0], view.scale[1] * factors[1]
    offset = view.offset[0] * factors[0], view.offset[1] * factors[1]
    return ImageView(view.width, view.height, width, height, scale, offset)


def _cropped(view: ImageView, height: int, width: int) -> ImageView:
    """Return the centre of the view; a smaller view is padded."""
    offset = view.offset[0] - (view.seen_width - width) / 2, view.offset[1] - (view.seen_height - height) / 2
    return ImageView(view.width, view.height, width, height, view.scale, offset)
