"""What runs of the tests find out or prove once for all models that are equal in what it depends on.

Each has tests of its own, which ask the functions of the package themselves. What is refused is refused each time.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from accelerate.utils import imports

from vlm.assembly import encoders, loading, logit_proofs
from vlm.assembly.round_trip import check_round_trip
from vlm.checks.checkpoint_files import TensorHeader
from vlm.train.monitor import peak_flops
from vlm.train.monitor.flops import StepFlops, count_flops

is_package_available_once = cache(imports._is_package_available)
measure_tflops_once = cache(peak_flops.measure_tflops)
COUNTED_FLOPS: dict[tuple[object, ...], StepFlops] = {}


def count_flops_once(model: Any, image: Mapping[str, Any]) -> StepFlops:
    """Count the operations of a model, once for all models that are equal in configuration, shapes and what trains."""
    parameters = tuple((name, value.shape, value.requires_grad) for name, value in model.named_parameters())
    shapes = str(sorted((name, getattr(value, "shape", value)) for name, value in image.items()))
    key = (type(model), model.config.to_json_string(), parameters, shapes)
    if key not in COUNTED_FLOPS:
        COUNTED_FLOPS[key] = count_flops(model, image)
    return COUNTED_FLOPS[key]


inspect_encoder = encoders._inspect_encoder
INSPECTED_ENCODERS: dict[tuple[object, ...], tuple[encoders.EncoderInfo, int | None]] = {}


def inspect_encoder_once(part: str, source: Any, config: Any, size: tuple[int, int]) -> encoders.EncoderInfo:
    """Find out what an encoder gives, and which layers it needs, once for all that are equal."""
    key = (part, repr(source), type(config), config.to_json_string(), size)
    if key not in INSPECTED_ENCODERS:
        info = inspect_encoder(part, source, config, size)
        INSPECTED_ENCODERS[key] = (info, getattr(config, "num_hidden_layers", None))
    info, num_layers = INSPECTED_ENCODERS[key]
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    return copy.deepcopy(info)


compare_on_meta = loading._compare_on_meta
FITTING: set[tuple[object, ...]] = set()


def compare_on_meta_once(kind: Any, config: Any, headers: Mapping[str, TensorHeader], rules: Any) -> None:
    """Compare a model with the headers of its weights, once for all that are equal and fit."""
    tensors = tuple(sorted((name, header.dtype, header.shape) for name, header in headers.items()))
    allowed = (rules.new, rules.is_part, rules.num_layers)
    key = (kind, type(config), config.to_json_string(use_diff=False), tensors, allowed)
    if key not in FITTING:
        compare_on_meta(kind, config, headers, rules)
        FITTING.add(key)


find_part = loading._find_part
PART_PREFIXES: dict[tuple[object, ...], str | None] = {}


def find_part_once(kind: Any, config: Any, name: str, revision: str | None) -> str | None:
    """Find the prefix of a part's weights, once for all that are equal in configuration and names of weights."""
    headers = loading.read_weight_headers(name, revision)
    names = None if headers is None else tuple(headers)
    key = (kind, type(config), config.to_json_string(use_diff=False), names)
    if key not in PART_PREFIXES:
        PART_PREFIXES[key] = find_part(kind, config, name, revision)
    return PART_PREFIXES[key]


def describe_structure(model: Any) -> tuple[object, ...]:
    """Return what a proof about a model depends on: its configuration, classes and tensors, without their values."""
    classes = tuple((name, type(module)) for name, module in model.named_modules())
    state = model.state_dict(keep_vars=True)
    places: dict[int, int] = {}
    tied = tuple(places.setdefault(id(tensor), len(places)) for tensor in state.values())
    tensors = tuple((name, value.shape, value.dtype) for name, value in (*state.items(), *model.named_buffers()))
    return model.config.to_json_string(use_diff=False), classes, tensors, tied


PROVED: set[tuple[object, ...]] = set()


def check_round_trip_once(model: Any) -> None:
    """Prove that a model loads what it saves, once for all of a structure."""
    key = (check_round_trip, describe_structure(model))
    if key not in PROVED:
        check_round_trip(model)
        PROVED.add(key)


def proved_once(check: Callable[[Any, Any, str], None]) -> Callable[[Any, Any, str], None]:
    """Return a proof about the logits of a model that is made once for all of a structure and a tokenizer."""

    def check_once(model: Any, processor: Any, label: str) -> None:
        """Make the proof unless it holds for an equal model already."""
        tokenizer = processor.tokenizer
        ids = (len(tokenizer), tokenizer.pad_token_id, tokenizer.padding_side, *tokenizer.all_special_ids)
        configs = (getattr(module, "config", None) for module in model.modules())
        attention = frozenset(str(getattr(config, "_attn_implementation", None)) for config in configs)
        key = (check, type(model), describe_structure(model), attention, type(processor), ids)
        if key not in PROVED:
            check(model, processor, label)
            PROVED.add(key)

    return check_once


check_causal_once = proved_once(logit_proofs.check_causal)
check_padding_once = proved_once(logit_proofs.check_padding)
