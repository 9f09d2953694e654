"""`model.processor`: options of a family's image and video processor, checked against the installed classes.

They become settings of the processor itself, so they are saved with it, and a loaded checkpoint sees the same pixels.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Protocol, Self, TypeVar

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import PreTrainedConfig

from vlm.assembly.opening import quiet_loading, shorten
from vlm.data.processor import Processor
from vlm.families.processing import FamilyProcessor
from vlm.models.pixels import Settings

KEY = "model.processor"
VIDEO = "video"
"""The key below `model.processor` for options of the video processor."""

CALL_OPTIONS = {
    "data_format",
    "input_data_format",
    "device",
    "return_tensors",
    "disable_grouping",
    "default_to_square",
    "video_metadata",
    "return_metadata",
    "do_sample_frames",
}
"""Parameters of a processor's call that are not settings: the layout of its inputs, and what it returns."""
FRAME_OPTIONS = {"fps", "num_frames", "min_frames", "max_frames", "max_duration", "initial_shift"}
"""Options that choose frames of a video, which `dataset.max_frames` does here."""
SHAPE_OPTIONS = {
    "patch_size", "temporal_patch_size", "merge_size", "encoder_patch_size", "downsample_factor", "downsample_ratio",
    "downsample_mode", "pooling_kernel_size", "pooling_size", "patch_expand_factor", "tile_size", "overlap_margins",
    "image_seq_length", "do_resize", "do_pad", "do_center_crop", "crop_size", "pad_size",
}  # fmt: skip
"""Options that define a single view of the visual encoder, for which its weights were trained."""
SHAPE_OPTIONS_OF = {("Mllama", "max_image_tiles")}
"""Further such options of some classes, by the beginning of the class name: Llama 3.2 Vision numbers its aspect ratios
by this option, and has an embedding for each of them."""
SHAPE_SIZES = frozenset({"size.height", "size.width", "max_image_size.longest_edge"})
"""Entries of options that do, too; `size.shortest_edge` does if there is no `size.longest_edge`."""
SWITCHES = {
    "max_patches": "crop_to_patches",
    "min_patches": "crop_to_patches",
    "max_tiles": "do_image_splitting",
    "min_tiles": "do_image_splitting",
    "use_thumbnail": "do_image_splitting",
    "max_slice_nums": "slice_mode",
    "pan_and_scan_min_crop_size": "do_pan_and_scan",
    "pan_and_scan_max_num_crops": "do_pan_and_scan",
    "pan_and_scan_min_ratio_to_activate": "do_pan_and_scan",
    "image_mean": "do_normalize",
    "image_std": "do_normalize",
    "rescale_factor": "do_rescale",
}
"""Option -> the switch without which it has no effect, where a processor has that switch."""
BASE_MODULES = {
    "image_processing_utils",
    "image_processing_backends",
    "video_processing_utils",
    "image_processing_base",
    "builtins",
    "hub",
}
"""Modules of classes that pass on every option, whether it is used or not."""
TRIAL_SIZES = ((64, 64), (96, 320))
"""Heights and widths of the images on which a processor with new options is tried."""


class PixelProcessor(Protocol):
    """The part of transformers' image and video processors that their options are in."""

    valid_kwargs: type
    """A typed dictionary of the options."""

    def to_dict(self) -> Settings:
        """Return the settings."""
        ...

    @classmethod
    def from_dict(cls, settings: Settings, /) -> Self:
        """Make a processor with settings."""
        ...


P = TypeVar("P", bound=PixelProcessor)


