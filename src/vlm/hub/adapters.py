"""LoRA adapters, merged into the weights they adapt: W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685).

Imports `vlm.hub` only. Adapters that are no such sum (DoRA, adapted embeddings, trained biases …) are refused.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm.hub.folders import read_json
from vlm.hub.shards import read_shard

LORA_FACTOR_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
PEFT_PREFIX = "base_model.model."

UNMERGEABLE_OPTIONS = (
    "use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "modules_to_save", "target_parameters",
    "trainable_token_indices", "megatron_config", "alora_invocation_tokens", "use_qalora", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "use_bdlora",
)  # fmt: skip
"""Fields of `adapter_config.json` whose use changes the sum."""

SUPPORTED_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights as they are; PiSSA, OLoRA and others do not."""

MERGE_BY_HAND_HINT = "Merge it with the code that trained it (merge_and_unload) and import the result."


@dataclass(frozen=True)
class LoraDelta:
    """The update of one weight: `scale * up @ down`, `(out, rank) @ (rank, in)`."""

    down: Tensor
    up: Tensor
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """Return the merged weight in its own dtype; the sum is computed in float32."""
        return torch.addmm(weight.float(), self.up.float(), self.down.float(), alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter under its model's own names: updates of weights, and weights that replace the model's."""

    deltas: dict[str, LoraDelta]
    replacements: dict[str, Tensor]


def read_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json`, `adapter_model.{safetensors,bin}`, and `non_lora_trainables.bin` where it exists.

    Refuses what is no LoRA that merges as a sum, and weights that are missing or do not belong together.
    """
    settings = read_json(folder / "adapter_config.json")
    _check_supported(folder, settings)
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise ValueError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors or adapter_model.bin")
    factors: dict[str, dict[str, Tensor]] = {}
    replacements: dict[str, Tensor] = {}
    for name, tensor in read_shard(file):
        if factor := LORA_FACTOR_NAME.fullmatch(name):
            factors.setdefault(factor[1].removeprefix(PEFT_PREFIX), {})[factor[2]] = tensor
        elif "lora_" in name:
            raise ValueError(f"{file}: {name} is adapted in a way that cannot be merged here. {MERGE_BY_HAND_HINT}")
        else:
            replacements[name.removeprefix(PEFT_PREFIX)] = tensor
    if (extra := folder / "non_lora_trainables.bin").is_file():
        replacements |= {_strip_prefixes(name): tensor for name, tensor in read_shard(extra)}
    deltas = {f"{name}.weight": _make_delta(name, pair, settings) for name, pair in factors.items()}
    return Adapter(deltas, replacements)


def _check_supported(folder: Path, settings: dict) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{folder}: its adapter is of peft_type={kind}; only LORA can be merged here. {MERGE_BY_HAND_HINT}"
        )
    used = [f"{key}={settings[key]}" for key in UNMERGEABLE_OPTIONS if settings.get(key)]
    if settings.get("bias", "none") != "none":
        used.append(f"bias={settings['bias']}")
    if settings.get("init_lora_weights") not in SUPPORTED_INITIALIZATIONS:
        used.append(f"init_lora_weights={settings['init_lora_weights']}")
    if used:
        raise ValueError(f"{folder}: its adapter is not merged here because of {', '.join(used)}. {MERGE_BY_HAND_HINT}")


def _make_delta(name: str, pair: dict[str, Tensor], settings: dict) -> LoraDelta:
    """Return the update; raises ValueError where a factor is missing, or they are no matrices of one rank."""
    if set(pair) != {"A", "B"}:
        raise ValueError(f"the adapter has lora_{next(iter(pair))} of {name} alone")
    down, up = pair["A"], pair["B"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(f"the adapter's factors of {name} are {tuple(down.shape)} and {tuple(up.shape)}: no product")
    rank = down.shape[0]
    from peft.utils.other import get_pattern_key  # slow to import

    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), settings["lora_alpha"])
    return LoraDelta(down, up, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _strip_prefixes(name: str) -> str:
    """Return a name of `non_lora_trainables.bin` without `base_model.`, and without one `model.` of two."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name
