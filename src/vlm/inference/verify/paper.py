"""What vLLM and SGLang read of an export, written down from their source, and a check against it that runs neither.

The tables name the versions whose source was read. Names and shapes of weights are first held against transformers'
classes, whose names both engines take; here is what the engines do beyond that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from vlm.assembly.family import read_config
from vlm.assembly.model_kinds import is_composed_config
from vlm.hub.folders import JsonObject, read_json
from vlm.hub.readback import NATIVE, ORIGINAL, Readback
from vlm.hub.shards import read_meta_tensors, weight_files
from vlm.hub.targets import NATIVE_ARCHITECTURES, ORIGINAL_ARCHITECTURES
from vlm.models import VLMConfig

VLLM_VERSION = "0.33.0"
SGLANG_VERSION = "0.5.23"
"""The versions whose source the tables are from."""

VLLM_TEXT_MODELS = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "GemmaForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
"""Language models that vLLM has classes of its own for and that we compose with."""

VLLM_ACTIVATIONS = (
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish", "quick_gelu", "tanh",
)  # fmt: skip

VLLM_RENAMED_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
"""Prefix on disk -> in vLLM; other names are taken as they are."""

VLLM_MODULES = (
    "vision_tower.vision_model.",
    "multi_modal_projector.linear_1.",
    "multi_modal_projector.linear_2.",
    "language_model.model.",
    "language_model.lm_head.",
    "image_newline",
)
"""Where vLLM has weights."""

VLLM_ONEVISION_TILES = "anyres_max_9"
"""vLLM counts LLaVA-OneVision's tokens for this limit whatever the configuration says."""

SGLANG_PROJECTOR = {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
"""The names of a projector that SGLang places; those of `linear` and of other depths raise KeyError there."""


def check_for_vllm(folder: Path, config: VLMConfig | None) -> Iterator[str]:
    """Yield what vLLM would not serve as it was trained, of an export in a folder.

    Args:
        folder: an export to `llava`.
        config: the configuration of the checkpoint that it was made of; None for other models, of which nothing but
            LLaVA's classes is known here.
    """
    values = read_json(folder / "config.json")
    kind, architectures = values.get("model_type"), values.get("architectures") or [None]
    if kind not in NATIVE_ARCHITECTURES or NATIVE_ARCHITECTURES[kind] != architectures[0]:
        yield f"config.json: model_type={kind}, architectures={architectures}: on paper, only LLaVA's classes are known"
        return
    if config is not None:
        yield from _check_weights(folder, values, config, NATIVE)
    yield from _check_vllm_names(folder)
    yield from _check_vllm_fields(values)
    yield from _check_vllm_processor(folder, values)


def _check_weights(folder: Path, values: JsonObject, config: VLMConfig, readback: Readback) -> Iterator[str]:
    """Yield what transformers' classes, or those of LLaVA's parts, say of names and shapes."""
    if not (files := weight_files(folder)):
        yield f"{folder} contains no weights"
        return
    shapes: object = {name: tensor for file in files for name, tensor in read_meta_tensors(file).items()}
    yield from readback.find_problems(values, config, shapes)


def _check_vllm_names(folder: Path) -> Iterator[str]:
    names = [name for file in weight_files(folder) for name in read_meta_tensors(file)]
    renamed = {name: rename_for_vllm(name) for name in names}
    if lost := sorted(name for name, new in renamed.items() if not new.startswith(VLLM_MODULES)):
        yield f"{len(lost)} weights have names that match no module of vLLM, such as {lost[0]}"


def rename_for_vllm(name: str) -> str:
    """Return the name that vLLM gives a weight on disk."""
    for prefix, new in VLLM_RENAMED_PREFIXES.items():
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name


def _check_vllm_fields(values: JsonObject) -> Iterator[str]:
    vision, text = values["vision_config"], values["text_config"]
    encoder, strategy = vision.get("model_type"), values.get("vision_feature_select_strategy")
    if encoder not in ("clip_vision_model", "siglip_vision_model"):
        yield f"vision_config.model_type={encoder}: vLLM's LLaVA has clip_vision_model and siglip_vision_model"
    if strategy not in ("default", "full"):
        yield f"vision_feature_select_strategy={strategy}: vLLM has default and full"
    if encoder == "siglip_vision_model" and strategy == "default":
        yield "vision_feature_select_strategy=default: SigLIP has no CLS token, and the first patch would be dropped"
    layer, layers = values.get("vision_feature_layer"), vision["num_hidden_layers"]
    if not isinstance(layer, int) or not 0 <= (layer + layers + 1 if layer < 0 else layer) <= layers:
        yield f"vision_feature_layer={layer}: the encoder has {layers} layers"
    if (activation := values.get("projector_hidden_act")) not in VLLM_ACTIVATIONS:
        yield f"projector_hidden_act={activation}: vLLM has {', '.join(VLLM_ACTIVATIONS)}"
    architectures = text.get("architectures") or [None]
    if architectures[0] not in VLLM_TEXT_MODELS:
        yield f"text_config.architectures={architectures}: vLLM's own are {', '.join(VLLM_TEXT_MODELS)}"
    token, rows = values.get("image_token_index"), text.get("vocab_size", 0)
    if not isinstance(token, int) or not 0 <= token < rows:
        yield f"image_token_index={token}: the vocabulary has {rows} rows"
    if values["model_type"] == "llava_onevision" and values.get("vision_aspect_ratio") != VLLM_ONEVISION_TILES:
        yield (
            f"vision_aspect_ratio={values.get('vision_aspect_ratio')}: vLLM counts the tokens of an image for "
            f"{VLLM_ONEVISION_TILES} (train with model.anyres.max_tiles=9)"
        )


def _check_vllm_processor(folder: Path, values: JsonObject) -> Iterator[str]:
    processor: Any = AutoProcessor.from_pretrained(folder)
    vision = values["vision_config"]
    if processor.chat_template is None:
        yield "there is no chat template: vLLM would not render conversations"
    if getattr(processor, "patch_size", vision["patch_size"]) != vision["patch_size"]:
        yield f"the processor's patch_size={processor.patch_size} is not the encoder's, {vision['patch_size']}"
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if token != values["image_token_index"]:
        yield f"the processor's {processor.image_token} has the id {token}, not {values['image_token_index']}"
    if processor.vision_feature_select_strategy != values["vision_feature_select_strategy"]:
        yield (
            f"the processor has vision_feature_select_strategy={processor.vision_feature_select_strategy}, the model "
            f"{values['vision_feature_select_strategy']}: prompts would have another number of image tokens"
        )
    steps = processor.image_processor
    size = dict((steps.crop_size if getattr(steps, "do_center_crop", False) else None) or steps.size)
    sides = {size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))}
    if sides != {vision["image_size"]}:
        yield f"images become {sorted(map(str, sides))} pixels, and vLLM takes the encoder's, {vision['image_size']}"


