"""Comparing what training's path gives with what an engine gives: in which order, how closely, in which words.

Pixels are compared first, then ids, then logits, then answers: a difference makes all later ones, so the first one is
reported. Where logits or answers differ, layers are compared one after the other.

Pixels may differ by `PIXEL_LEVELS` of the 255 levels of an image: scaling and normalising in another order rounds
float32 numbers, and moves no pixel to another level. Ids may not differ. Logits and layers may differ as the additions
of a matrix product in another order do: see `TOLERANCES`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.assembly.numbers import bound_infinite
from vlm.data.processor import Processor
from vlm.inference.verify.engines import IDS, LOGITS, NUM_IDS, PIXELS, State

PIXEL_LEVELS = 0.02
"""The most levels of 255 that a pixel may differ by."""

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Precision -> the largest `largest_difference` of logits and layers that counts as rounding.

Rounding puts a number of float32 off by 6e-8 of itself, of float16 by 5e-4, of bfloat16 by 4e-3. Another attention
kernel makes 6e-7, 2e-3 and 1.4e-2 of it at the output of 24 random layers; weights that were trained spread more, so
that a few times as much is allowed, and of float32, where there is room, much more. Wrong weights or another layer make
0.1 and more; of two random layers, one matrix that was rounded to bfloat16 makes 1.4e-4, and gelu by tanh 1.8e-4.
"""

TIES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Precision -> the largest `Reference.margin` of two tokens that are tied: either may be the greedy one."""

STAGES = (PIXELS, NUM_IDS, IDS, LOGITS)
"""What is compared of each case, in this order."""


class Difference(NamedTuple):
    """The first difference that was found.

    Attributes:
        stage: `pixels`, `ids`, a layer, `logits` or `answers`.
        case: the name of the question.
        sentence: what differs, and by how much.
    """

    stage: str
    case: str
    sentence: str


@dataclass(frozen=True)
class StageResult:
    """What was found of one stage over all cases.

    Attributes:
        stage: its name.
        cases: how many were compared.
        largest: the largest difference, in the unit of the stage.
        allowed: the largest difference that counts as rounding.
        difference: the first difference that is larger; None where there is none.
    """

    stage: str
    cases: int
    largest: float
    allowed: float
    difference: Difference | None


def compare_stage(
    stage: str, ours: Mapping[str, State], theirs: Mapping[str, State], processor: Processor, dtype: str
) -> StageResult | None:
    """Compare one stage of all cases; None where the engine gives nothing of it.

    Args:
        stage: one of `STAGES`.
        ours: name of a case -> what training's path gives; `image_views` beside where images are cut into tiles.
        theirs: name of a case -> what the engine gives.
        processor: training's.
        dtype: the precision that both compute in.
    """
    allowed = {PIXELS: PIXEL_LEVELS, IDS: 0.0, NUM_IDS: 0.0}.get(stage, TOLERANCES[dtype])
    first, largest, number = None, 0.0, 0
    for name, outputs in theirs.items():
        if stage == NUM_IDS and stage in outputs:
            expected: Tensor | None = torch.tensor([len(ours[name][IDS])])
        else:
            expected = ours[name].get(stage)
        actual = outputs.get(stage)
        if stage == PIXELS and expected is not None and actual is None and IDS in outputs:
            first = first or Difference(stage, name, "the engine reads no pixels of an image")
            continue
        if actual is None or expected is None:
            continue
        number += 1
        if stage == PIXELS and expected.ndim == 4:
            actual = without_padding(actual, ours[name].get("image_views"))
        size, sentence = measure(stage, expected, actual, processor, allowed)
        largest = max(largest, size)
        if sentence and first is None:
            first = Difference(stage, name, sentence)
    return StageResult(stage, number, largest, allowed, first) if number or first else None


def measure(stage: str, ours: Tensor, theirs: Tensor, processor: Processor, allowed: float) -> tuple[float, str | None]:
    """Return the size of a difference in the unit of its stage, and what it is as a sentence, if it is too large."""
    if stage == NUM_IDS:
        number = abs(int(ours) - int(theirs))
        return number, f"the prompt has {int(theirs)} tokens instead of {int(ours)}" if number else None
    if stage == IDS:
        return measure_ids(ours.tolist(), theirs.tolist(), processor)
    if ours.shape != theirs.shape:
        return float("inf"), f"{stage} have the shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
    if stage == PIXELS:
        levels = float((ours.double() - theirs.double()).abs().max()) * pixel_scale(processor)
        changed = float(((ours.double() - theirs.double()).abs() * pixel_scale(processor) > allowed).double().mean())
        problem = f"pixels differ by up to {levels:.3g} of 255 levels, {changed:.1%} of them (allowed: {allowed:g})"
        return levels, None if levels <= allowed else problem
    size = largest_difference(ours, theirs)
    problem = f"{stage} differ by {size:.2g} of their size (allowed: {allowed:g})"
    return size, None if size <= allowed else problem


def measure_ids(ours: list[int], theirs: list[int], processor: Processor) -> tuple[float, str | None]:
    """Return the number of positions at which ids differ, and where they begin to."""
    if ours == theirs:
        return 0.0, None
    pairs = list(zip(ours, theirs, strict=False))
    number = sum(a != b for a, b in pairs) + abs(len(ours) - len(theirs))
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    shown = [repr(processor.tokenizer.decode(ids[place : place + 4]))[:40] for ids in (ours, theirs)]
    lengths = "" if len(ours) == len(theirs) else f", {len(theirs)} tokens instead of {len(ours)}"
    return number, f"ids differ from token {place} on: {shown[1]} instead of {shown[0]}{lengths}"


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest Euclidean norm of a difference of vectors, as a share of the vector's.

    A vector is the last dimension: the logits of a position, the features of a token. One that is smaller than the root
    of the mean square of all is measured by that. Infinite numbers count as the largest of their precision.
    """
    if ours.numel() == 0:
        return 0.0
    expected, actual = (bound_infinite(tensor, ours.dtype).flatten(0, -2) for tensor in (ours, theirs))
    sizes = expected.norm(dim=1)
    scale = sizes.maximum(sizes.square().mean().sqrt()).clamp(min=1e-12)
    size = float(((expected - actual).norm(dim=1) / scale).max())
    return float("inf") if size != size else size


def first_differing_layer(ours: State, theirs: State, dtype: str) -> tuple[str, float] | None:
    """Return the first layer that differs by more than rounding, and by how much; None where no layer of both does.

    Layers are compared in the order in which training's path runs them.
    """
    for name, expected in ours.items():
        actual = theirs.get(name)
        if actual is None:
            continue
        same = expected.shape == actual.shape
        size = largest_difference(expected, actual) if same else float("inf")
        if size > TOLERANCES[dtype]:
            return name, size
    return None


def without_padding(pixels: Tensor, image_views: Tensor | None) -> Tensor:
    """Return the views of all images, `(views, 3, height, width)`, from images padded to equally many of them."""
    if pixels.ndim != 5:
        return pixels
    numbers = [len(image) for image in pixels] if image_views is None else image_views.clamp(min=1).tolist()
    return torch.cat([image[:number] for image, number in zip(pixels, numbers, strict=False)])


def pixel_scale(processor: Processor) -> float:
    """Return how many of the 255 levels of an image a difference of 1 after normalising is."""
    deviations: Iterable[float] = getattr(processor.image_processor, "image_std", None) or [1.0]
    return 255 * max(deviations)