def apply_processor_options(
    processor: FamilyProcessor, config: PreTrainedConfig, options: Mapping[str, object]
) -> list[str]:
    """Set options of a family's image and video processor.

    Args:
        processor: the family's processor; its saved settings change.
        config: the model's configuration; options that it also has are changed with those of the processor.
        options: the section `model.processor`: option -> value, null for unchanged; `video` has those of videos.

    Returns:
        The options of the model's configuration that changed.

    Raises:
        ValueError: the processor does not have an option, or it has no effect (with the nearest name and all allowed
            names); or the processor does not accept a value.
    """
    video_options = options.get(VIDEO) or {}
    if not isinstance(video_options, Mapping):
        raise ValueError(f"{KEY}.{VIDEO}={video_options}: it is a section; set one of its options")
    still = {name: value for name, value in options.items() if name != VIDEO and value is not None}
    moving = {str(name): value for name, value in video_options.items() if value is not None}
    native, changes = processor.native, []
    if still:
        changed = with_options(
            native.image_processor, still, _fixed_by_call(processor, "images_kwargs"), KEY, processor
        )
        _try_processor(processor, changed, still)
        changes = mirror_options(config, native.image_processor.to_dict(), changed.to_dict())
        processor.replace_processors(image_processor=changed)
    if moving:
        if processor.videos is None:
            raise ValueError(f"{KEY}.{VIDEO}: {_name(native)} has no videos: their frames are images")
        fixed, key = _fixed_by_call(processor, "videos_kwargs"), f"{KEY}.{VIDEO}"
        processor.replace_processors(
            video_processor=with_options(native.video_processor, moving, fixed, key, processor)
        )
    return changes


def check_no_processor_options(options: Mapping[str, object]) -> None:
    """Raise ValueError for options of a family's processor on a composed model; names the keys that it has."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{KEY}.{name}: it is for models of a family (model.hf_name). A composed model's images are squares of "
                "model.visual_encoder.image_size, padded by dataset.image_mode, in tiles by model.anyres.grids and "
                "max_tiles; dataset.max_image_tokens limits the tiles"
            )


def with_options(
    sub: P, options: Mapping[str, object], fixed: Mapping[str, object], key: str, processor: FamilyProcessor
) -> P:
    """Return an image or video processor with other options.

    Args:
        sub: the processor of images or videos.
        options: option -> value; the entries of a mapping replace those of the processor.
        fixed: options that the family's processor gives with every call, so that settings do not count.
        key: where the options were set, for messages.
        processor: the family's.

    Raises:
        ValueError: see `apply_processor_options`.
    """
    settings: Settings = sub.to_dict()
    wanted = dict(settings)
    for name, value in options.items():
        _check_name(sub, name, fixed, key, processor)
        wanted[name] = _check_value(sub, name, value, settings, key)
    for name in options:
        switch = SWITCHES.get(name)
        if switch is not None and fixed.get(switch, wanted.get(switch)) is False:
            raise ValueError(f"{key}.{name}: it has no effect while {switch} is false; set {key}.{switch}=true, too")
    return make_processor(sub, wanted)


def make_processor(sub: P, settings: Settings) -> P:
    """Return a processor of the class of another one, with these settings."""
    return type(sub).from_dict(dict(settings))


def list_options(sub: PixelProcessor, fixed: Mapping[str, object]) -> list[str]:
    """Return the options of an image or video processor that a run may set; those of a mapping as `size.longest_edge`.

    `fixed` is that of `with_options`.
    """
    settings = sub.to_dict()
    names: list[str] = []
    for name in sorted(_read_options(type(sub))):
        if name in CALL_OPTIONS | FRAME_OPTIONS or name in fixed or _is_shape_option(sub, name):
            continue
        value = settings.get(name)
        if isinstance(value, Mapping):
            names += [f"{name}.{entry}" for entry in value if not _is_shape(name, str(entry), value)]
        else:
            names.append(name)
    return names


def describe_options(processor: FamilyProcessor) -> dict[str, object]:
    """Return the options that a run may set below `model.processor`, with their values; without those left unset."""
    shown: dict[str, object] = {}
    kinds = {"": ("image_processor", "images_kwargs"), f"{VIDEO}.": ("video_processor", "videos_kwargs")}
    for prefix, (attribute, fixed) in kinds.items():
        if prefix and processor.videos is None:
            continue
        sub = getattr(processor.native, attribute)
        settings = sub.to_dict()
        for name in list_options(sub, _fixed_by_call(processor, fixed)):
            option, _, entry = name.partition(".")
            value = settings.get(option)
            value = value.get(entry) if entry and isinstance(value, Mapping) else value
            if value is not None:
                shown[prefix + name] = value
    return shown


PIXEL_STATISTICS = {"do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
"""Options that change colours, but neither sizes nor numbers of tokens."""


def describe_processor(processor: Processor) -> str:
    """Describe in one line how images are prepared: a family's processor options, or a composed model's squares."""
    if isinstance(processor, FamilyProcessor):
        options = describe_options(processor).items()
        shown = [f"{name}={value}" for name, value in options if name.rpartition(".")[2] not in PIXEL_STATISTICS]
        budget = processor.image_token_budget
        limit = [] if budget is None else [f"dataset.max_image_tokens={budget}"]
        return f"{_name(processor.native.image_processor)}: {', '.join(limit + shown) or 'no option'}"
    tokens = len(processor.image_token_ids())
    tiling = processor.tiling
    if tiling is None:
        return f"each image is read as one square: {tokens} tokens"
    grids = ", ".join(f"{rows}×{columns}" for rows, columns in tiling.grids)
    return f"each image is read as one square and as tiles: {tokens} tokens each, grids (rows×columns) {grids}"


def mirror_options(config: PreTrainedConfig, before: Settings, after: Settings) -> list[str]:
    """Write changed options into a model's configuration, if it has them too; return their names.

    LLaVA-NeXT and those after it count features by `image_grid_pinpoints` of the configuration.
    """
    nodes = [config, *(node for node in [getattr(config, "vision_config", None)] if node is not None)]
    names: list[str] = []
    for name, value in after.items():
        for node in nodes:
            if value != before.get(name) and _plain(getattr(node, name, None)) == _plain(before.get(name, node)):
                setattr(node, name, value)
                names.append(name)
    return names


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _fixed_by_call(processor: FamilyProcessor, modality: str) -> dict[str, object]:
    """Return the options that a family's processor gives its parts with every call, whatever their settings are."""
    native = processor.native
    defaults = getattr(native.valid_processor_kwargs, "_defaults", {}).get(modality, {})
    return {**getattr(native, modality, {}), **defaults}


