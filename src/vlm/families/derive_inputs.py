"""What the inputs of a family's model are like, found by calling its own processor on blank images and videos.

Nothing of it depends on what images show: shapes and names alone are looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch
from PIL import Image
from torch import Tensor

from vlm.data.processor import RowIndex
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
NUMBERS = (torch.int64, torch.int32)
"""Precisions of indices, grids and other numbers; pixels have others."""
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
        indices: image input -> the input whose rows its numbers are indices of.
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
    indices: Mapping[str, RowIndex] = field(default_factory=dict)
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
        raise ProcessorMismatchError(f"{label} produces no inputs for an image")
    makers = _find_makers(native, family, outputs, text_names, images, expansion)
    rows, dims = _find_layout(native, images, blank)
    derived = DerivedInputs(
        rows if family.rows is None else family.rows,
        tuple(makers),
        tuple(dict.fromkeys((*TEXT_INPUTS, *text_names))),
        native.form,
        dims,
        _find_indices(images, partial(native.call_twice, blank), TEXT_INPUTS),
        makers,
    )
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
    native: NativeProcessor,
    family: Family,
    outputs: Mapping[str, object],
    names: Sequence[str],
    images: Mapping[str, Tensor],
    expansion: str,
) -> dict[str, Maker]:
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
                f"{type(native.native).__name__} makes the input {name} for each token, in a way that is not supported"
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


def _find_indices(
    images: Mapping[str, Tensor], call_twice: Callable[[], Mapping[str, object]], text_inputs: Sequence[str]
) -> dict[str, RowIndex]:
    """Return the inputs that are indices of rows of another one: input -> that input and its counted dimensions.

    Of two samples with equal images, the second has the numbers of the first plus the number of rows of an image.

    Args:
        images: the inputs of one image or video.
        call_twice: returns the outputs for two samples of it.
        text_inputs: outputs for a text.
    """
    candidates = [name for name, value in images.items() if value.ndim > 1 and value.dtype in NUMBERS]
    if not candidates:
        return {}
    try:
        samples = image_inputs_of(call_twice(), text_inputs)
    except Exception:  # a processor that takes one sample at a time
        return {}
    found = {name: _match_rows(name, images, samples.get(name)) for name in candidates}
    return {name: index for name, index in found.items() if index is not None}


def _match_rows(name: str, images: Mapping[str, Tensor], samples: Tensor | None) -> RowIndex | None:
    """Return the input whose rows an input's numbers count, by its values for two samples; None: it is no index."""
    own = images[name]
    if samples is None or samples.shape != (2 * len(own), *own.shape[1:]):
        return None
    first, second = samples.chunk(2)
    shifts = (second - first)[own >= 0].unique().tolist()
    if not torch.equal(first, own) or not torch.equal(first[own < 0], second[own < 0]) or len(shifts) != 1:
        return None
    for source, value in images.items():
        for num_dims in range(1, 1 if value.dtype in NUMBERS else value.ndim):
            if prod(value.shape[:num_dims]) == shifts[0] > int(own.max()):
                return source, num_dims
    return None


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
        blanks = [make_blank_video(videos.minimal_clip)] * 2
        try:
            two = videos.inputs(*blanks)
        except Exception:  # a processor that takes one video for a text
            two = shorter
        inputs, more, twice = (image_inputs_of(found, derived.text_inputs) for found in (shorter, longer, two))
        dims = {name: _grown_dim(value, twice[name]) for name, value in inputs.items() if len(twice[name]) == 1}
        along = {name: dim for name, dim in dims.items() if dim and name not in derived.per_sample}
        differ = {name for name in inputs if inputs[name].shape[1:] != more[name].shape[1:]}
        indices = _find_indices(
            inputs,
            partial(videos.inputs, *[make_blank_video(videos.minimal_clip)] * 2, apart=True),
            derived.text_inputs,
        )
        joined, equal = not inputs.keys().isdisjoint(images), bool(differ - {*derived.per_sample, *along})
        return replace(
            derived,
            min_frames=number,
            dims={**derived.dims, **along},
            indices={**derived.indices, **indices},
            joined=joined if family.joined is None else family.joined,
            equal_num_frames=equal if family.equal_num_frames is None else family.equal_num_frames,
        )
    return derived
