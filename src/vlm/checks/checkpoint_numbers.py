"""Compares the sizes in a checkpoint's `config.json` with its weights before a model is built: none may exceed them.

Given a billion layers, a library would count to a billion before it reports an error. To bound another kind of size,
add a row to `SIZES`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.checks.checkpoint_files import TensorHeader, nested_objects, shown

SKIPPED = ("recipe", "auto_map", "id2label", "label2id", "quantization_config", "task_specific_params")
"""Objects of a configuration that have no sizes of the model."""
NUMBERS_PER_ENTRY = 8
"""The maximum number of weights in a number of a file: quantised weights have four bits."""
MAX_LAYERS = 4096
MAX_WIDTH = 10**9


@dataclass(frozen=True)
class Size:
    """A kind of size.

    Attributes:
        keys: a regular expression that matches the names of its keys.
        least: the minimum.
        most: the maximum, whatever the weights are.
        bound: the further maximum from the weights: `tensors` (their number), `numbers` (the elements of the largest
            one), or None.
    """

    keys: str
    least: int
    most: int
    bound: str | None = None


SIZES = (
    Size(r"(num_|n_)(\w+_)?(layers?|blocks)|(\w+_)?depths?|(en|de)coder_layers", 0, MAX_LAYERS, "tensors"),
    Size(r"vocab_size|hidden_size|intermediate_size|d_model|n_embd|embed_dim|head_dim", 1, MAX_WIDTH, "numbers"),
    Size(r"(num_|n_)(\w+_)?heads?", 1, MAX_WIDTH, "numbers"),
    Size(r"(\w+_)?(hidden|intermediate)_(size|dim)|(num_|n_)(\w+_)?experts", 0, MAX_WIDTH, "numbers"),
    Size(r"(\w+_)?image_size|(\w+_)?patch_size|(num|in)_channels|num_patches|vision_dim|num_mel_bins", 1, 10**6),
    Size(r"max_position_embeddings|sliding_window", 0, 10**10),
)
"""Kinds of sizes; the first one that fits a key counts. A value is a whole number, null, or these in lists."""


def check_numbers(file: Path, config: Mapping[str, object], headers: Mapping[str, TensorHeader] | None) -> None:
    """Refuse a configuration with a size that is no whole number, or larger than the weights.

    Args:
        file: the configuration's, for messages.
        config: its content.
        headers: those of all weights; None if they are elsewhere, or no safetensors.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    bounds = {"tensors": MAX_LAYERS, "numbers": MAX_WIDTH}
    if headers is not None:
        numbers = max((header.size * NUMBERS_PER_ENTRY for header in headers.values()), default=0)
        bounds = {"tensors": len(headers), "numbers": numbers}
    for path, values in nested_objects(config, SKIPPED):
        for key, value in values.items():
            size = next((size for size in SIZES if re.fullmatch(size.keys, key)), None)
            if size is None or (key == "num_patches" and value == 0):
                continue
            most = min(size.most, bounds[size.bound]) if size.bound else size.most
            for number in _leaves(value):
                if not isinstance(number, int) or isinstance(number, bool) or not size.least <= number <= most:
                    where = f"{path}.{key}" if path else key
                    of = " by the weights beside it" if size.bound and headers is not None and most < size.most else ""
                    raise ValueError(
                        f"{file}: {shown(where)}={shown(number)}; a whole number from {size.least} to {most:,} is "
                        f"needed{of}"
                    )


def _leaves(value: object) -> Iterator[object]:
    """Yield the values in lists of lists; nulls, and the values of objects, are left out."""
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, dict):
        yield value


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
MAX_SIDE = 16384
"""Maximum side in pixels to which images are resized."""
MAX_AREA = 1 << 25
"""Maximum number of pixels of an image, for processors that bound these instead of its sides."""
MAX_COUNT = 10**6
NUM_CHANNELS = 3


def check_processor_numbers(file: Path, settings: Mapping[str, object]) -> None:
    """Refuse the settings of a processor whose sizes are no whole numbers, or larger than images are.

    Args:
        file: the settings' file, for messages.
        settings: its content.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    for path, values in nested_objects(settings):
        for key in ("image_mean", "image_std"):
            _check_channels(file, f"{path}.{key}" if path else key, values.get(key))
        by_area = "patch_size" in values or "merge_size" in values or path.rpartition(".")[2] == "size"
        bounds = dict.fromkeys(("height", "width"), MAX_SIDE) | dict.fromkeys(
            ("shortest_edge", "longest_edge", "min_pixels", "max_pixels"), MAX_AREA if by_area else MAX_SIDE
        )
        bounds |= dict.fromkeys(("tokens_per_image", "image_seq_len", "image_seq_length", "max_image_tiles"), MAX_COUNT)
        for key, most in bounds.items():
            value = values.get(key)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_whole and 1 <= value <= most):
                where = f"{path}.{key}" if path else key
                raise ValueError(f"{file}: {shown(where)}={shown(value)}; a whole number from 1 to {most:,} is needed")


def _check_channels(file: Path, key: str, value: object) -> None:
    """Raise ValueError if a mean or standard deviation is neither a number nor one for each of three channels."""
    numbers = value if isinstance(value, list) else [value] * NUM_CHANNELS
    above = 0 if key.endswith("std") else -float("inf")
    if value is not None and not (
        len(numbers) == NUM_CHANNELS and all(_is_number(number, above) for number in numbers)
    ):
        bound = " above 0" if key.endswith("std") else ""
        raise ValueError(f"{file}: {shown(key)}={shown(value)}; {NUM_CHANNELS} numbers{bound} are needed")


def _is_number(value: object, above: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < float("inf")
