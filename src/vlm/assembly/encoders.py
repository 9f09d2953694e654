"""Finds out, without weights, which features of `model.visual_encoder` are used: sizes, layers and tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from vlm.config.model_schema import EncoderConfig, VisualEncoderConfig
from vlm.models.configuration_vlm import encoder_names
from vlm.models.encoders import flatten_feature_map
from vlm.models.pixels import ImageProcessor
from vlm.models.processing_vlm import VLMProcessor

EARLY_EXIT_TYPES = ("clip_vision_model", "siglip_vision_model")
"""Encoders whose `hidden_states[k]` is the output of `k` layers, so that layers after the selected one are not
built."""


@dataclass(frozen=True)
class EncoderInfo:
    """Properties of one encoder, determined without weights."""

    selection: dict[str, object]
    """Which features are used, see `VLMConfig.feature_selections`."""
    num_patches: int
    num_features: int
    """The number of features of one image that are used."""
    width: int
    unread: list[str]
    """Names of parameters on which the features do not depend."""


def check_is_encoder(config: PreTrainedConfig, label: str) -> None:
    """Raise ValueError if a configuration is that of a language model, which reads no images."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{label}: model_type={config.model_type} is a language model, which reads no images. Choose an encoder, "
            f"such as model/visual_encoder=siglip-base-patch16-224; a language model is model.language_model.hf_name=…"
        )


def encoder_sources(config: VisualEncoderConfig) -> dict[str, EncoderConfig]:
    """Return the encoders in the order of their channels, by their keys in `model`."""
    extra = {f"visual_encoder.extra_encoders.{i}": encoder for i, encoder in enumerate(config.extra_encoders)}
    return {"visual_encoder": config, **extra}


def resolve_encoders(
    visual_encoder: VisualEncoderConfig, configs: Sequence[PreTrainedConfig]
) -> tuple[dict[str, Any], list[ImageProcessor]]:
    """Find out which features the encoders give for one image; unused layers are removed from `configs`.

    Returns keyword arguments of `VLMConfig`, and the image processors.
    Refuses a layer or a CLS token that does not exist, and encoders that do not fit together.
    """
    sources = encoder_sources(visual_encoder)
    for config in configs:
        if config.model_type == "siglip_vision_model":
            config.vision_use_head = False  # nothing reads its pooled output
    loaded = list(zip(sources.items(), configs, strict=True))
    processors = [load_image_processor(part, source, config.model_type) for (part, source), config in loaded]
    sizes = [image_size(processor) for processor in processors]
    _check_equal(sources, [f"{height} x {width} pixels" for height, width in sizes])
    infos = [_inspect_encoder(part, source, config, sizes[0]) for (part, source), config in loaded]
    _check_equal(sources, [f"{info.num_features} features" for info in infos])
    prefixes = [""] if len(infos) == 1 else [f"encoders.{i}." for i in range(len(infos))]
    unread = [prefix + name for prefix, info in zip(prefixes, infos, strict=True) for name in info.unread]
    values = {
        **dict(zip(encoder_names(len(configs)), configs, strict=True)),
        **infos[0].selection,
        "num_patches": infos[0].num_patches,
        "vision_dim": sum(info.width for info in infos),
        "beside": [info.selection for info in infos[1:]],
        "unread_parameters": unread,
    }
    return values, processors


def _check_equal(sources: dict[str, EncoderConfig], outputs: Sequence[str]) -> None:
    """Raise ValueError if encoders have different outputs, whose features cannot be concatenated."""
    if len(set(outputs)) == 1:
        return
    listing = ", ".join(
        f"{source.hf_name} (model.{part}.image_size={source.image_size or 'null'}) {output}"
        for (part, source), output in zip(sources.items(), outputs, strict=True)
    )
    raise ValueError(
        "model.visual_encoder: several encoders need images of the same size and the same number of features: "
        f"{listing}. Set the image_size of one that takes several sizes, such as DINOv2, and the same feature_strategy"
    )


SQUASHED = "squashes the image to a square"
"""The result of `_describe_crop` for an image processor that keeps the whole image."""


def check_views(processor: VLMProcessor) -> None:
    """Refuse encoders that see different parts of an image: features of different places would become one token."""
    if processor.anyres is not None or processor.native is not None:
        return  # tiles are the same for all, and one encoder reads images at native resolution
    crops = [_describe_crop(each, processor.image_mode) for each in processor.image_processors]
    if len(set(crops)) > 1:
        side = image_size(processor.image_processor)[0]
        extra = (f"model.visual_encoder.extra_encoders.{i}" for i in range(len(processor.beside)))
        views = list(zip(("model.visual_encoder", *extra), crops, strict=True))
        listing = ", ".join(f"{key} {crop}" for key, crop in views)
        fixes = ", ".join(f"{key}.image_size={side}" for key, crop in views if crop != SQUASHED)
        raise ValueError(
            f"the visual encoders would see different parts of an image (dataset.image_mode={processor.image_mode}): "
            f"{listing}. {fixes} squashes it there, too"
        )


def _describe_crop(image_processor: ImageProcessor, image_mode: str) -> str:
    """Describe which part of an image an image processor keeps."""
    if not getattr(image_processor, "do_center_crop", None):
        return SQUASHED
    size = image_processor.size
    share = min(image_size(image_processor)) / (size.shortest_edge or min(size.height, size.width))
    if share >= 1 and (image_mode == "pad" or not size.shortest_edge):
        return SQUASHED
    return f"keeps its middle, {share:.0%} of the shorter side"


