"""Checkpoints as other code bases write them, made of tiny parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from tests.tiny_parts import Parts, picture
from vlm.models import VLMForConditionalGeneration, VLMProcessor

TEXT = "what <image> is in it?"

ORIGINAL_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.image_newline": "model.image_newline",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def transformers_llava(parts: Parts, encoder: str = "clip", language_model: str = "vicuna") -> Any:
    """transformers' LLaVA with random weights, read at layer -2; its vocabulary has an image token at its end."""
    text = AutoConfig.from_pretrained(parts.language_model(language_model))
    image_token = text.vocab_size
    text.vocab_size += 64
    vision = AutoConfig.from_pretrained(parts.encoder(encoder))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-2,
        vision_feature_select_strategy="default" if encoder == "clip" else "full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def original_weights(model: Any, *, tower: bool = True) -> dict[str, Tensor]:
    """The model's weights under the original LLaVA's names, without rows for an image token."""
    found = {}
    for name, value in model.state_dict().items():
        prefix = next(prefix for prefix in ORIGINAL_NAMES if name.startswith(prefix))
        if tower or "vision_tower" not in name:
            found[ORIGINAL_NAMES[prefix] + name.removeprefix(prefix)] = value
    rows = model.config.image_token_id
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = found[name][:rows].clone()
    return found


def write_config(
    folder: Path, parts: Parts, encoder: str = "clip", language_model: str = "vicuna", **fields: Any
) -> None:
    """`config.json` as LLaVA-1.5 has it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads((parts.language_model(language_model) / "config.json").read_text())
    values |= {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "use_mm_proj": True,
        "mm_vision_tower": str(parts.encoder(encoder)), "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False, "image_grid_pinpoints": None, "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": False, "rope_theta": 10000.0, "torch_dtype": "float32", **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """All that belongs to a tokenizer."""
    for file in source.glob("*token*"):
        shutil.copyfile(file, folder / file.name)


def write_shards(folder: Path, weights: dict[str, Tensor], form: str, count: int) -> None:
    """`form` is `bin` or `safetensors`."""
    stem, end = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names, weight_map = list(weights), {}
    for number in range(count):
        file = f"{stem}.{end}" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.{end}"
        part = {name: weights[name].contiguous() for name in names[number::count]}
        weight_map |= dict.fromkeys(part, file)
        if form == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    if count > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_original(
    folder: Path, parts: Parts, model: Any, *, form: str = "bin", count: int = 1, tower: bool = True,
    encoder: str = "clip", language_model: str = "vicuna", **fields: Any,
) -> Path:  # fmt: skip
    """A whole checkpoint of the original LLaVA."""
    write_config(folder, parts, encoder, language_model, **fields)
    copy_tokenizer(parts.language_model(language_model), folder)
    weights = original_weights(model, tower=tower)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as older versions saved
    write_shards(folder, weights, form, count)
    return folder


def write_transformers(folder: Path, parts: Parts, *, do_pad: bool = True) -> tuple[Any, LlavaProcessor]:
    """A checkpoint of transformers' LLaVA with tied embeddings; the model and its processor."""
    model = transformers_llava(parts, language_model="tied_llama")
    model.save_pretrained(folder)
    images = LlavaImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_pad=do_pad
    )  # fmt: skip
    processor = LlavaProcessor(
        images, tokenizer_with_image(parts.language_model("tied_llama")), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return model, processor


def write_base(folder: Path, parts: Parts, model: Any) -> Path:
    """The language model of a LLaVA in its own folder."""
    language_model = LlamaForCausalLM(AutoConfig.from_pretrained(parts.language_model("vicuna")))
    weights = {n: v for n, v in original_weights(model, tower=False).items() if not _is_multimodal(n)}
    language_model.load_state_dict(weights)
    language_model.save_pretrained(folder)
    copy_tokenizer(parts.language_model("vicuna"), folder)
    return folder


def _is_multimodal(name: str) -> bool:
    return "mm_projector" in name or "image_newline" in name


def write_projector(folder: Path, parts: Parts, model: Any) -> Path:
    """What the original's first stage leaves."""
    write_config(folder, parts)
    weights = {name: value for name, value in original_weights(model).items() if "mm_projector" in name}
    torch.save(weights, folder / "mm_projector.bin")
    return folder


def write_lora(folder: Path, parts: Parts, model: Any, base: Path, **options: Any) -> Path:
    """What the original's LoRA stage leaves, written by peft; `model` becomes what it stands for.

    The projector of `model` is in `non_lora_trainables.bin`.
    """
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **options),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    write_config(folder, parts)
    weights = {f"base_model.model.{n}": v for n, v in original_weights(model).items() if _is_multimodal(n)}
    torch.save(weights, folder / "non_lora_trainables.bin")
    merged = adapted.merge_and_unload()
    model.model.language_model.layers.load_state_dict(merged.model.layers.state_dict())
    return folder


def have_same_logits(theirs: Any, ours: VLMForConditionalGeneration, processor: VLMProcessor) -> bool:
    """Whether all logits of the rows that both have agree to 1e-5, on a text with a picture."""
    inputs = processor(images=[picture()], text=TEXT)
    mine = ours.eval()(**inputs).logits
    inputs["input_ids"][inputs["input_ids"] == processor.image_token_id] = theirs.config.image_token_id
    other = theirs.eval()(**inputs).logits
    rows = theirs.config.image_token_id
    assert other.std() > 1e-2, "logits that tell something"
    return torch.allclose(mine[..., :rows], other[..., :rows], atol=1e-5)


def tokenizer_with_image(folder: Path) -> Any:
    """A tokenizer that knows `<image>`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return tokenizer
