"""`dataset.max_image_tokens`: a maximum number of tokens per image, enforced by options of the image processor.

The options are saved with the processor, so that evaluation, inference and other programs see the same images as
training. The tokens of an image are everything that the processor writes for it, including marks of rows, tiles, start
and end. Marks that a chat template writes around images are not included.
"""

import logging
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vlm.assembly.opening import quiet_loading
from vlm.assembly.processor_options import PixelProcessor, make_processor, mirror_options
from vlm.assembly.token_budget import BudgetError, BudgetSearch, Size, changed_options
from vlm.data.processor import Processor
from vlm.families.processing import FamilyProcessor
from vlm.models.anyres import AnyRes
from vlm.models.configuration_vlm import VLMConfig
from vlm.models.pixels import Settings
from vlm.models.processing_vlm import VLMProcessor

log = logging.getLogger(__name__)

KEY = "dataset.max_image_tokens"
REAL_SIDE = 1_500
"""The longest side of blank images for processors that need real pixels to count tokens."""


def limit_image_tokens(processor: Processor, config: PreTrainedConfig, budget: int, name: str | None = None) -> None:
    """Limit every image to `budget` tokens: large images become smaller, or get fewer tiles.

    Args:
        processor: its options change, and are saved with it.
        config: the model's; options that it has too change with those of the processor.
        budget: tokens; see the top of this file.
        name: the checkpoint, where it is an adapter: the model is its base's, and keeps its configuration.

    Raises:
        ValueError: a smaller number is not possible; with the smallest one that is. Or the configuration of an
            adapter's base would have to change.
    """
    if isinstance(processor, FamilyProcessor):
        with quiet_loading():
            changes = _limit_family(processor, config, budget)
            if processor.videos is not None:
                _limit_videos(processor, budget)
    else:
        changes = _limit_composed(cast(VLMProcessor, processor), cast(VLMConfig, config), budget)
    if changes and name is not None:
        raise ValueError(
            f"{KEY}={budget}: it changes {', '.join(changes)}, but {name} is an adapter, which keeps the image "
            "settings of its base; merge it first (vlm merge-lora)"
        )


def _limit_family(processor: FamilyProcessor, config: PreTrainedConfig, budget: int) -> list[str]:
    """Limit a family's images; return the options of the model's configuration that changed."""
    before = processor.native.image_processor
    settings: Settings = before.to_dict()
    meter = ImageMeter(processor)
    try:
        found = BudgetSearch(settings, meter, budget, meter.largest_side).run()
    except BudgetError as error:
        raise _refusal(budget, error.least, type(before).__name__) from None
    changes: list[str] = []
    if found is not settings:
        processor.replace_processors(image_processor=make_processor(before, found))
        changes = mirror_options(config, settings, found)
        _report(budget, settings, found)
    processor.image_token_budget = budget
    return changes


def _limit_videos(processor: FamilyProcessor, budget: int) -> None:
    """Let no frame of a video take more than the budget, as far as options of the video processor can do that."""
    before = processor.native.video_processor
    settings: Settings = before.to_dict()
    meter = VideoMeter(processor)
    try:
        found = BudgetSearch(settings, meter, budget, meter.largest_side).run()
    except BudgetError as error:
        log.info("%s=%s: a frame of a video takes %s tokens, which no option changes", KEY, budget, error.least)
        return
    if found is not settings:
        processor.replace_processors(video_processor=make_processor(before, found))
        _report(budget, settings, found, "of videos: ")


def _limit_composed(processor: VLMProcessor, config: VLMConfig, budget: int) -> list[str]:
    """Leave out the grids of tiles that take too many tokens; without any left, images become one square.

    Returns the options of the model's configuration that changed.
    """
    if config.native is not None:
        raise ValueError(
            f"{KEY}={budget}: model.native.max_tokens bounds images at native resolution; set that instead"
        )
    marks = len(processor.image_token_ids(0))
    square, tiling = processor.tokens_per_image + marks, processor.tiling
    if budget < square:
        raise _refusal(budget, square, "the model")
    grids = [] if tiling is None else [list(grid) for grid in tiling.grids]
    kept = [grid for grid in grids if tiling is not None and most_tile_tokens(tiling, grid) + marks <= budget]
    if tiling is None or kept == grids:
        return []
    config.anyres = processor.anyres = {**vars(tiling), "grids": kept} if kept else None
    recipe = {**config.recipe["anyres"], "grids": kept}
    config.recipe["anyres"] = recipe if kept else {"grids": [], "max_tiles": None, "tile_several": False}
    log.info("%s=%s: %s of %s grids of tiles are used", KEY, budget, len(kept), len(grids))
    return ["model.anyres.grids"]