def check_for_sglang(folder: Path, config: VLMConfig | None) -> Iterator[str]:
    """Yield what SGLang would not serve as it was trained; arguments as in `check_for_vllm`, of `llava-original`."""
    values = read_json(folder / "config.json")
    architectures = values.get("architectures") or [None]
    if architectures[0] not in ORIGINAL_ARCHITECTURES.values():
        names = ", ".join(ORIGINAL_ARCHITECTURES.values())
        yield f"config.json: architectures={architectures}: on paper, only {names} are known"
        return
    if config is not None:
        yield from _check_weights(folder, values, config, ORIGINAL)
    tower = str(values.get("mm_vision_tower"))
    if "clip" not in tower and "siglip" not in tower:
        yield f"mm_vision_tower={tower}: SGLang finds the encoder by clip or siglip in its name, as it is spelled there"
    names = {name for file in weight_files(folder) for name in read_meta_tensors(file) if "mm_projector" in name}
    if names != SGLANG_PROJECTOR:
        yield f"mm_projector_type={values.get('mm_projector_type')}: SGLang has a projector of two layers with biases"
    feature = values.get("mm_vision_select_feature")
    if "siglip" not in tower and feature != "patch":
        yield f"mm_vision_select_feature={feature}: SGLang reads the patches of CLIP, without CLS"
    has_newline = any(
        name == "model.image_newline" for file in weight_files(folder) for name in read_meta_tensors(file)
    )
    if has_newline != ("unpad" in str(values.get("mm_patch_merge_type"))):
        yield f"mm_patch_merge_type={values.get('mm_patch_merge_type')}: model.image_newline and unpad belong together"
    if values.get("model_type") != AutoConfig.for_model("llava").model_type:
        yield f"model_type={values.get('model_type')}: SGLang reads config.json as transformers' llava"


SGLANG_NOTES = (
    "SGLang computes the visual encoder in float16 and rounds pixels to it, whatever the checkpoint's precision",
    "SGLang renders conversations with the template that --chat-template names, and with the checkpoint's without it",
    "of several images SGLang reads the first alone, unless the request has modalities=multi-images",
)
"""What is known from the source, and what a reader of a check on paper has to know."""


def read_composed_config(checkpoint: Path) -> VLMConfig | None:
    """Return the configuration of a composed model; None for a family's."""
    config = read_config(str(checkpoint), str(checkpoint))
    return config if is_composed_config(config) else None
