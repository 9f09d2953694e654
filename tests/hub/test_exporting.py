"""Checkpoints in other forms: the names and fields are held, and what loads them computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
)
from transformers.utils.chat_template_utils import render_jinja_template

from tests.command_line import refusal
from tests.tiny_parts import Parts, picture
from vlm.cli.main import main
from vlm.hub.exporting import export_checkpoint
from vlm.hub.importing import import_checkpoint
from vlm.hub.templates import export_template, recover_template
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models import VLMForConditionalGeneration, VLMProcessor

LAYER = [
    *(f"self_attn.{name}_proj.{kind}" for name in "kqv" for kind in ("bias", "weight")),
    "self_attn.out_proj.bias", "self_attn.out_proj.weight", "layer_norm1.bias", "layer_norm1.weight",
    "layer_norm2.bias", "layer_norm2.weight", "mlp.fc1.bias", "mlp.fc1.weight", "mlp.fc2.bias", "mlp.fc2.weight",
]  # fmt: skip
TEXT_LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "kqvo"), "input_layernorm.weight", "post_attention_layernorm.weight",
    "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
]  # fmt: skip
CLIP = [
    "embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
    "pre_layrnorm.bias", "pre_layrnorm.weight", "post_layernorm.bias", "post_layernorm.weight",
    *(f"encoder.layers.{number}.{name}" for number in (0, 1) for name in LAYER),
]  # fmt: skip
TEXT = ["embed_tokens.weight", "norm.weight", *(f"layers.{number}.{name}" for number in (0, 1) for name in TEXT_LAYER)]
KEYS = {
    "llava": {
        *(f"vision_tower.vision_model.{name}" for name in CLIP),
        *(f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("bias", "weight")),
        *(f"language_model.model.{name}" for name in TEXT),
        "language_model.lm_head.weight",
    },
    "llava-original": {
        *(f"model.vision_tower.vision_tower.vision_model.{name}" for name in CLIP),
        *(f"model.mm_projector.{number}.{kind}" for number in (0, 2) for kind in ("bias", "weight")),
        *(f"model.{name}" for name in TEXT),
        "lm_head.weight",
    },
}
"""What a CLIP of two read layers and a Llama of two layers are called."""


def saved(parts: Parts, folder: Path, *names: str, **options: Any) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """A checkpoint of ours in `folder`, every weight and bias random."""
    model, processor = parts.model(*names, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("form", KEYS)
def test_the_names_of_weights_are_held(parts: Parts, tmp_path: Path, form: str):
    saved(parts, tmp_path / "clip", "clip", "llama", layer=-2, template="v1")
    export_checkpoint(
        str(tmp_path / "clip"), tmp_path / "out", form, vision_tower=None if form == "llava" else "my/clip"
    )
    assert set(weights(tmp_path / "out")) == KEYS[form]


CASES = {
    "vicuna-pad": (("clip", "vicuna"), {"layer": -2, "template": "v1", "image_mode": "pad"}),
    "llama-square": (("clip", "llama"), {"layer": -2, "template": "chatml"}),
    "cls": (("clip", "llama"), {"layer": -2, "template": "chatml", "strategy": "full"}),
    "cls+patch": (("clip", "llama"), {"layer": -3, "template": "chatml", "strategy": "cls+patch"}),
    "own-output": (("clip", "mistral"), {"template": "mistral"}),
    "embeddings": (("clip", "llama"), {"layer": 0, "template": "llama3"}),
    "siglip-tied": (("siglip", "tied_llama"), {"layer": -1, "template": "v1"}),
    "siglip-pad": (("siglip", "qwen2"), {"layer": -2, "template": "tokenizer", "image_mode": "pad"}),
    "silu-no-bias": (("clip", "qwen3"), {"layer": -2, "options": {"activation": "silu", "bias": False}}),
    "phi3": (("clip", "phi3"), {"layer": -2, "template": "phi"}),
    "gemma3": (("clip", "gemma3"), {"layer": -2, "template": "gemma"}),
}


WITHIN_SENTENCES = "with images within sentences become other token ids: this tokenizer joins texts across images"
DIFFERENCES = {"vicuna-pad": [f"conversations {WITHIN_SENTENCES}"]}
"""Case -> what is said of the export: Vicuna's slow tokenizer reads each text behind an image from its blank on."""