def most_tile_tokens(tiling: AnyRes, grid: Iterable[int]) -> int:
    """Return the most tokens that any image takes in a grid, those of the whole image included."""
    rows, columns = (number * tiling.tokens_side for number in grid)
    shapes = [*((rows, number) for number in range(1, columns + 1)), *((number, columns) for number in range(1, rows))]
    limited = map(tiling.limit_size, shapes)
    return tiling.tokens_side**2 + max(height * (width + 1) for height, width in limited)


def _refusal(budget: int, least: int, subject: str) -> ValueError:
    needed = f"give {least} or more, or null"
    return ValueError(f"{KEY}={budget}: {subject} needs at least {least} tokens per image; {needed}")


def _report(budget: int, before: Settings, after: Settings, kind: str = "") -> None:
    def shown(value: object) -> object:
        """Return a value as the log names it: grids by their number."""
        return f"{len(value)} grids" if isinstance(value, list) else value

    changes = changed_options(before, after).items()
    listing = ", ".join(f"{name} {shown(old)} -> {shown(new)}" for name, (old, new) in changes)
    log.info("%s=%s: %s%s", KEY, budget, kind, listing)


class ImageMeter:
    """Counts the tokens of blank images under any settings of a family's image processor."""

    attribute = "image_processor"

    def __init__(self, processor: FamilyProcessor):
        self.processor = processor
        self._made: tuple[Settings | None, object] = (None, None)
        self._counts: dict[str, int] = {}
        self.device = "cpu"
        if self(self._template.to_dict(), (64, 96), device="meta") is not None:
            self.device = "meta"

    @property
    def largest_side(self) -> int:
        """The longest side of images that can be counted without much memory and time."""
        return 10_000 if self.device == "meta" else REAL_SIDE

    @property
    def _template(self) -> PixelProcessor:
        return getattr(self.processor.native, self.attribute)

    def __call__(self, settings: Settings, size: Size, device: str | None = None) -> int | None:
        """Return the tokens of a blank image; None if the processor does not accept the settings or the size."""
        native, before = self.processor.native, self._template
        try:
            if self._made[0] is not settings:
                self._made = settings, make_processor(before, settings)
            setattr(native, self.attribute, self._made[1])
            blank = torch.zeros(3, *size, dtype=torch.uint8, device=device or self.device)
            expansion = self._expand(blank)
        except Exception:  # a library's own errors of any kind: about an odd size, or about settings
            return None
        finally:
            setattr(native, self.attribute, before)
        if expansion not in self._counts:
            self._counts[expansion] = self._count(expansion)
        return self._counts[expansion]

    def _expand(self, blank: Tensor) -> str:
        return self.processor.expand_blank(blank)

    def _count(self, expansion: str) -> int:
        return self.processor.count_tokens(expansion)


class VideoMeter(ImageMeter):
    """Counts the tokens of one frame of the shortest video, in which a frame takes most; rounded up.

    Text, such as the times that some processors write between frames, is not counted.
    """

    attribute = "video_processor"

    def __init__(self, processor: FamilyProcessor):
        assert processor.videos is not None
        self.videos = processor.videos
        self.num_frames = self.videos.minimal_clip.total_frames
        super().__init__(processor)

    def _expand(self, blank: Tensor) -> str:
        return self.videos.expand_blank(blank.expand(self.num_frames, *blank.shape))

    def _count(self, expansion: str) -> int:
        return -(-len(self.processor.special_tokens.findall(expansion)) // self.num_frames)
