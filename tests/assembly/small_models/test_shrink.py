"""Small configurations of large ones: narrow, of every kind of layer, for the same processor."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, Gemma3nConfig, LlavaConfig, Qwen3VLConfig

from vlm.assembly.small_models.fields import walk
from vlm.assembly.small_models.shrink import build_on_meta, shrink

FAMILIES = ("gemma3", "glm4v", "llama4", "llava_next", "mllama", "qwen2_5_vl", "qwen3_5", "qwen3_vl_moe", "vipllava")
KEPT = ("vocab_size", "patch_size", "image_size", "spatial_merge_size", "temporal_patch_size", "image_token_id")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_small_model_keeps_what_tokens_and_pixels_depend_on(model_type: str):
    config = CONFIG_MAPPING[model_type]()
    before = config.to_dict()
    small = shrink(config)
    assert config.to_dict() == before
    for large, new in zip(walk(config), walk(small), strict=True):
        assert type(large) is type(new)
        for name in KEPT:
            assert getattr(large, name, None) == getattr(new, name, None), name
    model = build_on_meta(small)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    assert sum(weight.numel() for weight in model.parameters()) < 2 * 64 * vocabulary + 4_000_000


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_small_configuration_is_saved_and_read_again(model_type: str):
    small = shrink(CONFIG_MAPPING[model_type]())
    again = type(small).from_dict(small.to_dict())
    assert again.to_dict() == small.to_dict()
    shapes = {name: weight.shape for name, weight in build_on_meta(small).named_parameters()}
    assert {name: weight.shape for name, weight in build_on_meta(again).named_parameters()} == shapes


def test_every_kind_of_layer_stays():
    config = Qwen3VLConfig()
    small = shrink(config)
    assert len(config.vision_config.deepstack_visual_indexes) == 3
    assert small.vision_config.depth == 2
    assert list(small.vision_config.deepstack_visual_indexes) == [1]
    gemma = shrink(Gemma3nConfig()).text_config
    own = len(gemma.layer_types) - gemma.num_kv_shared_layers
    for kinds in (gemma.layer_types[:own], gemma.layer_types[own:]):  # those that share keys and values come last
        assert set(kinds) == {"sliding_attention", "full_attention"}


def test_rotary_sections_fill_the_narrow_heads():
    config = Qwen3VLConfig()
    config.text_config.rope_parameters["mrope_section"] = [24, 20, 20]
    small = shrink(config).text_config
    assert small.head_dim == 16
    assert small.rope_parameters["mrope_section"] == [3, 3, 2]


def test_layers_that_count_from_the_last_stay():
    config = LlavaConfig(vision_feature_layer=[-2, -5, 3])
    small = shrink(config)
    assert small.vision_config.num_hidden_layers == 5
    assert small.vision_feature_layer[:2] == [-2, -5]


def test_a_small_model_answers_a_text():
    model = AutoModelForImageTextToText.from_config(shrink(Qwen3VLConfig()), dtype=torch.float32)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 151936)


def test_what_cannot_be_built_is_refused_with_every_attempt():
    config = CONFIG_MAPPING["deepseek_ocr2"]()
    with pytest.raises(ValueError, match=r"model_type=deepseek_ocr2: no small model of it can be built: width 64: "):
        shrink(config)


def test_a_trial_chooses_the_sizes():
    def trial(config: object) -> None:
        if config.text_config.hidden_size < 100:
            raise ValueError("too narrow")

    assert shrink(Qwen3VLConfig(), trial).text_config.hidden_size == 128