@pytest.mark.parametrize("case", CASES)
def test_transformers_answers_the_same(parts: Parts, tmp_path: Path, case: str):
    """Ids and pixels of its own processor, logits, and greedy tokens."""
    names, options = CASES[case]
    model, processor = saved(parts, tmp_path / "ours", *names, **options)
    assert export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava") == DIFFERENCES.get(case, [])
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert type(theirs) is LlavaForConditionalGeneration
    assert not any(info.values()), info
    reader = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert type(reader) is LlavaProcessor
    pictures = [picture(), picture(1, (20, 60))]
    content = [{"type": "image", "image": one} for one in pictures] + [{"type": "text", "text": "What is this?"}]
    given = reader.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    expected = VisionLanguageModel(model, processor).inputs([[user_turn("What is this?", 2)]], [pictures])
    assert given["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(given["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(**given).logits, model(**expected).logits, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(**given, **options), model.generate(**expected, **options))


def test_several_turns_and_a_system_turn_become_the_same_ids(parts: Parts, tmp_path: Path):
    """With a tokenizer that begins words at the start of a text alone, as Vicuna's does."""
    _, processor = saved(parts, tmp_path / "ours", "clip", "vicuna", layer=-2, template="v1")
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava")
    reader = AutoProcessor.from_pretrained(tmp_path / "theirs")
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nIs it like this?<image>\nSay so."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "<image><image>\nAnd these?"},
    ]
    rendered = reader.apply_chat_template(talk, add_generation_prompt=True)
    given = reader(images=[picture()] * 4, text=rendered, add_special_tokens=False)["input_ids"][0]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert list(given) == processor.tokenize(text)[0]


@pytest.mark.parametrize(
    ("names", "options", "kind"),
    [
        (("clip", "llama"), {"image_mode": "pad"}, LlavaImageProcessor),
        (("clip", "llama"), {"image_mode": "square"}, CLIPImageProcessor),
        (("siglip", "llama"), {"image_mode": "square"}, SiglipImageProcessor),
    ],
    ids=["pad", "square", "siglip"],
)
def test_fields_that_others_read(parts: Parts, tmp_path: Path, names: tuple, options: dict, kind: type):
    saved(parts, tmp_path / "ours", *names, layer=-2, template="chatml", **options)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    expected = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 320,
        "vision_feature_layer": -1, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "full" if names[0] == "siglip" else "default", "tie_word_embeddings": False,
        "dtype": "float32", "torch_dtype": "float32", "image_seq_length": 9,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    text, vision = config["text_config"], config["vision_config"]
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert text["vocab_size"] == 384
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert (vision["model_type"], vision["num_hidden_layers"]) == (f"{names[0]}_vision_model", 2)
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert type(processor.image_processor) is kind
    assert dict(processor.image_processor.crop_size) == {"height": 24, "width": 24}
    assert processor.num_additional_image_tokens == (0 if names[0] == "siglip" else 1)
    files = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert files == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    tokenizer = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it too
    assert "extra_special_tokens" not in tokenizer
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_answers_end_where_the_template_ends_them(parts: Parts, tmp_path: Path):
    _, processor = saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="llama3")
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava")
    settings = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>"])
    assert settings["eos_token_id"] == sorted(ends)


