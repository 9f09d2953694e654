"""Layer-wise learning-rate decay: earlier layers of a part learn more slowly than later ones.

A part of `L` layers with learning rate `lr` and decay `d` gives layer `i`, counted from 0, the rate `lr d^(L - i)`.
What comes before the first layer, such as embeddings, has `lr d^(L + 1)`; what comes after the last one, such as a
final norm or a vocabulary head, has `lr` (Clark et al. 2020, arXiv:2003.10555; Bao et al. 2021, arXiv:2106.08254).
"""

import re
from collections.abc import Mapping

from torch import nn

INPUTS = re.compile(r"embed|patch|token|position|stem|wte|wpe|pre_?l|_pre\b|\bpre_")
"""Found in names of parameters that come before the first layer: embeddings, positions, first norms."""

SMALLEST_SHARE = 0.2
"""Lists of modules with fewer parameters than this share of the largest list's are no layers of a part."""


def rate_factors(
    modules: Mapping[str, nn.Module], sizes: Mapping[str, int], decay: float | None, part: str
) -> dict[str, float]:
    """Return the factor from the learning rate of a part to that of each of its parameters.

    A part with several lists of layers, such as two encoders, has each list decay by itself.

    Args:
        modules: the model's modules by their full names; it may have adapters.
        sizes: full names of the part's parameters -> their numbers of elements.
        decay: the factor from a layer to the one before it; None: every parameter has the part's rate, and the result
            is empty.
        part: the part's name, for the message.

    Raises:
        ValueError: the part has no list of layers.
    """
    if decay is None:
        return {}
    depths = _find_layers(modules, sizes)
    if not depths:
        key = f"trainer.learning_rate.{part}_layer_decay"
        raise ValueError(f"{key}={decay:g}: the {part} has no list of layers; leave it out")
    return {name: decay ** _distance(name, depths) for name in sizes}


def _distance(name: str, depths: Mapping[str, int]) -> int:
    """Return how many layers come between a parameter and the end of its part."""
    for prefix, depth in depths.items():
        if name.startswith(f"{prefix}."):
            return depth - int(name.removeprefix(f"{prefix}.").split(".")[0])
    nearest = max(depths, key=lambda prefix: _num_shared_words(name, prefix))
    words = ".".join(name.split(".")[_num_shared_words(name, nearest) :])
    return depths[nearest] + 1 if INPUTS.search(words) else 0


def _find_layers(modules: Mapping[str, nn.Module], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the outermost lists of modules of a part that hold most of it: name -> number of modules."""
    outermost: dict[str, int] = {}
    for prefix, module in modules.items():
        depth = len(list(module.children())) if isinstance(module, nn.ModuleList | nn.Sequential) else 0
        is_inner = any(prefix.startswith(f"{outer}.") for outer in outermost)
        if depth > 1 and not is_inner and any(name.startswith(f"{prefix}.") for name in sizes):
            outermost[prefix] = depth
    counts = {prefix: sum(n for name, n in sizes.items() if name.startswith(f"{prefix}.")) for prefix in outermost}
    smallest = SMALLEST_SHARE * max(counts.values(), default=0)
    return {prefix: depth for prefix, depth in outermost.items() if counts[prefix] >= smallest}


def _num_shared_words(name: str, prefix: str) -> int:
    pairs = list(zip(name.split("."), prefix.split("."), strict=False))
    return next((index for index, (own, other) in enumerate(pairs) if own != other), len(pairs))