def _check_name(
    sub: PixelProcessor, name: str, fixed: Mapping[str, object], key: str, processor: FamilyProcessor
) -> None:
    """Refuse a name that is not an option of a processor, or that a run may not set."""
    if name in fixed:
        raise ValueError(
            f"{key}.{name}: {_name(processor.native)} sets {name}={fixed[name]} in every call, so that another setting "
            "would have no effect"
        )
    if name in FRAME_OPTIONS:
        raise ValueError(f"{key}.{name}: dataset.max_frames says how many frames of a video are read, in every model")
    if _is_shape_option(sub, name):
        raise ValueError(f"{key}.{name}: the weights of the visual encoder fix it. {_listing(sub, fixed)}")
    videos = getattr(processor.native, "video_processor", None)
    if name not in _read_options(type(sub)) or name in CALL_OPTIONS:
        if videos is not None and sub is not videos and name in _read_options(type(videos)) - CALL_OPTIONS:
            raise ValueError(f"{key}.{name}: it is an option of videos; set {KEY}.{VIDEO}.{name}")
        has_none = name in sub.valid_kwargs.__annotations__ and name not in CALL_OPTIONS
        what = "has no effect in" if has_none else "is no option of"
        near = get_close_matches(name, [option.partition(".")[0] for option in list_options(sub, fixed)], n=1)
        hint = f" Did you mean {key}.{near[0]}?" if near else ""
        raise ValueError(f"{key}.{name}: it {what} {_name(sub)}.{hint} {_listing(sub, fixed)}")


def _listing(sub: PixelProcessor, fixed: Mapping[str, object]) -> str:
    return f"Allowed are {', '.join(list_options(sub, fixed)) or 'none'}."


