"""Makes a composed model read images at native resolution, if its parts support this.

Some encoders always do (SigLIP 2 with NaFlex, Qwen's vision towers); others (DINOv2, DINOv3, CLIP, SigLIP) do with
`dataset.image_mode=native`.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPImageProcessor, PreTrainedConfig, PreTrainedModel

from vlm.assembly.encoders import EARLY_EXIT_TYPES, load_image_processor, resolve_layers
from vlm.config.model_schema import ModelConfig, NativeConfig, Options, VisualEncoderConfig
from vlm.models.connector_parts import Connector
from vlm.models.connectors import CONNECTORS, square_side
from vlm.models.encoders import read_states
from vlm.models.native import NativeResolution
from vlm.models.native_encoders import forward_arguments, remove_merger
from vlm.models.pixels import ImageProcessor

NATIVE = "native"
"""The name in `dataset.image_mode`."""
NATIVE_ARGUMENTS = {"spatial_shapes", "grid_thw"}
"""Arguments of encoders that read images of different sizes in one call, and nothing else."""
TRIED_SQUARES = ((2, 3), (3, 1))
"""Rows and columns of merged squares of two images on which an encoder is tried without weights."""


def check_image_mode(config: PreTrainedConfig, visual_encoder: VisualEncoderConfig, image_mode: str | None) -> bool:
    """Return whether a composition reads images at native resolution.

    Args:
        config: the visual encoder's configuration.
        visual_encoder: the source of the encoder.
        image_mode: that of `DatasetConfig`; None leaves the choice to the encoder.

    Raises:
        ValueError: the encoder supports only native resolution, and another mode is requested; or transformers has no
            such encoder.
    """
    label = f"model.visual_encoder.hf_name={visual_encoder.hf_name}"
    encoder = AutoModel._model_mapping.get(type(config), None)
    if encoder is None:
        raise ValueError(
            f"{label}: transformers has no visual encoder of its own (AutoModel) for model_type={config.model_type}; "
            "choose another, such as model/visual_encoder=qwen2.5-vl-vit"
        )
    needs_it = encodes_sizes_together(config)
    if needs_it and image_mode not in (None, NATIVE):
        raise ValueError(
            f"dataset.image_mode={image_mode}: {label} (model_type={config.model_type}) reads images only at native "
            "resolution; dataset.image_mode=native, or null, is needed"
        )
    return needs_it or image_mode == NATIVE


def encodes_sizes_together(config: PreTrainedConfig) -> bool:
    """Return whether a visual encoder, by its configuration, reads images of different sizes in one call."""
    encoder = AutoModel._model_mapping.get(type(config), None)
    return isinstance(encoder, type) and bool(forward_arguments(encoder).keys() & NATIVE_ARGUMENTS)


def resolve_native(
    model: ModelConfig, config: PreTrainedConfig, options: Mapping[str, object]
) -> tuple[Options, ImageProcessor]:
    """Return keyword arguments of `VLMConfig`, `native` among them, and the image processor.

    Args:
        model: the composition.
        config: the visual encoder's configuration; layers that are not read are removed from it.
        options: those of the connector.

    Raises:
        ValueError: a part cannot read images at native resolution, or the bounds do not fit; names the key.
    """
    source = model.visual_encoder
    _check_keys(model)
    side = square_side(model.connector.type, options)
    if side is None:
        able = [name for name, kind in CONNECTORS.items() if _maps_native(kind)]
        raise ValueError(
            f"model.connector.type={model.connector.type}: with these options it reads squares of one size only, but "
            f"images at native resolution differ in size; allowed are {', '.join(able)}"
        )
    if config.model_type in ("siglip_vision_model", "siglip2_vision_model"):
        config.vision_use_head = False  # nothing reads its pooled output
    label = f"model.visual_encoder.hf_name={source.hf_name}"
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"{label}: dataset.image_mode=native needs an encoder of patches; patch_size={patch}")
    merge = getattr(config, "spatial_merge_size", 1)
    multiple = math.lcm(merge, side)
    layers, width, prefix, unread = _inspect(source, config, patch, multiple)
    queries = options.get("num_queries")
    values: Options = {
        "vision_config": config,
        "feature_layer": layers,
        "feature_strategy": "patch",
        "num_prefix_tokens": prefix,
        "vision_dim": width,
        "unread_parameters": unread,
        "native": _native_fields(model.native, patch, multiple, side, cast("int | None", queries)),
    }
    values["num_patches"] = values["native"]["max_patches"]
    return values, _plain_processor(load_image_processor("visual_encoder", source, config.model_type), patch * multiple)


def _maps_native(kind: type[nn.Module]) -> bool:
    """Return whether a connector reads images of any size; one of the user's own may be any module."""
    return issubclass(kind, Connector) and kind.map_native is not Connector.map_native


