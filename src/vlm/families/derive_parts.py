"""The parts of any vision-language model of transformers, found in the model itself.

`get_decoder` names the language model and `get_encoder(modality="image")` the visual encoder; embeddings and vocabulary
head belong to the language model, and everything else is the connector. Where a merger or projector lies within the
visual encoder, a rule of structure finds it. What no rule finds stands in `families/table.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlm.families.meta_model import NotAFamilyError
from vlm.models.vocabulary import find_vocabulary_head

CONNECTOR_WORDS = ("merger", "projector", "projection", "connector", "adapter", "aligner", "resampler")
"""Words in the names of modules that carry image features into the language model."""
IMAGE_INPUTS = ("pixel_values", "flattened_patches")
"""Main inputs of visual encoders: a second encoder beside the one that `get_encoder` names takes them too."""
SOUND_INPUTS = ("input_features", "input_values", "audio_values")
"""Main inputs of audio encoders."""
SOUND_WORDS = ("audio", "speech", "sound")
FEATURE_LAYER_KEYS = ("vision_feature_layer", "vision_feature_layers", "spatial_vision_layer")
"""Keys of configurations that say which hidden states of the visual encoder are read."""
LAYER_MAP_KEY = "deepstack_layer_map"
"""The key of pairs of a hidden state of the visual encoder and a layer of the language model that reads it."""


@dataclass
class DerivedParts:
    """The parts of a model as prefixes of its parameters' names (prefix -> part), and the prefixes of what is unused.

    A prefix that ends in a dot is a module's, any other one that of a parameter or buffer.
    """

    prefixes: dict[str, str] = field(default_factory=dict)
    unused_prefixes: list[str] = field(default_factory=list)


def derive_parts(model: PreTrainedModel, connectors: Sequence[str] = ()) -> DerivedParts:
    """Return the parts of a model; it may lie on the meta device.

    Args:
        model: the model.
        connectors: prefixes of what belongs to the connector by exception, within another part.

    Raises:
        NotAFamilyError: the model is no decoder-only vision-language model whose parts can be told apart.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder, encoder = model.get_decoder(), _get_image_encoder(model)
    check_decoder(model, decoder)
    parts = DerivedParts(dict.fromkeys(connectors, "connector"))
    decoder_name = names[id(decoder)]
    encoder_name = None if encoder is None else names[id(encoder)]
    inside = encoder_name is not None and (not decoder_name or encoder_name.startswith(f"{decoder_name}."))
    if inside and not connectors:
        raise NotAFamilyError(
            f"model_type={model.config.model_type}: its visual encoder ({encoder_name}) lies within its decoder "
            f"({decoder_name or 'the model'}), so that nothing says what joins them"
        )
    kinds = {id(decoder): "language_model"}
    kinds |= {} if encoder is None else {id(encoder): "visual_encoder"}
    vocabulary = (model.get_input_embeddings(), find_vocabulary_head(model))
    kinds |= {id(layer): "language_model" for layer in vocabulary if layer is not None and id(layer) not in kinds}
    for prefix, part, is_unused in _walk(model, "", kinds):
        parts.prefixes.setdefault(prefix, part)
        if is_unused:
            parts.unused_prefixes.append(prefix)
    if inside:
        parts.prefixes[f"{encoder_name}."] = "visual_encoder"
    for module in decoder.modules():
        if is_quantizer(module):
            prefix = f"{names[id(module)]}."
            parts.prefixes[prefix] = "visual_encoder"
            parts.unused_prefixes.append(prefix)
    if encoder is None and not {"connector", "visual_encoder"} & {*parts.prefixes.values()}:
        raise NotAFamilyError(
            f"model_type={model.config.model_type}: with this configuration it has no visual encoder and no connector"
        )
    if encoder is not None:
        has_connector = any(
            part == "connector" and prefix not in parts.unused_prefixes for prefix, part in parts.prefixes.items()
        )
        for prefix in () if has_connector else _find_inner_connectors(encoder, f"{encoder_name}."):
            parts.prefixes.setdefault(prefix, "connector")
    for prefix in [prefix for prefix, part in parts.prefixes.items() if part == "visual_encoder"]:
        if isinstance(tower := _get_module(model, prefix), PreTrainedModel):
            parts.unused_prefixes += _find_unread(tower, prefix, model.config)
    return parts