def test_scaled_positions_have_their_old_names_too(parts: Parts, tmp_path: Path):
    """transformers 4 reads `rope_theta` and `rope_scaling`, and would silently take its defaults."""
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava")
    text = json.loads((tmp_path / "theirs" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 500.0
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    again = AutoConfig.from_pretrained(tmp_path / "theirs").text_config
    assert again.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize("form", ["llava", "llava-original"])
@pytest.mark.parametrize("case", ["vicuna-pad", "siglip-pad", "cls+patch"])
def test_there_and_back_is_bit_equal(parts: Parts, tmp_path: Path, form: str, case: str):
    names, options = CASES[case]
    _, processor = saved(parts, tmp_path / "ours", *names, **options)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", form, largest_shard=30_000)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    _, back = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "back")
    before, after = weights(tmp_path / "ours"), weights(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert back.chat_template == processor.chat_template
    assert back.image_mode == processor.image_mode
    assert back.tokens_per_image == processor.tokens_per_image
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat?"}], add_generation_prompt=True)
    assert back.tokenize(text) == processor.tokenize(text)
    assert torch.equal(back.pixel_values([picture()]), processor.pixel_values([picture()]))


def test_the_original_layouts_fields(parts: Parts, tmp_path: Path):
    saved(parts, tmp_path / "clip", "clip", "qwen2", layer=-2, template="chatml", image_mode="pad")
    words = ["--format", "llava-original", "--vision-tower", "openai/clip-vit-large-patch14-336"]
    main(["export", str(tmp_path / "clip"), str(tmp_path / "theirs"), *words])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    expected = {
        "architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": 2, "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32, "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "image_token_index": 320,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert AutoConfig.from_pretrained(tmp_path / "theirs").hidden_size == 32


INCOMPATIBLE = [
    (("dinov2", "llama"), {}, ["model_type=dinov2"]),
    (("siglip", "llama"), {}, ["model.visual_encoder.feature_layer=null"]),
    (
        ("clip", "gemma2"),
        {"options": {"num_layers": 3, "hidden_dim": 8, "input_norm": True}, "strategy": "cls"},
        [
            "model.visual_encoder.feature_strategy=cls", "model.connector.type=mlp (", "num_layers=3",
            "input_norm=true", "hidden_dim=8: LLaVA's is the text width, 32", "final_logit_softcapping=30.0",
        ],
    ),
    (("clip", "llama"), {"connector": "linear"}, ["model.connector.type=linear"]),
    (("clip", "llama"), {"start": "<im_start>", "end": "<im_end>"}, ["image_start_token=<im_start>", "image_end"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "options", "reasons"), INCOMPATIBLE, ids=str)
def test_all_that_hinders_is_said_at_once(parts: Parts, tmp_path: Path, names: tuple, options: dict, reasons: list):
    saved(parts, tmp_path / "ours", *names, template="chatml", **options)
    words = ("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "llava")
    said = refusal(*words)
    assert "does not fit --format llava:\n  - " in said
    assert refusal(*words, "--check") == said
    assert [reason for reason in reasons if reason not in said] == []
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_a_checkpoint_that_fits_is_only_checked(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(parts, tmp_path / "ours", "clip", "llama", template="chatml")
    main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "llava", "--check"])
    assert capsys.readouterr().out == f"{tmp_path / 'ours'} fits --format llava. Nothing was written.\n"
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_what_the_original_has_no_place_for(parts: Parts, tmp_path: Path):
    options = {"options": {"activation": "silu", "bias": False}, "start": "<a>", "end": "<b>"}
    saved(parts, tmp_path / "ours", "siglip", "phi3", layer=-1, template="phi", **options)
    words = ["--format", "llava-original", "--vision-tower", "a/tower"]
    said = refusal("export", str(tmp_path / "ours"), str(tmp_path / "out"), *words)
    reasons = [
        "the original reads SigLIP at -2 alone", "an encoder by `clip` or `siglip` in its name", "activation=gelu",
        "bias=false", "model_type=phi3: the original has llama, qwen2, mistral", "<im_start> and <im_end>, or neither",
    ]  # fmt: skip
    assert [reason for reason in reasons if reason not in said] == []


def test_what_is_no_checkpoint_of_ours(parts: Parts, tmp_path: Path):
    other = str(parts.language_model("llama"))
    assert "is a llama checkpoint, which other programs load as it is" in refusal(
        "export", other, "out", "--format", "llava"
    )
    assert "its folder `final`" in refusal("export", str(tmp_path), "out", "--format", "llava")
    saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="v1")
    words = ["export", str(tmp_path / "ours")]
    assert "exists already" in refusal(*words, str(tmp_path), "--format", "llava")
    assert "by --format llava-original only" in refusal(*words, "out", "--format", "llava", "--vision-tower", "x")


def test_an_adapter_is_to_be_merged_first(tmp_path: Path):
    (tmp_path / "base.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "vlm"}')
    with pytest.raises(ValueError, match="is an adapter; merge it into its base first: vlm merge-lora"):
        export_checkpoint(str(tmp_path), tmp_path / "out", "llava")


@pytest.mark.parametrize("thinks", [False, True])
def test_an_exported_template_thinks_as_the_model_was_trained(thinks: bool):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %}<think>{% endif %}"
    exported = export_template(template, "<image>", space_after_image=False, thinks=thinks)
    rendered, _ = render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template=exported)
    assert rendered == ["hi<think>" if thinks else "hi"]
    assert recover_template(exported, "<image>") == template