def image_size(image_processor: ImageProcessor) -> tuple[int, int]:
    """Return height and width of the pixels that an image processor returns."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", None) else image_processor.size
    if "height" not in size:
        raise ValueError(f"the visual encoder's image processor has no fixed image size: {size}")
    return size["height"], size["width"]


def load_image_processor(part: str, source: EncoderConfig, model_type: str) -> ImageProcessor:
    """Return an encoder's image processor at the requested size; timm's as one that can be loaded from any folder."""
    processor: Any  # the classes of transformers declare the attributes of `ImageProcessor` less narrowly
    if model_type == "timm_wrapper":
        processor = _timm_image_processor(part, source)
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(
                source.hf_name, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.{part}.hf_name={source.hf_name}: no image processor can be loaded from it; a visual encoder "
                "needs a preprocessor_config.json next to its weights. Save it with "
                "image_processor.save_pretrained(FOLDER)"
            ) from error
    if source.image_size is None:
        return processor
    size = {"height": source.image_size, "width": source.image_size}
    changes = {"size": size, "do_resize": True, "do_center_crop": False}
    return type(processor).from_dict(processor.to_dict() | changes)


def _timm_image_processor(part: str, source: EncoderConfig) -> CLIPImageProcessor:
    """Return an image processor that prepares images as timm does; refuses crops of timm that have no counterpart."""
    from transformers import TimmWrapperImageProcessor  # imports timm, which is slow, and only timm's encoders need it

    processor = TimmWrapperImageProcessor.from_pretrained(source.hf_name, revision=source.revision or "main")
    data = processor.data_config
    height, width = data["input_size"][1:]
    crop = {"height": height, "width": width}
    scaled = {side: int(length / data["crop_pct"]) for side, length in crop.items()}
    sizes = {"center": {"shortest_edge": min(scaled.values())}, "squash": scaled}
    if data["crop_mode"] not in sizes:
        raise ValueError(
            f"model.{part}.hf_name={source.hf_name}: timm's crop_mode={data['crop_mode']} is not supported; "
            f"supported are {', '.join(sizes)}"
        )
    return CLIPImageProcessor(
        size=sizes[data["crop_mode"]],
        crop_size=crop,
        resample={"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[data["interpolation"]],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def _inspect_encoder(part: str, source: EncoderConfig, config: PreTrainedConfig, size: tuple[int, int]) -> EncoderInfo:
    """Run an encoder without weights on one image to find out its outputs; remove unused layers in `config`."""
    layers = None
    if source.feature_layer is not None and config.model_type in EARLY_EXIT_TYPES:
        layers = list(resolve_layers(part, source, config.num_hidden_layers + 1))
        config.num_hidden_layers = max(*layers, 1)
    encoder, outputs = _dry_run(part, source, config, size)
    states = [outputs.last_hidden_state]
    if source.feature_layer is not None:
        layers = layers or list(resolve_layers(part, source, len(outputs.hidden_states)))
        states = [outputs.hidden_states[layer] for layer in layers]
    tokens = [flatten_feature_map(state) for state in states]
    if len({state.shape[1] for state in tokens}) > 1:
        raise ValueError(
            f"model.{part}.feature_layer={source.feature_layer}: these layers of {source.hf_name} have "
            f"{', '.join(str(state.shape[1]) for state in tokens)} features; choose layers with the same number"
        )
    features = torch.cat(tokens, dim=2)  # (1, tokens, width)
    prefix = 0 if states[0].ndim == 4 else _prefix_tokens(encoder, features.shape[1], size)
    if "cls" in source.feature_strategy and prefix == 0:
        raise ValueError(
            f"model.{part}.feature_strategy={source.feature_strategy}: {source.hf_name} has no CLS token; "
            "allowed are patch and full"
        )
    named = dict(encoder.named_parameters())
    gradients = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
    patches = features.shape[1] - prefix
    counts = {"patch": patches, "cls+patch": patches + 1, "cls": 1, "full": patches + prefix}
    return EncoderInfo(
        selection={
            "feature_layer": layers if layers is None or isinstance(source.feature_layer, list) else layers[0],
            "feature_strategy": source.feature_strategy,
            "num_prefix_tokens": prefix,
        },
        num_patches=patches,
        num_features=counts[source.feature_strategy],
        width=features.shape[2],
        unread=[name for name, gradient in zip(named, gradients, strict=True) if gradient is None],
    )


def resolve_layers(part: str, source: EncoderConfig, count: int) -> Iterator[int]:
    """Yield the feature layers, counted from the front; raises ValueError if there is no such layer."""
    layers = source.feature_layer if isinstance(source.feature_layer, list) else [source.feature_layer]
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(
                f"model.{part}.feature_layer={source.feature_layer}: {source.hf_name} has {count} hidden "
                f"states; allowed are {-count} to {count - 1}, or null for its own output"
            )
        yield layer % count


def _dry_run(
    part: str, source: EncoderConfig, config: PreTrainedConfig, size: tuple[int, int]
) -> tuple[PreTrainedModel, Any]:
    """Return the encoder without weights, and its outputs for one image, which have shapes but no values."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, trust_remote_code=source.trust_remote_code)
        try:
            return encoder, encoder.eval()(torch.empty(1, 3, *size), output_hidden_states=True, return_dict=True)
        except (ValueError, RuntimeError, AssertionError) as error:
            if source.image_size is None:
                raise
            raise ValueError(
                f"model.{part}.image_size={source.image_size}: {source.hf_name} does not accept images of this size: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _prefix_tokens(encoder: Any, tokens: int, size: tuple[int, int]) -> int:
    """Return the number of tokens (CLS, registers) before the patches."""
    if hasattr(encoder, "timm_model"):
        return encoder.timm_model.num_prefix_tokens
    patch = encoder.config.patch_size
    return tokens - (size[0] // patch) * (size[1] // patch)
