"""The visual encoder and the connector as llama.cpp's `mmproj` file, which its LLaVA code (`clip.cpp`) reads."""

import math
import re
from collections.abc import Iterator

import gguf
import torch

from vlm.assembly.encoders import image_size
from vlm.hub.gguf.tensors import PlannedTensor, StoredType, choose_stored_type
from vlm.models import VLMConfig, VLMProcessor

ENCODER = "siglip_vision_model"
"""The encoder that llama.cpp's LLaVA code computes as transformers does.

It puts CLIP's class token behind the patches, so that each has the position of the one before, and then drops the first
patch in place of the class (llama.cpp of October 2026; `test_llama_cpp_still_misreads_clip` watches it). Positions
could be moved in the file, but no file gives back the patch that the graph drops.
"""
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
"""Activations that llama.cpp computes alike, by the approximation with tanh."""

ACTIVATION_FLAGS = {"quick_gelu": (False, False), "silu": (False, True), **dict.fromkeys(GELUS, (True, False))}
"""An encoder's `hidden_act` -> llama.cpp's `use_gelu`, `use_silu`."""

PROJECTORS = {"mlp": "mlp", "ldp_v2": "ldpv2"}
"""`model.connector.type` -> llama.cpp's `projector_type`."""

MOBILE_SIDE = 24
"""Side of the grid of features that llama.cpp's `ldpv2` reads."""

FEATURE_LAYER = "clip.vision.feature_layer"
"""llama.cpp's key for the layers that are read, for which the package `gguf` has no constant."""

CONNECTOR_NAMES = {
    "mlp": ((r"layers\.(\d+)\.(\w+)", r"mm.\1.\2"),),
    "ldp_v2": (
        (r"layers\.(\d)\.(\w+)", r"mm.model.mlp.\1.\2"),
        (r"positions\.(\w+)", r"mm.model.peg.0.\1"),
    ),
}
"""`model.connector.type` -> patterns of our names, and llama.cpp's."""


def find_incompatibilities(config: VLMConfig, processor: VLMProcessor) -> Iterator[str]:
    """Yield why llama.cpp's LLaVA code cannot see images as the model does."""
    yield from _encoder_incompatibilities(config)
    yield from _connector_incompatibilities(config)
    if processor.anyres is not None:
        yield "model.anyres: llama.cpp lays tiles one behind the other, without image_newline"
    if processor.native is not None:
        yield "dataset.image_mode=native: llama.cpp's LLaVA has images of one size"
    for name in ("image_start", "image_end"):
        if token := getattr(processor, name):
            yield f"model.{name}_token={token}: llama.cpp's LLaVA has no tokens around an image"
    height, width = image_size(processor.image_processor)
    if height != width:
        yield f"images of {width} x {height}: llama.cpp's LLaVA has squares"


def _encoder_incompatibilities(config: VLMConfig) -> Iterator[str]:
    vision, encoder = config.vision_config, "model.visual_encoder"
    if config.beside:
        yield f"{encoder}.extra_encoders: several encoders side by side, and llama.cpp has one"
    if vision.model_type == "clip_vision_model":
        yield (
            f"a visual encoder of model_type={vision.model_type}: llama.cpp's LLaVA drops the first patch in place of "
            f"CLIP's class token, and shifts the positions; possible is {ENCODER}"
        )
    elif vision.model_type != ENCODER:
        yield f"a visual encoder of model_type={vision.model_type}: possible is {ENCODER}"
        return
    layers = read_layers(config)
    if layers != sorted(set(layers)):
        yield f"{encoder}.feature_layer={layers}: llama.cpp joins several layers from the lowest to the highest"
    is_whole = config.feature_strategy == "full" and not config.num_prefix_tokens
    if config.feature_strategy != "patch" and not is_whole:
        yield f"{encoder}.feature_strategy={config.feature_strategy}: llama.cpp's LLaVA reads the patches alone"
    if vision.hidden_act not in ACTIVATION_FLAGS:
        yield f"an encoder with hidden_act={vision.hidden_act}: possible are {', '.join(ACTIVATION_FLAGS)}"
    if vision.to_dict().get("quantization_config"):
        yield "a quantised encoder: export the checkpoint before it was quantised"


