"""From `model.visual_encoder` to what is read of its encoders: sizes, layers and tokens, found out without weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessor,
    PreTrainedConfig,
    TimmWrapperImageProcessor,
)

from vlm.config.schema import EncoderConfig, VisualEncoderConfig
from vlm.models.configuration_vlm import encoder_names
from vlm.models.encoders import flatten_feature_map
from vlm.models.processing_vlm import VLMProcessor

EARLY_EXIT_TYPES = ("clip_vision_model", "siglip_vision_model")
"""Encoders whose `hidden_states[k]` is what `k` layers alone give: layers past the selected one are not built."""


@dataclass(frozen=True)
class EncoderInfo:
    """One encoder, looked at without weights.

    Attributes:
        reading: what is read of it, see `VLMConfig.readings`.
        num_patches: patches of one image.
        num_features: what is read of one image.
        width: of a feature.
        unread: names of parameters that the features do not depend on.
    """

    reading: dict[str, Any]
    num_patches: int
    num_features: int
    width: int
    unread: list[str]


def encoder_sources(given: VisualEncoderConfig) -> dict[str, EncoderConfig]:
    """The encoders in the order of their channels, under their keys in `model`."""
    extra = {f"visual_encoder.extra_encoders.{i}": encoder for i, encoder in enumerate(given.extra_encoders)}
    return {"visual_encoder": given, **extra}


def resolve_encoders(
    given: VisualEncoderConfig, configs: Sequence[PreTrainedConfig]
) -> tuple[dict[str, Any], list[Any], tuple[int, int]]:
    """Find out what the encoders give for one image; `configs` lose the layers that are not read.

    Args:
        given: `model.visual_encoder`.
        configs: of its encoders.

    Returns:
        Keyword arguments of `VLMConfig`, the image processors, and height and width of the pixels that they give.

    Raises:
        ValueError: a layer or a CLS token that there is not, or encoders that do not fit together.
    """
    sources = encoder_sources(given)
    for config in configs:
        if config.model_type == "siglip_vision_model":
            config.vision_use_head = False  # its pooled output is read by nobody here
    loaded = list(zip(sources.items(), configs, strict=True))
    processors = [_image_processor(part, source, config.model_type) for (part, source), config in loaded]
    sizes = [image_size(processor) for processor in processors]
    if len(set(sizes)) > 1:
        raise ValueError(_mismatch_message(sources, [f"{height} x {width} pixels" for height, width in sizes]))
    infos = [_inspect_encoder(part, source, config, sizes[0]) for (part, source), config in loaded]
    if len({one.num_features for one in infos}) > 1:
        raise ValueError(_mismatch_message(sources, [f"{one.num_features} features" for one in infos]))
    prefixes = [""] if len(infos) == 1 else [f"encoders.{i}." for i in range(len(infos))]
    values = {
        **dict(zip(encoder_names(len(configs)), configs, strict=True)),
        **infos[0].reading,
        "num_patches": infos[0].num_patches,
        "vision_dim": sum(one.width for one in infos),
        "beside": [one.reading for one in infos[1:]],
        "unread_parameters": [lead + name for lead, one in zip(prefixes, infos, strict=True) for name in one.unread],
    }
    return values, processors, sizes[0]


def _mismatch_message(sources: dict[str, EncoderConfig], given: Sequence[str]) -> str:
    """The message for encoders whose features cannot stand side by side."""
    shown = {part: "null" if source.image_size is None else source.image_size for part, source in sources.items()}
    each = ", ".join(
        f"{source.hf_name} (model.{part}.image_size={shown[part]}) {what}"
        for (part, source), what in zip(sources.items(), given, strict=True)
    )
    return (
        "model.visual_encoder: encoders side by side need pictures of one size and give equally many features: "
        f"{each}. Set the image_size of one that takes several sizes, such as DINOv2, and the same feature_strategy"
    )


SQUASHED = "squashes the picture to a square"


def check_views(processor: VLMProcessor) -> None:
    """Several encoders must see the same part of a picture, or features of different places would be one token.

    Raises:
        ValueError: one squashes the picture, another crops it, or crops more of it.
    """
    if processor.anyres is not None:
        return  # tiles are the same for all
    infos = [_describe_crop(steps, processor.image_mode) for steps in processor.image_processors]
    if len(set(infos)) > 1:
        side = image_size(processor.image_processor)[0]
        keys = ["visual_encoder", *(f"visual_encoder.extra_encoders.{i}" for i in range(len(processor.beside)))]
        each = ", ".join(f"model.{key} {what}" for key, what in zip(keys, infos, strict=True))
        cropped = [key for key, what in zip(keys, infos, strict=True) if what != SQUASHED]
        fixes = ", ".join(f"model.{key}.image_size={side}" for key in cropped)
        raise ValueError(
            f"the visual encoders would see different parts of a picture (dataset.image_mode={processor.image_mode}): "
            f"{each}. {fixes} squashes it there, too"
        )


def _describe_crop(steps: Any, image_mode: str) -> str:
    """What part of a picture an image processor leaves, in words."""
    if not getattr(steps, "do_center_crop", None):
        return SQUASHED
    kept = min(image_size(steps)) / (steps.size.shortest_edge or min(steps.size.height, steps.size.width))
    if kept >= 1 and (image_mode == "pad" or not steps.size.shortest_edge):
        return SQUASHED
    return f"keeps its middle, {kept:.0%} of the shorter side"


def image_size(image_processor: Any) -> tuple[int, int]:
    """Height and width of the pixels that an image processor gives."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", None) else image_processor.size
    if "height" not in size:
        raise ValueError(f"the visual encoder's image processor gives pictures of no fixed size: {size}")
    return size["height"], size["width"]


