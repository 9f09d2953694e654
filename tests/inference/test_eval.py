"""The names that LLaVA's users know, and adapters whose base moved, asked in every way."""

import argparse
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from tests.command_line import refusal
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts, picture
from vlm.assembly.adapter_base import BASE_FILE
from vlm.cli.main import main
from vlm.config.shown import printable
from vlm.data.encoding.labels import read_template
from vlm.inference.eval import eval_model, load_pretrained_model, split_image_paths


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "final"
    ours = make_random_model(parts, "llama", template="chatml")
    ours.model.save_pretrained(folder)
    ours.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    return [tmp_path / "0.png", tmp_path / "1.png"]


def make_args(checkpoint: Path, **fields: Any) -> Any:
    """Arguments as LLaVA's users make them."""
    return type("Args", (), {"model_path": str(checkpoint), "query": "what?", **fields})()


# eval_model


def test_all_fields_as_llavas_users_give_them(checkpoint: Path, images: list[Path], capsys: pytest.CaptureFixture[str]):
    args = make_args(
        checkpoint, model_base=None, model_name="llava-v1.5-7b", conv_mode=None, image_file=str(images[0]), sep=",",
        temperature=0, top_p=None, num_beams=1, max_new_tokens=6,
    )  # fmt: skip
    answer = eval_model(args)
    assert capsys.readouterr().out == printable(f"{answer}\n")
    assert answer == vlm.load(checkpoint).generate("what?", [images[0]], max_new_tokens=6)


def test_what_is_missing_takes_its_default(checkpoint: Path):
    assert eval_model(argparse.Namespace(model_path=str(checkpoint), query="what?")) == vlm.load(checkpoint).generate(
        "what?"
    )


@pytest.mark.parametrize("separator", [",", ";"])
def test_several_images_stand_where_the_query_says(checkpoint: Path, images: list[Path], separator: str):
    args = make_args(checkpoint, query="<image-placeholder> or <image>?", image_file=separator.join(map(str, images)),
                 sep=separator, max_new_tokens=6)  # fmt: skip
    assert eval_model(args) == vlm.load(checkpoint).generate("<image> or <image>?", images, max_new_tokens=6)


def test_another_template(checkpoint: Path, images: list[Path]):
    """A packaged one, or the tokenizer's own; each asks with other words around the question."""
    for mode, template in (("v1", read_template("v1")), ("plain", read_template("plain")), ("tokenizer", None)):
        model = vlm.load(checkpoint)
        model.processor.chat_template = template or model.processor.own_template
        expected = model.generate("what?", images[:1], max_new_tokens=6)
        assert (
            eval_model(make_args(checkpoint, image_file=str(images[0]), conv_mode=mode, max_new_tokens=6)) == expected
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_path": None}, "args.model_path: a value is needed"),
        ({"query": ""}, "args.query: a value is needed"),
        (
            {"image_file": "https://somewhere/a.png"},
            "somewhere/a.png: addresses are not fetched; download the image",
        ),
        ({"image_file": "no.png"}, "no.png does not open"),
        ({"query": "<image>"}, "the prompt has 1 <image>, but 0 images were given"),
        (
            {"conv_mode": "vicuna_v1"},
            "args.conv_mode=vicuna_v1: allowed are chatml, gemma, llama3",
        ),
        ({"temperature": -1}, "args.temperature=-1: 0"),
        ({"max_new_tokens": 0}, "args.max_new_tokens=0: at least 1 is needed"),
        ({"load_8bit": True, "load_4bit": True}, "load_8bit and load_4bit: choose one"),
        ({"model_path": "./no/such"}, "./no/such: no such folder"),
        ({"query": "word " * 600}, "but the model reads at most 512"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said(checkpoint: Path, fields: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        eval_model(make_args(checkpoint, **fields))


def test_paths_of_images():
    assert split_image_paths("a.png, b.png,") == ["a.png", "b.png"]
    assert split_image_paths("a,b.png|c.png", "|") == ["a,b.png", "c.png"]
    assert split_image_paths("") == []


# load_pretrained_model


@pytest.mark.parametrize("place", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device": "cpu"}])
def test_a_model_in_llavas_pieces(checkpoint: Path, place: dict[str, Any]):
    tokenizer, model, image_processor, context = load_pretrained_model(str(checkpoint), None, "any", **place)
    assert context == 512
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert image_processor(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 24, 24)
    assert not model.training


def test_a_precision(checkpoint: Path):
    assert load_pretrained_model(str(checkpoint), dtype="bfloat16")[1].dtype == torch.bfloat16
    assert load_pretrained_model(str(checkpoint), torch_dtype=torch.bfloat16)[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "balanced"}, "device_map=balanced: a model runs on one device"),
        ({"device_map": {"a": 0, "b": 1}}, "a model runs on one device"),
        ({"use_flash_attn": True}, "use_flash_attn: not taken"),
        ({"model_base": "somewhere"}, "is a complete model; it needs no base"),
    ],
)
def test_what_cannot_be_loaded_so(checkpoint: Path, options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        load_pretrained_model(str(checkpoint), **options)


# A base that moved


@pytest.fixture(scope="module")
def moved(train: Callable[..., Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An adapter whose language model lies elsewhere now: the adapter, where it is, and what it answers with it."""
    root = tmp_path_factory.mktemp("moved")
    lora = ["trainer.lora.language_model.r=4", "trainer.learning_rate.language_model_learning_rate=1e-2"]
    run = train("pretrain-smol", root / "run", *lora, "trainer.max_steps=1", "trainer.num_samples=0")
    answer = vlm.load(run / "final").generate("what?", [picture()], max_new_tokens=4)
    shutil.copytree(world / "language_model", root / "elsewhere")
    file = run / "final" / BASE_FILE
    content = json.loads(file.read_text())
    content["sources"]["language_model"]["name"] = "/no/such/base"
    file.write_text(json.dumps(content))
    return run / "final", f"language_model={root / 'elsewhere'}", answer


def test_a_base_that_moved_is_found_in_every_way(
    moved: tuple[Path, str, str], images: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    adapter, base, answer = moved
    asked = {"image_file": str(images[0]), "max_new_tokens": 4}
    assert eval_model(make_args(adapter, model_base=base, **asked)) == answer
    assert load_pretrained_model(str(adapter), base)[3] > 0
    capsys.readouterr()
    options = [str(adapter), "--image", str(images[0]), "--max-new-tokens", "4", "--base", base]
    main(["generate", *options, "--prompt", "what?"])
    assert capsys.readouterr().out.strip() == printable(answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\n"))
    main(["chat", *options])
    assert capsys.readouterr().out.strip() == printable(answer)


def test_a_base_that_is_gone_is_said(moved: tuple[Path, str, str]):
    adapter, _, _ = moved
    needed = f"{adapter} is an adapter on /no/such/base, which is not on this machine"
    assert needed in refusal("chat", str(adapter))
    with pytest.raises(ValueError, match="/no/such/base, which is not on this machine, or has moved"):
        eval_model(make_args(adapter))
