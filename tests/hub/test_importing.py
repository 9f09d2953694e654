"""Foreign checkpoints become ones of this framework that compute the same."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel

import vlm
from tests.command_line import refusal
from tests.hub.foreign import (
    have_same_logits,
    tokenizer_with_image,
    transformers_llava,
    write_base,
    write_config,
    write_lora,
    write_original,
    write_projector,
    write_transformers,
)
from tests.tiny_parts import Parts, picture
from vlm.assembly.checkpoint import open_checkpoint
from vlm.cli.main import main
from vlm.config.recorded import read_recipe
from vlm.data.encoding.labels import read_template
from vlm.hub.importing import extend_rows, import_checkpoint
from vlm.models import VLMForConditionalGeneration, VLMProcessor


def loaded(folder: Path) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    found = vlm.load(folder, device="cpu")
    return found.model, found.processor


@pytest.mark.parametrize(
    ("form", "count", "tower"),
    [("bin", 3, True), ("bin", 1, False), ("safetensors", 2, False), ("safetensors", 1, True)],
    ids=str,
)
def test_an_original_checkpoint(parts: Parts, tmp_path: Path, form: str, count: int, tower: bool):
    theirs = transformers_llava(parts)
    if not tower:  # then the weights are those of the folder that mm_vision_tower names
        theirs.model.vision_tower.load_state_dict(_tower(parts))
    folder = write_original(tmp_path / "theirs", parts, theirs, form=form, count=count, tower=tower)
    import_checkpoint(str(folder), tmp_path / "ours")
    model, processor = loaded(tmp_path / "ours")
    assert have_same_logits(theirs, model, processor)
    assert processor.image_mode == "pad"
    assert processor.chat_template == read_template("v1")
    assert model.config.vision_config.num_hidden_layers == 2  # of 3: the last is never read
    assert model.config.text_config.vocab_size == 512  # 480 and <image>, filled up to 64
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "theirs"]


def _tower(parts: Parts) -> dict[str, torch.Tensor]:
    return CLIPVisionModel.from_pretrained(parts.encoder("clip")).state_dict()


def test_siglip_is_read_as_the_original_reads_it(parts: Parts, tmp_path: Path):
    """At -2 with every token, whatever the fields say."""
    theirs = transformers_llava(parts, "siglip")
    folder = write_original(tmp_path / "theirs", parts, theirs, encoder="siglip", mm_vision_select_layer=-1)
    import_checkpoint(str(folder), tmp_path / "ours")
    assert have_same_logits(theirs, *loaded(tmp_path / "ours"))


def test_a_projector_alone(parts: Parts, tmp_path: Path):
    theirs = transformers_llava(parts)
    theirs.model.vision_tower.load_state_dict(_tower(parts))
    base = write_base(tmp_path / "base", parts, theirs)
    write_projector(tmp_path / "projector", parts, theirs)
    import_checkpoint(str(tmp_path / "projector"), tmp_path / "ours", base_model=str(base))
    assert have_same_logits(theirs, *loaded(tmp_path / "ours"))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_a_lora_adapter_is_merged(parts: Parts, tmp_path: Path, options: dict):
    theirs = transformers_llava(parts)
    theirs.model.vision_tower.load_state_dict(_tower(parts))
    base = write_base(tmp_path / "base", parts, theirs)
    write_lora(tmp_path / "lora", parts, theirs, base, **options)
    import_checkpoint(str(tmp_path / "lora"), tmp_path / "ours", base_model=str(base))
    assert have_same_logits(theirs, *loaded(tmp_path / "ours"))


@pytest.mark.parametrize("do_pad", [True, False], ids=["pads", "square"])
def test_transformers_llava(parts: Parts, tmp_path: Path, do_pad: bool):
    theirs, processor = write_transformers(tmp_path / "theirs", parts, do_pad=do_pad)
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    model, ours = loaded(tmp_path / "ours")
    assert have_same_logits(theirs, model, ours)
    assert model.config.image_token_id == theirs.config.image_token_id
    theirs_pixels = processor(images=picture(), text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(ours.pixel_values([picture()]), theirs_pixels)
    settings = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert ours.tokenizer.eos_token_id in settings["eos_token_id"]


def test_start_and_end_tokens(parts: Parts, tmp_path: Path):
    theirs = transformers_llava(parts)
    folder = write_original(tmp_path / "theirs", parts, theirs, mm_use_im_start_end=True)
    tokenizer = tokenizer_with_image(parts.language_model("vicuna"))
    tokenizer.save_pretrained(folder)
    import_checkpoint(str(folder), tmp_path / "ours")
    processor = loaded(tmp_path / "ours")[1]
    around = processor.tokenizer.convert_ids_to_tokens(processor.image_token_ids())
    assert around == ["<im_start>", *["<image>"] * 9, "<im_end>"]


def test_linear_and_other_projectors(parts: Parts, tmp_path: Path):
    theirs = transformers_llava(parts)
    folder = write_original(tmp_path / "theirs", parts, theirs, mm_projector_type="linear")
    weights = torch.load(folder / "pytorch_model.bin")
    linear = {name: weights.pop(f"model.mm_projector.0.{name}") for name in ("weight", "bias")}
    weights = {name: value for name, value in weights.items() if "mm_projector" not in name}
    torch.save(
        weights | {f"model.mm_projector.{name}": value for name, value in linear.items()}, folder / "pytorch_model.bin"
    )
    import_checkpoint(str(folder), tmp_path / "ours")
    model, _ = loaded(tmp_path / "ours")
    assert torch.equal(model.connector.linear.weight, linear["weight"])


def test_new_rows_are_means_and_never_the_answer():
    table = torch.randn(10, 4)
    grown = extend_rows(table, 16)
    assert torch.equal(grown[:10], table)
    hidden = torch.randn(50, 4)
    assert bool(((hidden @ grown.T).argmax(1) < 10).all())


def test_the_result_is_a_checkpoint_to_train_from_and_to_ask(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write_original(tmp_path / "theirs", parts, transformers_llava(parts))
    main(["import", str(folder), str(tmp_path / "ours"), "--dtype", "bfloat16"])
    refusal_message = capsys.readouterr().out
    assert "9 tokens an image, image_mode=pad, torch.bfloat16" in refusal_message
    assert "Vicuna 1.1, as LLaVA-1.5" in refusal_message
    ours = str(tmp_path / "ours")
    checkpoint = open_checkpoint(ours)
    recipe = read_recipe(checkpoint.config.recipe)
    assert recipe.visual_encoder.hf_name == str(parts.encoder("clip"))
    assert recipe.language_model.hf_name == str(folder)
    assert recipe.connector.type == "mlp"
    assert open_checkpoint(ours).load_processor("plain", "square").image_mode == "square"
    model = checkpoint.load_model(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    picture().save(tmp_path / "picture.png")
    main(["generate", ours, "--image", str(tmp_path / "picture.png"), "--prompt", "What?", "--max-new-tokens", "3"])
    texts = [file.read_text() for file in (tmp_path / "ours").glob("*.json")]
    assert not any("parts/language_model" in text or ".ours-" in text for text in texts)


def test_the_model_code_travels_with_it(parts: Parts, tmp_path: Path):
    """The same files and classes as `save_pretrained` leaves, which load where this package is not installed."""
    folder = write_original(tmp_path / "theirs", parts, transformers_llava(parts))
    import_checkpoint(str(folder), tmp_path / "ours")
    model, processor = loaded(tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    files = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("ours", "again")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again")]
    assert configs[0] == configs[1]


class Evil:
    """A pickle that runs a command."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
