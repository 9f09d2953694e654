"""Weights that an earlier version saved under other names after ZeRO-3: copies of them have the names of the model.

Imports torch where it is needed.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vlm.hub.folders import read_json, write_json
from vlm.hub.layouts import FORMER_PREFIXES, rename_to_ours

BODY_PREFIX = "body."
"""Before the names of the vision-language model under prediction heads."""


def find_former_names(checkpoint: Path) -> dict[str, str]:
    """Return name on disk -> name in the model, for each weight that has a former name; empty where none has."""
    from vlm.hub.shards import read_meta_tensors, weight_files

    former = dict(_rename_all(name for file in weight_files(checkpoint) for name in read_meta_tensors(file)))
    if not former:
        return {}

    import torch

    from vlm.assembly.family import read_config
    from vlm.assembly.model_kinds import is_composed_config, is_prediction_config
    from vlm.models import VLMForConditionalGeneration, VLMForPrediction

    config = read_config(str(checkpoint), str(checkpoint))
    with torch.device("meta"):
        if is_composed_config(config):
            needed = VLMForConditionalGeneration(config).state_dict().keys()
        elif is_prediction_config(config):
            needed = VLMForPrediction(config).state_dict().keys()
        else:
            return {}
    return {name: own for name, own in former.items() if name not in needed and own in needed}


def _rename_all(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each name with a former prefix, and the name that it would have now."""
    for name in names:
        body = BODY_PREFIX if name.startswith(BODY_PREFIX) else ""
        if (own := rename_to_ours(name.removeprefix(body), FORMER_PREFIXES)) is not None:
            yield name, body + own


def copy_renamed(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copy a safetensors file or its index, with new names for some of its weights."""
    if target.suffix == ".json":
        index = read_json(source)
        index["weight_map"] = {names.get(name, name): file for name, file in index["weight_map"].items()}
        write_json(target, index)
        return
    from safetensors.torch import save_file

    from vlm.hub.shards import read_shard

    save_file({names.get(name, name): tensor for name, tensor in read_shard(source)}, target, {"format": "pt"})