def _check_keys(model: ModelConfig) -> None:
    """Raise ValueError for keys that have no meaning at native resolution."""
    source = model.visual_encoder
    problems = {
        "model.visual_encoder.extra_encoders": bool(source.extra_encoders),
        f"model.visual_encoder.image_size={source.image_size}": source.image_size is not None,
        f"model.visual_encoder.feature_strategy={source.feature_strategy}": source.feature_strategy != "patch",
        "model.anyres.grids": bool(model.anyres.grids),
    }
    for key, is_problem in problems.items():
        if is_problem:
            raise ValueError(
                f"{key}: at native resolution (dataset.image_mode=native), a single encoder reads the "
                "patches of an image; leave it out"
            )


def _native_fields(
    bounds: NativeConfig, patch: int, multiple: int, side: int, num_queries: int | None
) -> dict[str, object]:
    """Return the fields of `NativeResolution`; raises ValueError if the bounds are none."""
    if bounds.min_tokens > bounds.max_tokens:
        raise ValueError(
            f"model.native.min_tokens={bounds.min_tokens}: at most max_tokens={bounds.max_tokens} is needed"
        )
    unit = side**2
    most = max(bounds.max_tokens * unit, multiple**2)
    return vars(NativeResolution(patch, multiple, side, bounds.min_tokens * unit, most, num_queries))


def _inspect(
    source: VisualEncoderConfig, config: PreTrainedConfig, patch: int, multiple: int
) -> tuple[int | list[int] | None, int, int, list[str]]:
    """Return layers, width, prefix tokens and unread parameters of an encoder, by running it without weights."""
    layers = None
    if getattr(config, "deepstack_visual_indexes", None):
        config.deepstack_visual_indexes = []  # features of earlier layers, for layers of Qwen3-VL's own language model
    if source.feature_layer is not None and hasattr(config, "num_hidden_layers"):
        layers = list(resolve_layers("visual_encoder", source, config.num_hidden_layers + 1))
        if config.model_type in EARLY_EXIT_TYPES or config.model_type == "siglip2_vision_model":
            config.num_hidden_layers = max(*layers, 1)
    read = layers if layers is None or isinstance(source.feature_layer, list) else layers[0]
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, trust_remote_code=source.trust_remote_code).eval()
        if "grid_thw" in forward_arguments(encoder):
            return None, _merged_width(source, encoder), 0, []
        grids = [(rows * multiple, columns * multiple) for rows, columns in TRIED_SQUARES]
        states = [_try_grid(source, encoder, grid, patch, read) for grid in grids]
    prefixes = [state.shape[1] - math.prod(grid) for state, grid in zip(states, grids, strict=True)]
    if len(set(prefixes)) > 1 or prefixes[0] < 0:
        raise ValueError(
            f"model.visual_encoder.hf_name={source.hf_name}: dataset.image_mode=native needs one feature per "
            f"patch, but images of {grids} patches have {[state.shape[1] for state in states]}"
        )
    named = dict(encoder.named_parameters())
    gradients = torch.autograd.grad(states[0].sum(), list(named.values()), allow_unused=True)
    unread = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    return read, states[0].shape[2], prefixes[0], unread


def _merged_width(source: VisualEncoderConfig, encoder: PreTrainedModel) -> int:
    """Return the width of the features of a vision tower with a merger, whose norm stays; it has one output."""
    if source.feature_layer is not None:
        raise ValueError(
            f"model.visual_encoder.feature_layer={source.feature_layer}: the features of {source.hf_name} are its "
            "output before its merger; null is needed"
        )
    remove_merger(encoder)
    return next(cast(nn.Module, encoder.merger).parameters()).shape[0]


def _try_grid(
    source: VisualEncoderConfig, encoder: nn.Module, grid: tuple[int, int], patch: int, layers: int | list[int] | None
) -> Tensor:
    """Return the features of an image of `grid` patches without numbers: `(1, tokens, V)`."""
    rows, columns = grid
    arguments = forward_arguments(encoder)
    inputs: dict[str, Tensor | bool | None] = {"pixel_values": torch.empty(1, 3, rows * patch, columns * patch)}
    if "spatial_shapes" in arguments:
        inputs = {
            "pixel_values": torch.empty(1, rows * columns, 3 * patch**2),
            "pixel_attention_mask": None,  # none is padding, which cannot be looked up without numbers
            "spatial_shapes": torch.tensor([grid], device="cpu"),
        }
    if "interpolate_pos_encoding" in arguments:
        inputs["interpolate_pos_encoding"] = True
    try:
        return read_states(encoder, inputs, layers)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"model.visual_encoder.hf_name={source.hf_name}: dataset.image_mode=native needs an encoder of "
            f"images of any size: {str(error).splitlines()[0]}"
        ) from error


def _plain_processor(processor: ImageProcessor, side: int) -> ImageProcessor:
    """Return an image processor that resizes and normalises like the encoder's own, which has other outputs."""
    plain = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        resample=processor.resample,
        rescale_factor=processor.rescale_factor,
        image_mean=list(processor.image_mean),
        image_std=list(processor.image_std),
    )
    return cast(ImageProcessor, plain)
