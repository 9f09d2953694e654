"""What the inputs of a family's model are like, found by calling its own processor on blank images and videos.

Nothing of it depends on what images show: shapes and names alone are looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from vlm.families.native import (
    REPLACEMENTS,
    TEXT_INPUTS,
    CallForm,
    NativeProcessor,
    ProcessorMismatchError,
    image_inputs_of,
)
from vlm.families.table import Family
from vlm.families.token_inputs import Maker, find_maker, mark_replies
from vlm.families.videos import FamilyVideos, make_blank_video

SIDE = 64
"""The height and width of a blank image, in pixels."""
WORDS = "words"
PLAIN_INPUTS = ("input_ids", "attention_mask", "labels")
"""Outputs for a text that every model has, or that are made here."""
NUMBERS_OF_FRAMES = (1, 2, 4, 8)
"""Frames of the shortest video, in the order in which they are tried."""


@dataclass(frozen=True)
class DerivedInputs:
    """What the inputs of a family's model are like.

    Attributes:
        per_sample: image inputs with one row for each sample, whatever its number of images.
        per_token: inputs with one value for each token, besides ids and mask.
        text_inputs: all outputs for a text.
        form: how the processor is called.
        dims: image input -> the dimension along which it is concatenated, where that is not the first one.
        makers: input of `per_token` -> what makes it.
        min_frames: the fewest frames of a video; 0: no videos.
        joined: whether images and videos share inputs, in the order of the text.
        equal_num_frames: whether all videos of a batch must have the same number of frames.
    """

    per_sample: tuple[str, ...]
    per_token: tuple[str, ...]
    text_inputs: tuple[str, ...]
    form: CallForm
    dims: Mapping[str, int] = field(default_factory=dict)
    makers: Mapping[str, Maker] = field(default_factory=dict)
    min_frames: int = 0
    joined: bool = False
    equal_num_frames: bool = False


def derive_inputs(native: NativeProcessor, family: Family) -> DerivedInputs:
    """Find out what the inputs of a family's model are like; what its row says is taken from there.

    Raises:
        ProcessorMismatchError: the processor cannot be called for an image, or makes an input that cannot be made here.
    """
    blank = Image.new("RGB", (SIDE, SIDE))
    label = type(native.native).__name__
    native.find_form(blank)
    expansion = native.expand([blank])[0]
    native.find_joints(blank, WORDS)
    outputs, longer = (native(f"{native.form.frame}{WORDS * number}", [blank]) for number in (1, 2))
    longer_names = _names_of_tokens(longer)  # of one text, patches may be as many as tokens
    text_names = [name for name in _names_of_tokens(outputs) if name in longer_names]
    images = image_inputs_of(outputs, (*TEXT_INPUTS, *text_names))
    if not images:
        raise ProcessorMismatchError(f"{label} makes no inputs for an image")
    makers = _find_makers(native, family, outputs, text_names, images, expansion)
    rows, dims = _find_layout(native, images, blank)
    derived = DerivedInputs(
        rows if family.rows is None else family.rows, tuple(makers),
        tuple(dict.fromkeys((*TEXT_INPUTS, *text_names))), native.form, dims, makers,
    )  # fmt: skip
    return _with_videos(native, family, derived, images)


def _names_of_tokens(outputs: Mapping[str, object]) -> list[str]:
    """Return the names of outputs with one value for each token, besides ids, mask and labels."""
    names, length = [], torch.as_tensor(outputs["input_ids"]).shape[1]
    for name, value in outputs.items():
        if name in (*PLAIN_INPUTS, REPLACEMENTS):
            continue
        is_long = isinstance(value, Tensor) and value.ndim > 1 and tuple(value.shape[:2]) == (1, length)
        if name in TEXT_INPUTS or is_long:
            names.append(name)
    return names


def _find_makers(
    native: NativeProcessor, family: Family, outputs: Mapping[str, object], names: Sequence[str],
    images: Mapping[str, Tensor], expansion: str,
) -> dict[str, Maker]:  # fmt: skip
    """Return input -> what makes it, for the inputs with one value for each token."""
    if family.tokens is not None:
        return dict.fromkeys(family.tokens, mark_replies)
    ids: list[int] = torch.as_tensor(outputs["input_ids"])[0].tolist()
    image_id = native.most_frequent_id(expansion)
    makers: dict[str, Maker] = {}
    for name in names:
        expected = torch.as_tensor(outputs[name])[0]
        if maker := find_maker(native.native, name, expected, ids, images, image_id):
            makers[name] = maker
        elif expected.any():
            raise ProcessorMismatchError(
                f"{type(native.native).__name__} makes the input {name} for each token, in a way that is not known here"
            )  # zeros for all tokens, images among them, are what tokenizers add for models of two texts
    return makers


def _find_layout(
    native: NativeProcessor, images: Mapping[str, Tensor], blank: Image.Image
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return which inputs have one row for each sample, and which are concatenated along another dimension.

    Both have one row for two images of a sample, as for one; for two samples, the first kind has two.
    """
    try:
        two = image_inputs_of(native.process([blank, blank])[0], TEXT_INPUTS)
    except Exception:  # a processor that takes one image for a text: samples of one image are concatenated
        return (), {}
    single = [name for name, value in images.items() if value.ndim > 1 and name in two]
    single = [name for name in single if len(two[name]) == len(images[name]) == 1]
    samples = image_inputs_of(native.call_twice(blank), TEXT_INPUTS) if single else {}
    rows = tuple(name for name in single if len(samples[name]) == 2)
    dims = {name: _grown_dim(images[name], samples[name]) for name in single if name not in rows}
    return rows, {name: dim for name, dim in dims.items() if dim is not None}


def _grown_dim(one: Tensor, other: Tensor) -> int | None:
    """Return the dimension in which a tensor is larger than another one."""
    pairs = enumerate(zip(one.shape, other.shape, strict=True))
    return next((dim for dim, (size, grown) in pairs if grown > size), None)


def _with_videos(
    native: NativeProcessor, family: Family, derived: DerivedInputs, images: Mapping[str, Tensor]
) -> DerivedInputs:
    """Return derived inputs with what is found of videos, where the processor has a token for them."""
    plain = native.native
    if family.videos is False or getattr(plain, "video_token", None) is None or not hasattr(plain, "video_processor"):
        return derived
    tried = NUMBERS_OF_FRAMES if family.min_frames is None else (family.min_frames,)
    for number in tried:
        videos = FamilyVideos(plain, number)
        try:
            shorter, longer = (videos.checked_blank_inputs(frames) for frames in (number, 2 * number))
        except Exception:  # too few frames for this model
            continue
        try:
            two = videos.inputs(*[make_blank_video(videos.minimal_clip)] * 2)
        except Exception:  # a processor that takes one video for a text
            two = shorter
        inputs, more, twice = (image_inputs_of(found, derived.text_inputs) for found in (shorter, longer, two))
        dims = {name: _grown_dim(value, twice[name]) for name, value in inputs.items() if len(twice[name]) == 1}
        along = {name: dim for name, dim in dims.items() if dim and name not in derived.per_sample}
        differ = {name for name in inputs if inputs[name].shape[1:] != more[name].shape[1:]}
        joined, equal = not inputs.keys().isdisjoint(images), bool(differ - {*derived.per_sample, *along})
        return replace(
            derived, min_frames=number, dims={**derived.dims, **along},
            joined=joined if family.joined is None else family.joined,
            equal_num_frames=equal if family.equal_num_frames is None else family.equal_num_frames,
        )  # fmt: skip
    return derived
