"""Checks whether the files of an adapter's folder fit its base: ranks, layers, names, shapes and finite numbers."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vlm.checks.checkpoint_files import TensorHeader, shown

INITS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not change the base; others would change it when the adapter is added."""


def check_adapter_settings(
    file: Path, settings: Mapping[str, object], headers: Mapping[str, TensorHeader], layers: Collection[str]
) -> None:
    """Refuse an `adapter_config.json` that does not fit the adapter's weights and the base's layers.

    Args:
        file: the settings' file, for messages.
        settings: its content.
        headers: those of the adapter's weights.
        layers: names of the base's modules.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    folder, targets = file.parent, settings.get("target_modules")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type={shown(settings.get('peft_type'))}; LORA is needed")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{file}: target_modules={shown(targets)}; a list of the names of layers is needed")
    if unknown := sorted(set(targets) - set(layers)):
        raise ValueError(
            f"{folder}: its adapter changes {shown(unknown[0])}, which its base does not have: the base is another "
            "model"
        )
    ranks = {header.shape[0] for name, header in headers.items() if "lora_A" in name and header.shape}
    patterns = {key: cast(dict[str, object], settings.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict) or any(_plain(name) not in layers for name in pattern):
            raise ValueError(f"{file}: {key}={shown(pattern)}; names of layers are needed, and a number for each")
    for rank in (settings.get("r"), *patterns["rank_pattern"].values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= max(ranks, default=0):
            raise ValueError(f"{file}: r={shown(rank)}, but its weights have rank {', '.join(map(str, sorted(ranks)))}")
    for alpha in (settings.get("lora_alpha"), *patterns["alpha_pattern"].values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < float("inf"):
            raise ValueError(f"{file}: lora_alpha={shown(alpha)}; a number is needed")
    if (init := settings.get("init_lora_weights", True)) not in INITS:
        raise ValueError(f"{file}: init_lora_weights={shown(init)}; allowed are {', '.join(map(str, INITS))}")


def _plain(pattern: str) -> str:
    """Return the plain name in one of peft's patterns, which is escaped, and may follow `^`."""
    return re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))


def check_trained_tensors(
    folder: Path,
    state: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    *,
    needed: Collection[str],
    growing: Collection[str],
) -> None:
    """Refuse weights of an adapter's folder that the base does not have, and a folder that lacks new weights.

    Args:
        folder: the adapter's.
        state: its weights other than the adapter.
        current: the weights of the base.
        needed: names of weights that the base does not have.
        growing: names of embeddings of which the folder may have only the last rows.

    Raises:
        ValueError: with the name of the weight.
    """
    if lacking := sorted(set(needed) - state.keys()):
        raise ValueError(f"{folder} lacks {len(lacking)} of the weights that it needs: {', '.join(lacking[:5])}")
    for name, tensor in state.items():
        target = current.get(name)
        fits = target is not None and (
            tensor.shape == target.shape
            or (name in growing and tensor.shape[1:] == target.shape[1:] and 0 < len(tensor) <= len(target))
        )
        if target is None or not fits:
            has = "no such weight" if target is None else tuple(target.shape)
            raise ValueError(
                f"{folder}: {shown(name)} is {tuple(tensor.shape)}, but its base has {has}: the base is another model"
            )
        if tensor.is_floating_point() and not target.is_floating_point():
            raise ValueError(
                f"{folder}: {name} was trained and cannot be quantised; merge the adapter first: vlm merge-lora"
            )
        if tensor.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{folder}: {name} is of type {tensor.dtype}; {target.dtype} is needed")
    check_finite_tensors(folder, state)


def check_finite_tensors(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a weight of an adapter's folder holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: {shown(name)} is NaN or infinite; the weights are damaged")


def check_adapter_tensors(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a weight of an adapter is no floating-point number, or holds NaN or infinity."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: {shown(name)} is of type {tensor.dtype}; floating-point numbers are needed")
    check_finite_tensors(folder, state)