def test_a_malicious_pickle_is_refused_and_leaves_nothing(parts: Parts, tmp_path: Path, zipped: bool):
    folder = write_original(tmp_path / "theirs", parts, transformers_llava(parts))
    harm = tmp_path / "harm"
    torch.save({"lm_head.weight": Evil(harm)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refusal_message = refusal("import", str(folder), str(tmp_path / "ours"))
    assert "is refused: it contains more than tensors, so loading it could run code" in refusal_message
    assert not harm.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


CHANGES = {
    "image_aspect_ratio": "anyres", "mm_projector_type": "qformer", "mm_vision_select_layer": None,
    "mm_vision_select_feature": "middle", "mm_vision_tower": "/no/where", "mm_resampler_type": "perceiver",
    "model_type": "llava_mpt",
}  # fmt: skip
EXPECTED_REFUSALS = {
    "image_aspect_ratio": "images in tiles are imported with mm_patch_merge_type=spatial_unpad",
    "mm_projector_type": "imported are linear, mlp<N>x_gelu and identity",
    "mm_vision_select_layer": "has no mm_vision_select_layer",
    "mm_vision_select_feature": "imported are patch, cls_patch",
    "mm_vision_tower": "name its folder with --vision-tower FOLDER",
    "mm_resampler_type": "have no matching connector",
    "model_type": "has model_type=llava_mpt; only the original",
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_cannot_be_imported_says_why(parts: Parts, tmp_path: Path, field: str):
    folder = write_original(tmp_path / "theirs", parts, transformers_llava(parts), **{field: CHANGES[field]})
    refusal_message = refusal("import", str(folder), str(tmp_path / "ours"))
    assert refusal_message.startswith("vlm import: ")
    assert EXPECTED_REFUSALS[field] in refusal_message
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["llava_next_video", "vipllava"])
def test_families_that_are_not_composed_are_refused_with_what_to_do(tmp_path: Path, kind: str):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    refusal_message = refusal("import", str(tmp_path), "ours")
    assert f"is a {kind}, which cannot be rebuilt from separate parts. `vlm models` lists" in refusal_message


def test_missing_shapes_and_surplus_are_named(parts: Parts, tmp_path: Path):
    folder = write_original(tmp_path / "theirs", parts, transformers_llava(parts))
    whole = torch.load(folder / "pytorch_model.bin")

    def refusal_message(**changes: torch.Tensor | None) -> str:
        weights = {**whole, **{name.replace("__", "."): value for name, value in changes.items()}}
        torch.save({n: v for n, v in weights.items() if v is not None}, folder / "pytorch_model.bin")
        return refusal("import", str(folder), str(tmp_path / "ours"))

    norm = "language_model.model.norm.weight"
    assert f"the source lacks 1 weights, such as {norm}" in refusal_message(model__norm__weight=None)
    assert f"{norm} has the shape (3,), but (32,) is needed" in refusal_message(model__norm__weight=torch.ones(3))
    assert "no place for these weights: 1 weights, such as image_newline.weight" in refusal_message(
        model__image_newline=torch.ones(32)
    )


def test_flags_that_are_missing_or_have_no_place(parts: Parts, tmp_path: Path):
    theirs = transformers_llava(parts)
    write_projector(tmp_path / "projector", parts, theirs)
    write_config(tmp_path / "empty", parts)
    base = write_base(tmp_path / "base", parts, theirs)
    lora = write_lora(tmp_path / "lora", parts, theirs, base)
    whole = write_original(tmp_path / "whole", parts, theirs)
    out = str(tmp_path / "ours")
    assert "is a projector alone: name its language model with --base-model" in refusal(
        "import", str(tmp_path / "projector"), out
    )
    assert f"It was trained on {base}" in refusal("import", str(lora), out)
    assert "contains no weights" in refusal("import", str(tmp_path / "empty"), out)
    assert "is complete; leave out --base-model=x" in refusal("import", str(whole), out, "--base-model", "x")
    assert "exists already and is not empty" in refusal("import", str(whole), str(lora))
    assert "no such folder" in refusal("import", "./nowhere", out)
    assert "llama" in refusal("import", str(base), out)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"init_lora_weights": "pissa"}], ids=str
)
def test_adapters_that_do_not_merge_as_a_sum_are_refused(parts: Parts, tmp_path: Path, change: dict):
    theirs = transformers_llava(parts)
    base = write_base(tmp_path / "base", parts, theirs)
    lora = write_lora(tmp_path / "lora", parts, theirs, base)
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | change))
    refusal_message = refusal("import", str(lora), str(tmp_path / "ours"), "--base-model", str(base))
    key, value = next(iter(change.items()))
    assert f"{key}={value}" in refusal_message
    assert "merge_and_unload" in refusal_message


def test_an_adapter_for_another_model_is_refused(parts: Parts, tmp_path: Path):
    theirs = transformers_llava(parts)
    base = write_base(tmp_path / "base", parts, theirs)
    lora = write_lora(tmp_path / "lora", parts, theirs, base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
    refusal_message = refusal("import", str(lora), str(tmp_path / "ours"), "--base-model", str(base))
    assert "no place" in refusal_message
    shutil.rmtree(base)
