"""`shrink`: a configuration of the same architecture with few, narrow layers.

Image size, patches, tiles, merging, vocabulary and token ids keep their values, so that the processor of the large
model is that of the small one, token for token.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vlm.assembly.opening import shorten
from vlm.assembly.small_models.fields import Sizes, get_fields, get_merge, get_width, walk
from vlm.assembly.small_models.layers import fit_references, read_depth, read_references, shrink_layers
from vlm.assembly.small_models.widths import shrink_widths
from vlm.families.meta_model import get_auto_class

LADDER = (Sizes(), Sizes(width=128, head=32), Sizes(width=256, head=64))
"""The sizes that are tried, one after the other, until a model builds."""

Trial = Callable[[PreTrainedConfig], object]


def shrink(config: PreTrainedConfig, trial: Trial | None = None) -> PreTrainedConfig:
    """Return a small configuration of the same architecture, the given one left alone.

    It has at least one layer of every kind, narrow layers, few heads and experts. The first sizes with which the trial
    passes are taken.

    Args:
        config: the configuration, with those of its parts.
        trial: raises an error where a configuration does not work; None: the model is built on the meta device.

    Raises:
        ValueError: no sizes pass.
    """
    trial = trial or build_on_meta
    problems = []
    for sizes in LADDER:
        try:
            small = apply_sizes(config, sizes)
            trial(small)
        except Exception as error:  # whatever a model does with numbers that do not fit together
            problems.append(f"width {sizes.width}: {type(error).__name__}: {shorten(str(error))}")
        else:
            return small
    raise ValueError(f"model_type={config.model_type}: no small model of it can be built: {'; '.join(problems)}")


def apply_sizes(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """Return a configuration with these sizes, without a trial."""
    small = copy.deepcopy(config)
    references = read_references(small)
    nested = list(walk(small))
    highest = max(references, default=0)
    deep = [part for part in nested if (read_depth(part) or 0) > highest]  # others cannot be referred to
    for part in nested:
        shrink_layers(part, references)
    depth = min((number for part in deep or nested if (number := read_depth(part))), default=1)
    merged = find_merged_widths(nested)
    for part in nested:
        fit_references(part, depth, references)
        shrink_widths(part, sizes, merged)
    return type(small).from_dict(small.to_dict())  # what a class derives from other fields, it derives again


def find_merged_widths(parts: Sequence[PreTrainedConfig]) -> dict[int, int]:
    """Return the widths of vectors that several patches are laid side by side in -> how many patches those are."""
    fields = [get_fields(part) for part in parts]
    widths = [get_width(part) for part in fields]
    merges = {get_merge(part) for part in fields} - {1}
    merged = {width * merge: merge for width in widths if width for merge in merges}
    return {width: merge for width, merge in merged.items() if width not in widths}


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration without storage for its weights."""
    with torch.device("meta"):
        return get_auto_class(config).from_config(config)