def check_decoder(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Raise NotAFamilyError where a model is no decoder-only language model that reads images."""
    config = model.config
    label = f"model_type={config.model_type}"
    configs = [config, getattr(decoder, "config", config)]
    if any(getattr(own, "is_encoder_decoder", False) for own in configs):
        raise NotAFamilyError(
            f"{label}: its text comes from an encoder-decoder; families are decoder-only models, whose replies are "
            "read behind their prompts"
        )
    if not model.can_generate():
        raise NotAFamilyError(f"{label}: it cannot generate text token by token in transformers")
    if not any(hasattr(owner, "get_image_features") for owner in (model, model.base_model)) and (
        _get_image_encoder(model) is None
    ):
        raise NotAFamilyError(
            f"{label}: it has no visual encoder by get_encoder(modality='image') and no get_image_features; such a "
            "model reads no images at tokens of its text"
        )
    if getattr(decoder, "config", None) is not None and getattr(decoder.config, "add_cross_attention", False):
        raise NotAFamilyError(
            f"{label}: its decoder reads the image by cross-attention only, not at tokens of its text"
        )
    if find_vocabulary_head(model) is None:
        raise NotAFamilyError(
            f"{label}: neither it nor a causal language model in it names a vocabulary head, at which the loss is taken"
        )


def _get_image_encoder(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that `get_encoder` names for images; None where it names none."""
    encoder = model.get_encoder(modality="image")
    return None if encoder is None or encoder is model or encoder is model.base_model else encoder


def _get_module(model: nn.Module, prefix: str) -> nn.Module | None:
    """Return the module of a prefix; None where it is that of a parameter."""
    return model.get_submodule(prefix.removesuffix(".")) if prefix.endswith(".") else None


def _walk(module: nn.Module, prefix: str, kinds: dict[int, str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (prefix, part, whether it is unused) of everything below a module, each as short as it can be.

    `kinds` is id of a module -> its part, for those that the model names.
    """
    for name, child in module.named_children():
        full = f"{prefix}{name}."
        part = kinds.get(id(child))
        if part is not None:
            yield full, part, False
        elif any(id(inner) in kinds for inner in child.modules()):
            yield from _walk(child, full, kinds)
        elif _reads_sound(name, child):
            yield full, "visual_encoder" if isinstance(child, PreTrainedModel) else "connector", True
        elif reads_images(child):
            yield full, "visual_encoder", is_quantizer(child)
        else:
            yield full, "connector", False
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    # Beside the vocabulary head, behind the body that has both parts, a tensor changes logits; within, image features.
    is_head = isinstance(module, PreTrainedModel) and module.base_model is not module
    yield from ((f"{prefix}{name}", "language_model" if is_head else "connector", False) for name, _ in own)


def reads_images(module: nn.Module) -> bool:
    """Return whether a module is a model of images by itself: a visual encoder, or a quantiser."""
    return is_quantizer(module) or (isinstance(module, PreTrainedModel) and module.main_input_name in IMAGE_INPUTS)


def is_quantizer(module: nn.Module) -> bool:
    """Return whether a module makes ids of the vocabulary of images: no gradient passes through it."""
    return isinstance(module, PreTrainedModel) and "VQVAE" in type(module).__name__


def _reads_sound(name: str, module: nn.Module) -> bool:
    named = any(word in name.lower() for word in SOUND_WORDS)
    return named or (isinstance(module, PreTrainedModel) and module.main_input_name in SOUND_INPUTS)


def _find_inner_connectors(encoder: nn.Module, prefix: str) -> Iterator[str]:
    """Yield prefixes of mergers and projectors directly within a visual encoder, of a model that has none outside it.

    Their names say that they are such. Beside a connector outside, they would join layers of the encoder.
    """
    for name, child in encoder.named_children():
        words = f"{name} {type(child).__name__}".lower()
        if any(word in words for word in CONNECTOR_WORDS) and any(True for _ in child.parameters()):
            yield f"{prefix}{name}."


def _find_unread(tower: PreTrainedModel, prefix: str, config: PreTrainedConfig) -> Iterator[str]:
    """Yield prefixes of what no feature of a visual encoder depends on.

    Those are heads that pool the image into one vector, and where the configuration selects hidden states, the layers
    behind the last selected one and the norm behind all layers.
    """
    for name, child in tower.named_modules():
        if type(child).__name__.endswith("PoolingHead"):
            yield f"{prefix}{name}."
    states = _list_selected(config)
    depth = getattr(tower.config, "num_hidden_layers", None)
    if not states or not isinstance(depth, int):
        return
    highest = max(state % (depth + 1) for state in states)  # state 0 precedes layer 0
    for name, child in tower.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            yield from (f"{prefix}{name}.{layer}." for layer in range(highest, depth))
            break
    if hasattr(tower, "post_layernorm"):
        yield f"{prefix}post_layernorm."


def _list_selected(config: PreTrainedConfig) -> list[int]:
    """Return the hidden states of the visual encoder that a configuration selects; none where it does not say."""
    states: list[int] = []
    for key in FEATURE_LAYER_KEYS:
        selected = getattr(config, key, None)
        if selected is not None:
            states += [selected] if isinstance(selected, int) else selected
    return [*states, *(state for state, _ in getattr(config, LAYER_MAP_KEY, None) or ())]