def _connector_incompatibilities(config: VLMConfig) -> Iterator[str]:
    kind, options = config.connector["type"], config.connector["options"]
    if kind not in PROJECTORS:
        yield f"model.connector.type={kind}: possible are {', '.join(PROJECTORS)}"
        return
    if options.get("input_norm"):
        yield "model.connector.options.input_norm=true: llama.cpp's projector has no norm"
    if kind == "mlp":
        if options["num_layers"] != 2:
            yield f"model.connector.options.num_layers={options['num_layers']}: llama.cpp's mlp has 2"
        if options["activation"] not in GELUS:
            yield f"model.connector.options.activation={options['activation']}: llama.cpp's mlp has gelu"
        return
    if config.num_patches != MOBILE_SIDE**2:
        side = math.isqrt(config.num_patches)
        yield f"model.connector.type={kind} on a grid of {side} x {side}: llama.cpp has 24 x 24"
    if kind == "ldp_v2" and options["output_side"] != MOBILE_SIDE // 2:
        yield f"model.connector.options.output_side={options['output_side']}: llama.cpp's ldpv2 makes 12 x 12 tokens"


def find_differences(config: VLMConfig, processor: VLMProcessor) -> Iterator[str]:
    """Yield where llama.cpp's images differ from the processor's."""
    padding = "" if processor.image_mode == "pad" else f", while dataset.image_mode={processor.image_mode} does not"
    yield (
        "llama.cpp pads images to squares in CLIP's mean colour and resizes them in its own way"
        f"{padding}: pixels of images that are not {image_size(processor.image_processor)[0]} x "
        f"{image_size(processor.image_processor)[1]} differ"
    )
    activations = {config.vision_config.hidden_act, config.connector["options"].get("activation", "gelu")}
    if "gelu" in activations:
        yield "llama.cpp approximates gelu by tanh: what a unit gives differs by up to 0.0005"


def read_layers(config: VLMConfig) -> list[int]:
    """Return the hidden states that are read; the encoder's own output is the last one's."""
    if config.feature_layer is None:
        return [config.vision_config.num_hidden_layers]
    return config.feature_layer if isinstance(config.feature_layer, list) else [config.feature_layer]


def normalises_output(config: VLMConfig) -> bool:
    """Return whether the encoder's norm behind the last layer belongs to the features: SigLIP's own output."""
    return config.feature_layer is None and config.vision_config.model_type == "siglip_vision_model"


def add_mmproj(writer: gguf.GGUFWriter, config: VLMConfig, processor: VLMProcessor) -> None:
    """Write the settings of the encoder and the connector."""
    vision: object = config.vision_config
    steps: object = processor.image_processor
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTORS[config.connector["type"]])
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(image_size(steps)[0])
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(max(*read_layers(config), 1))
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_array(FEATURE_LAYER, read_layers(config))
    use_gelu, use_silu = ACTIVATION_FLAGS[vision.hidden_act]
    writer.add_vision_use_gelu(use_gelu)
    writer.add_vision_use_silu(use_silu)
    writer.add_vision_image_mean([float(value) for value in steps.image_mean])
    writer.add_vision_image_std([float(value) for value in steps.image_std])


def plan_mmproj(
    config: VLMConfig, weights: dict[str, tuple[str, tuple[int, ...]]], wanted: StoredType
) -> Iterator[PlannedTensor]:
    """Yield the tensors of the file; norms and layers that the features do not depend on are left out.

    Args:
        config: the model's configuration.
        weights: our name -> the name in the checkpoint, and the shape.
        wanted: how matrices are stored.
    """
    depth = max(*read_layers(config), 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, depth)
    for ours, (source, shape) in weights.items():
        part, _, rest = ours.partition(".")
        if part == "connector":
            name = _connector_name(config.connector["type"], rest)
        elif _is_unread(rest, depth, config):
            continue
        else:
            name = names.get_name(f"vision_tower.vision_model.{rest}", try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"llama.cpp has no name for the weight {ours}")
        yield PlannedTensor(name, source, shape, choose_stored_type(name, shape, wanted))
    if config.connector["type"] == "mlp" and not config.connector["options"]["bias"]:
        for layer, width in ((0, weights["connector.layers.0.weight"][1][0]), (2, config.text_config.hidden_size)):
            yield PlannedTensor(f"mm.{layer}.bias", None, (width,), StoredType.F32, value=torch.zeros(width))


def _is_unread(name: str, depth: int, config: VLMConfig) -> bool:
    """Return whether an encoder's weight has no effect on the features."""
    if name.startswith("post_layernorm."):
        return not normalises_output(config)
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    return name.startswith("head.") or (layer is not None and int(layer[1]) >= depth)


def _connector_name(kind: str, name: str) -> str | None:
    """Return llama.cpp's name of a connector's weight; None where there is none."""
    for pattern, theirs in CONNECTOR_NAMES[kind]:
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs)
    return None