def _check_value(sub: PixelProcessor, name: str, value: object, settings: Settings, key: str) -> object:
    """Return the value of an option, completing mappings with missing entries; refuse values of another type."""
    label = f"{key}.{name}={value}"
    present = settings.get(name)
    if isinstance(present, Mapping):
        entries = [str(entry) for entry in present if not _is_shape(name, str(entry), present)]
        if not entries:
            raise ValueError(f"{label}: the weights of the visual encoder fix it")
        if not isinstance(value, Mapping) or set(value) - set(entries):
            raise ValueError(f"{label}: set {', '.join(f'{key}.{name}.{entry}' for entry in entries)}")
        if wrong := [entry for entry, number in value.items() if type(number) is not int or number < 1]:
            raise ValueError(f"{key}.{name}.{wrong[0]}={value[wrong[0]]}: a whole number above 0 is needed")
        value = {**present, **value}
    annotation = sub.valid_kwargs.__annotations__[name]
    if isinstance(value, bool) and "bool" not in str(annotation):
        raise ValueError(f"{label}: {_type_name(annotation)} is needed")
    if type(value) is int and value < 1 and isinstance(present, int):
        raise ValueError(f"{label}: a whole number above 0 is needed")
    try:
        validate_typed_dict(sub.valid_kwargs, {name: value})
    except StrictDataclassError as error:
        raise ValueError(f"{label}: {shorten(str(error).strip().splitlines()[-1].strip())}") from error
    return value


def _is_shape_option(sub: object, name: str) -> bool:
    return name in SHAPE_OPTIONS or any(_name(sub).startswith(kind) and name == own for kind, own in SHAPE_OPTIONS_OF)


def _is_shape(name: str, entry: str, present: Mapping[str, object]) -> bool:
    """Return whether an entry of an option is fixed by the visual encoder's weights."""
    alone = entry == "shortest_edge" and "longest_edge" not in present
    return f"{name}.{entry}" in SHAPE_SIZES or alone


def _type_name(annotation: object) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _name(made: object) -> str:
    return type(made).__name__


@cache
def _read_options(kind: type) -> frozenset[str]:
    """Return the options that the code of a processor's class reads; it accepts others without using them."""
    options: type = kind.valid_kwargs
    read = {"do_convert_rgb"}
    method = getattr(kind, "_preprocess", None)
    read |= set(inspect.signature(method).parameters) if method is not None else set()
    for parent in kind.__mro__:
        module = inspect.getmodule(parent)
        name = getattr(module, "__name__", "")
        if not name.startswith("transformers.models.") and name.rpartition(".")[2] in BASE_MODULES:
            continue
        try:
            source = inspect.getsource(parent)
        except (OSError, TypeError):
            continue
        read |= set(_named_in(source))
    return frozenset(read & set(options.__annotations__))


def _named_in(source: str) -> Iterator[str]:
    """Yield the names that the code of a class reads from itself or from its keyword parameters."""
    yield from re.findall(r"self\.(\w+)", source)
    yield from re.findall(r"kwargs(?:\.pop|\.get)?[\[(]\s*\"(\w+)\"", source)
    for signature in re.findall(r"def (?!_set_attributes)\w+\((.*?)\)\s*(?:->[^:]*)?:", source, re.DOTALL):
        yield from re.findall(r"(\w+)\s*:", signature)


def _try_processor(processor: FamilyProcessor, image_processor: PixelProcessor, options: Mapping[str, object]) -> None:
    """Refuse an image processor that does not prepare blank images; afterwards, the family's own is restored."""
    before = processor.native.image_processor
    processor.native.image_processor = image_processor
    try:
        with quiet_loading():
            for height, width in TRIAL_SIZES:
                processor.expand_blank(Image.new("RGB", (width, height)))
    except Exception as error:  # a library's own errors, of any kind
        given = ", ".join(f"{KEY}.{name}={value}" for name, value in options.items())
        reason = shorten(" ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"{given}: {_name(image_processor)} does not prepare images with it: {reason}") from error
    finally:
        processor.native.image_processor = before
