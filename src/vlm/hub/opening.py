"""Opening a checkpoint of this framework for an export: what it is, and which weights it has."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.family import read_config
from vlm.assembly.model_kinds import is_composed_config
from vlm.assembly.round_trip import saved_tensors
from vlm.checks.checkpoint import check_adapter, check_checkpoint, is_adapter_folder
from vlm.hub.folders import JsonObject, resolve_folder
from vlm.hub.layouts import FORMER_PREFIXES, PrefixPairs, rename_to_foreign, rename_to_ours
from vlm.hub.shards import read_meta_tensors, weight_files
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor


class OpenedCheckpoint(NamedTuple):
    """A composed checkpoint whose weights have not been read.

    Attributes:
        name: how the user called it.
        folder: where it is.
        config: its configuration.
        processor: its processor.
    """

    name: str
    folder: Path
    config: VLMConfig
    processor: VLMProcessor


def open_for_export(name: str) -> OpenedCheckpoint:
    """Return a composed checkpoint, from a folder or the Hub.

    Raises:
        ValueError: it is none, or an adapter.
    """
    checkpoint = resolve_folder(name)
    check_checkpoint(checkpoint)
    check_adapter(name, found=is_adapter_folder(checkpoint), expected=False)
    config = read_config(str(checkpoint), name)
    if not is_composed_config(config):
        raise ValueError(
            f"{name} is a {config.model_type} checkpoint, which other programs load as it is; only "
            "composed models are exported"
        )
    return OpenedCheckpoint(name, checkpoint, config, open_checkpoint(checkpoint).load_composed_processor())


def refuse_incompatible(name: str, format_name: str, problems: Iterable[str]) -> None:
    """Raise ValueError with every reason why a checkpoint does not fit a format, if there is one."""
    if reasons := list(problems):
        listing = "".join(f"\n  - {reason}" for reason in reasons)
        raise ValueError(f"{name} does not fit --format {format_name}:{listing}")


def read_shapes(checkpoint: Path) -> JsonObject:
    """Return the weights of a checkpoint as meta tensors, by their names on disk, in the order of its files."""
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in read_meta_tensors(file).items()}


def name_weights(name: str, checkpoint: Path, config: VLMConfig, weight_prefixes: PrefixPairs) -> dict[str, str]:
    """Return name on disk -> foreign name of each weight of a checkpoint; copies of tied ones are left out.

    Raises:
        ValueError: weights are missing, or are none of the model's, or the format has no name for one.
    """
    with torch.device("meta"):
        model = VLMForConditionalGeneration(config)
    complete = model.state_dict()
    needed = saved_tensors(model, complete)
    found = {rename_to_ours(weight, FORMER_PREFIXES) or weight: weight for weight in read_shapes(checkpoint)}
    if not found:
        raise ValueError(f"{name} contains no weights; the complete model of a run is in its folder `final`")
    for problem, weights in (
        ("lacks", needed.keys() - found),
        ("has no place for", found.keys() - needed - complete.keys()),
    ):
        if weights:
            raise ValueError(
                f"{name} is not the model that its config.json describes: it {problem} {len(weights)} weights, such as "
                f"{', '.join(sorted(weights)[:3])}"
            )
    names = {found[ours]: rename_to_foreign(ours, weight_prefixes) for ours in found if ours in needed}
    if unnamed := sorted(ours for ours, foreign in names.items() if foreign is None):
        raise ValueError(f"{name}: the format has no name for the weight {unnamed[0]}")
    return {ours: foreign for ours, foreign in names.items() if foreign is not None}
