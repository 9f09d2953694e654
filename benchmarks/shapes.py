"""Parts with the shapes of well-known models and random weights, composed by this framework and by transformers.

Speed and memory do not depend on the values of weights. `compose_model` returns this framework's model, `make_llava`
transformers' `LlavaForConditionalGeneration` with the same weights.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlm.assembly.compose import build_model, compose
from vlm.config.model_schema import ConnectorConfig, LanguageModelConfig, ModelConfig, VisualEncoderConfig
from vlm.demo.tiny_models import make_word_tokenizer
from vlm.models import VLMForConditionalGeneration

FEATURE_LAYER = -2
"""The hidden state of the encoder that is used, as in LLaVA."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a visual encoder and a language model.

    Attributes:
        side: the side of images, in pixels.
        patch: the side of a patch, in pixels.
        vision: hidden size, intermediate size, layers and heads of the encoder.
        vocabulary: number of tokens in the language model's vocabulary.
        text: hidden size, intermediate size, layers, heads and key-value heads of the language model.
        tied: whether embeddings and vocabulary head are tied.
    """

    side: int
    patch: int
    vision: tuple[int, int, int, int]
    vocabulary: int
    text: tuple[int, int, int, int, int]
    tied: bool = True

    @property
    def tokens_per_image(self) -> int:
        """Number of image tokens: one for each patch."""
        return (self.side // self.patch) ** 2

    def vision_config(self) -> CLIPVisionConfig:
        """Return the encoder's configuration."""
        width, intermediate, layers, heads = self.vision
        return CLIPVisionConfig(
            hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=self.side, patch_size=self.patch,
        )  # fmt: skip

    def text_config(self, positions: int = 2048, **ids: Any) -> LlamaConfig:
        """Return the language model's configuration; `ids` are those of special tokens."""
        width, intermediate, layers, heads, key_values = self.text
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_values, max_position_embeddings=positions,
            tie_word_embeddings=self.tied, **ids,
        )  # fmt: skip


SHAPES = {
    "smol": Shape(224, 16, (768, 3072, 12, 12), 49152, (576, 1536, 30, 9, 3)),
    "smol+clip-l": Shape(336, 14, (1024, 4096, 24, 16), 49152, (576, 1536, 30, 9, 3)),
    "vicuna": Shape(336, 14, (1024, 4096, 24, 16), 32000, (4096, 11008, 32, 32, 32), tied=False),
    "pairs": Shape(224, 16, (384, 1536, 12, 6), 8192, (384, 1024, 16, 6, 2)),
    "small": Shape(56, 14, (128, 256, 4, 4), 8192, (256, 768, 6, 4, 2)),
    "tiny": Shape(24, 8, (32, 64, 3, 2), 2304, (32, 64, 2, 2, 1)),
}
"""SmolLM2-135M with ViT-B/16 and with CLIP ViT-L/14-336; Vicuna-7B with CLIP ViT-L/14-336; ViT-S/16 with a language
model of 29 million parameters; one of 8 million parameters; one for tests."""


def write_parts(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Write `folder/visual_encoder` and `folder/language_model`, whose weights are drawn on a device."""
    torch.manual_seed(0)
    tokenizer = make_word_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.device(device):
        encoder = CLIPVisionModel(shape.vision_config())
        language_model = LlamaForCausalLM(shape.text_config(**ids))
    for part, name in ((encoder, "visual_encoder"), (language_model, "language_model")):
        torch.nn.Module.to(part, dtype=dtype)
        part.save_pretrained(folder / name)
    square = {"height": shape.side, "width": shape.side}
    CLIPImageProcessor(size={"shortest_edge": shape.side}, crop_size=square).save_pretrained(folder / "visual_encoder")
    tokenizer.save_pretrained(folder / "language_model")


def model_keys(folder: Path) -> list[str]:
    """Return the overrides with which a run composes these parts."""
    return [
        f"model.visual_encoder.hf_name={folder / 'visual_encoder'}",
        f"model.visual_encoder.feature_layer={FEATURE_LAYER}",
        f"model.language_model.hf_name={folder / 'language_model'}",
        "model.connector.type=mlp",
        "model.attn_implementation=sdpa",
    ]


def compose_model(folder: Path, seed: int) -> tuple[VLMForConditionalGeneration, Any]:
    """Return the initial model of a run with `model_keys` and this seed, in float32, and its processor."""
    model = ModelConfig(
        visual_encoder=VisualEncoderConfig(str(folder / "visual_encoder"), feature_layer=FEATURE_LAYER),
        connector=ConnectorConfig("mlp", {}),
        language_model=LanguageModelConfig(str(folder / "language_model")),
        attn_implementation="sdpa",
    )
    config, processor = compose(model, "chatml", None)
    return build_model(model, config, processor, torch.float32, seed), processor


NAMES = {
    "connector.layers.0": "model.multi_modal_projector.linear_1",
    "connector.layers.2": "model.multi_modal_projector.linear_2",
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
}
"""Modules of `compose_model` -> of `make_llava`."""


def make_llava(ours: VLMForConditionalGeneration, folder: Path) -> LlavaForConditionalGeneration:
    """Return the model of transformers with our weights, and with all layers of the encoder."""
    encoder = CLIPVisionModel.from_pretrained(folder / "visual_encoder")
    text = copy.deepcopy(ours.config.text_config)
    text.use_cache = False  # a cache would only slow training down
    config = LlavaConfig(
        vision_config=encoder.config, text_config=text,
        image_token_index=ours.config.image_token_id, vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(config)
    theirs.model.vision_tower.load_state_dict(encoder.state_dict())
    for mine, other in NAMES.items():
        theirs.get_submodule(other).load_state_dict(ours.get_submodule(mine).state_dict())
    theirs.tie_weights()
    return theirs
