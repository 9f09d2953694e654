"""Which part each parameter of a model belongs to, by its configuration alone: composed models, families, and heads."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from transformers import PreTrainedConfig

from vlm.families.derive_parts import derive_parts
from vlm.families.meta_model import build_meta_model
from vlm.families.table import COMPOSED_PARTS, COMPOSED_UNUSED_FORMS, CROSS_ATTENTION_LAYERS, UNUSED_LAYERS, get_family

BODY = "body."
"""What the names of a model begin with that has prediction heads."""


def get_form(name: str) -> str:
    """Return the name of a parameter with `*` in place of its numbers: the same for all layers, in models of any depth.

    Such as `model.layers.*.mlp.weight`; a model's prediction heads change nothing of it.
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(BODY))


@dataclass(frozen=True)
class PartNames:
    """The parts of one model, by prefixes of its parameters (prefix -> part), and what gets no gradient.

    Attributes:
        prefixes: prefix -> part.
        unused_prefixes: prefixes of parameters that no answer depends on.
        unused_forms: what the forms (`get_form`) of further ones begin with.
    """

    prefixes: dict[str, str]
    unused_prefixes: tuple[str, ...] = ()
    unused_forms: tuple[str, ...] = ()

    def part_of(self, name: str) -> str:
        """Return the part of a parameter or buffer, by its full name; the longest matching prefix wins.

        Raises:
            ValueError: no prefix matches.
        """
        matching = [prefix for prefix in self.prefixes if name.startswith(prefix)]
        if not matching:
            raise ValueError(f"{name}: matches no part; the model that its configuration builds does not have it")
        return self.prefixes[max(matching, key=len)]

    def is_unused(self, name: str) -> bool:
        """Return whether no answer depends on a parameter."""
        return name.startswith(self.unused_prefixes) or get_form(name).startswith(self.unused_forms)


@dataclass(frozen=True)
class _ConfigKey:
    """A configuration that counts as equal to another one with the same settings."""

    settings: str
    config: PreTrainedConfig = field(compare=False)


def get_part_names(config: PreTrainedConfig, unused_forms: Iterable[str] = ()) -> PartNames:
    """Return the parts of a model.

    A family's are found in a model on the meta device, once for each configuration.

    Args:
        config: the model's configuration.
        unused_forms: what the forms of parameters begin with that get no gradient, as a trial has found.

    Raises:
        NotAFamilyError: it is no vision-language model whose parts can be told apart; see `derive_parts`.
    """
    if config.model_type == "vlm_prediction":
        body = get_part_names(config.body_config, unused_forms)
        prefixes = {f"{BODY}{prefix}": part for prefix, part in body.prefixes.items()}
        unused = tuple(f"{BODY}{prefix}" for prefix in body.unused_prefixes)
        return PartNames({**prefixes, "heads.": "head"}, unused, body.unused_forms)
    if config.model_type == "vlm":
        return PartNames(
            {prefix: part for part, prefixes in COMPOSED_PARTS.items() for prefix in prefixes},
            tuple(f"visual_encoder.{name}" for name in config.unread_parameters),
            COMPOSED_UNUSED_FORMS,
        )
    found = _get_family_parts(_ConfigKey(config.to_json_string(use_diff=False), config))
    forms = tuple(unused_forms)
    return replace(found, unused_forms=forms) if forms else found


@lru_cache(maxsize=64)
def _get_family_parts(key: _ConfigKey) -> PartNames:
    config = key.config
    family = get_family(config.model_type)
    unused = list(_expand_prefixes(family.unused_prefixes, config))
    if family.parts is not None:
        parts = {part: _expand_prefixes(prefixes, config) for part, prefixes in family.parts.items()}
        return PartNames({prefix: part for part, prefixes in parts.items() for prefix in prefixes}, tuple(unused))
    derived = derive_parts(build_meta_model(config), tuple(_expand_prefixes(family.connectors, config)))
    return PartNames(derived.prefixes, (*unused, *derived.unused_prefixes))


def _expand_prefixes(prefixes: Sequence[str], config: PreTrainedConfig) -> Iterator[str]:
    """Yield prefixes with layers in place of what stands for them."""
    for prefix in prefixes:
        if CROSS_ATTENTION_LAYERS in prefix:
            layers = config.get_text_config().cross_attention_layers
            yield from (prefix.replace(CROSS_ATTENTION_LAYERS, str(layer)) for layer in layers)
        elif UNUSED_LAYERS in prefix:
            depth = config.vision_config.num_hidden_layers
            highest = config.vision_config.feature_layer % (depth + 1)  # state 0 precedes layer 0
            yield from (prefix.replace(UNUSED_LAYERS, str(layer)) for layer in range(highest, depth))
        else:
            yield prefix