def _image_processor(part: str, source: EncoderConfig, model_type: str) -> Any:
    """The encoder's image processor, at the size asked for; timm's is rewritten as one that loads out of any folder."""
    if model_type == "timm_wrapper":
        processor = _timm_image_processor(part, source)
    else:
        processor = AutoImageProcessor.from_pretrained(
            source.hf_name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    if source.image_size is None:
        return processor
    size = {"height": source.image_size, "width": source.image_size}
    return type(processor).from_dict(
        {**processor.to_dict(), "size": size, "do_resize": True, "do_center_crop": False}
    )  # fmt: skip


def _timm_image_processor(part: str, source: EncoderConfig) -> CLIPImageProcessor:
    """What prepares pictures as timm does.

    Raises:
        ValueError: timm prepares pictures for it in a way that there is no such processor for.
    """
    processor = TimmWrapperImageProcessor.from_pretrained(source.hf_name, revision=source.revision or "main")
    data = processor.data_config
    height, width = data["input_size"][1:]
    scaled = {side: int(length / data["crop_pct"]) for side, length in (("height", height), ("width", width))}
    sizes = {"center": {"shortest_edge": min(scaled.values())}, "squash": scaled}
    if data["crop_mode"] not in sizes:
        raise ValueError(
            f"model.{part}.hf_name={source.hf_name}: timm's crop_mode={data['crop_mode']} is not supported; "
            f"supported are {', '.join(sizes)}"
        )
    return CLIPImageProcessor(
        size=sizes[data["crop_mode"]],
        crop_size={"height": height, "width": width},
        resample={"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[data["interpolation"]],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def _inspect_encoder(part: str, source: EncoderConfig, config: PreTrainedConfig, size: tuple[int, int]) -> EncoderInfo:
    """What an encoder gives for one image, by running it without weights; layers that are not read leave `config`.

    Raises:
        ValueError: a feature layer is out of range, the layers are maps of several sizes, or the strategy asks for a
            CLS token that there is not.
    """
    encoder, outputs = _dry_run(part, source, config, size)
    layers = None
    states = [outputs.last_hidden_state]
    if source.feature_layer is not None:
        layers = list(_resolve_layers(part, source, len(outputs.hidden_states)))
        if config.model_type in EARLY_EXIT_TYPES:
            config.num_hidden_layers = max(*layers, 1)
            encoder, outputs = _dry_run(part, source, config, size)
        states = [outputs.hidden_states[layer] for layer in layers]
    tokens = [flatten_feature_map(state) for state in states]
    if len({state.shape[1] for state in tokens}) > 1:
        raise ValueError(
            f"model.{part}.feature_layer={source.feature_layer}: these layers of {source.hf_name} have "
            f"{', '.join(str(state.shape[1]) for state in tokens)} features; choose layers that have equally many"
        )
    features = torch.cat(tokens, dim=2)  # (1, tokens, width)
    prefix = 0 if states[0].ndim == 4 else _prefix_tokens(encoder, features.shape[1], size)
    if "cls" in source.feature_strategy and prefix == 0:
        raise ValueError(
            f"model.{part}.feature_strategy={source.feature_strategy}: {source.hf_name} has no CLS token; "
            "allowed are patch and full"
        )
    patches = features.shape[1] - prefix
    counts = {"patch": patches, "cls+patch": patches + 1, "cls": 1, "full": patches + prefix}
    return EncoderInfo(
        reading={
            "feature_layer": layers if layers is None or isinstance(source.feature_layer, list) else layers[0],
            "feature_strategy": source.feature_strategy,
            "num_prefix_tokens": prefix,
        },
        num_patches=patches,
        num_features=counts[source.feature_strategy],
        width=features.shape[2],
        unread=_unread(encoder, features),
    )


def _resolve_layers(part: str, source: EncoderConfig, count: int) -> Iterator[int]:
    """The feature layers, counted from the front.

    Raises:
        ValueError: one is out of range.
    """
    given = source.feature_layer if isinstance(source.feature_layer, list) else [source.feature_layer]
    for layer in given:
        if not -count <= layer < count:
            raise ValueError(
                f"model.{part}.feature_layer={source.feature_layer}: {source.hf_name} has {count} hidden "
                f"states; allowed are {-count} to {count - 1}, or null for its own output"
            )
        yield layer % count


def _dry_run(part: str, source: EncoderConfig, config: PreTrainedConfig, size: tuple[int, int]) -> tuple[Any, Any]:
    """The encoder without weights, and what it gives for one image: shapes and dependencies, no numbers.

    Raises:
        ValueError: it does not take pictures of the size that is asked for.
    """
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, trust_remote_code=source.trust_remote_code)
        try:
            return encoder, encoder.eval()(torch.empty(1, 3, *size), output_hidden_states=True, return_dict=True)
        except (ValueError, RuntimeError, AssertionError) as error:
            if source.image_size is None:
                raise
            raise ValueError(
                f"model.{part}.image_size={source.image_size}: {source.hf_name} does not take pictures of that size: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _unread(encoder: Any, features: Tensor) -> list[str]:
    """Names of parameters that the features do not depend on."""
    named = dict(encoder.named_parameters())
    gradients = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
    return [name for name, slope in zip(named, gradients, strict=True) if slope is None]


def _prefix_tokens(encoder: Any, tokens: int, size: tuple[int, int]) -> int:
    """How many tokens (CLS, registers) stand before the patches."""
    if hasattr(encoder, "timm_model"):
        return encoder.timm_model.num_prefix_tokens
    patch = encoder.config.patch_size
    return tokens - (size[0] // patch) * (size[1] // patch)
