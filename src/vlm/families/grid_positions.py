"""Models whose tokens of images and videos have three positions, in time, height and width (M-RoPE)."""

import inspect

from torch import nn

TYPES_INPUT = "mm_token_type_ids"


def has_grid_positions(model: nn.Module) -> bool:
    """Return whether a model's own code computes positions in time, height and width from ids and types of tokens.

    Qwen-VL's and those after it have `get_rope_index` for that, in the model beneath the vocabulary head.
    """
    compute = getattr(getattr(model, "model", None), "get_rope_index", None)
    return compute is not None and TYPES_INPUT in inspect.signature(compute).parameters
