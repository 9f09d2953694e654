"""What the pages say in their text: keys exist, code runs. Their commands are checked in `tests/pages`."""

import json
import re
import shlex
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml

from tests.checks.test_messages import elsewhere  # noqa: F401 - Hydra leaves files behind
from tests.fixtures import compose_config
from tests.tiny_parts import Parts, picture
from vlm.checks.compose import open_mapping_key
from vlm.checks.fields import check_fields
from vlm.cli.data import TOOLS
from vlm.config.named import permit_names
from vlm.data.records.formats import FORMATS, get_reader
from vlm.data.sample import ImageRef
from vlm.data.tools.convert import CONVERSIONS

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "installation.md",
    "examples/README.md",
    "docs/parts.md",
    "docs/run-directory.md",
    "docs/data.md",
    "docs/families.md",
    "docs/anyres.md",
    "docs/recipes.md",
    "docs/lora.md",
    "docs/heads.md",
    "docs/preference.md",
    "docs/evaluation.md",
    "docs/compare-models.md",
    "docs/checkpoints.md",
    "docs/inference.md",
    "docs/web.md",
    "docs/publishing.md",
    "docs/serving.md",
    "docs/speed.md",
)
WITHOUT_KEYS = ("examples/README.md", "docs/serving.md", "docs/publishing.md", "docs/web.md", "docs/inference.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
KEYS = re.compile(r"(?:model|trainer|dataset|inference)[./][\w./-]+=[^\s`…]+")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_key_in_the_text_is_one(page: str):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    found = KEYS.findall(text)
    assert found or page in WITHOUT_KEYS
    for override in found:
        check_fields(compose_config("pretrain-smol", ["dataset.path=x", open_mapping_key(override.rstrip(".,;:)'"))]))


def test_every_make_target_and_file_is_there():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in TEXTS.values():
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_connector_of_ones_own_works(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = next(block for block in blocks("docs/parts.md", "python") if "class PoolingConnector" in block)
    (tmp_path / "my_connector.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        model, processor = parts.model(
            "siglip", "llama", connector="my_connector:PoolingConnector", options={"width": 2}
        )
    finally:
        sys.modules.pop("my_connector", None)
    features = model.get_image_features(torch.zeros(2, 3, 24, 24))
    assert features.shape[:2] == (2, processor.tokens_per_image)
    assert processor.tokens_per_image == 9 // 2


def test_the_run_of_ones_own_composes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from vlm.cli.main import main

    (tmp_path / "dinov2.yaml").write_text(blocks("docs/parts.md", "yaml")[0])
    main(["--config-dir", str(tmp_path), "-cn", "dinov2", "dataset.path=x.json", "--cfg", "job"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["visual_encoder"]["hf_name"] == "facebook/dinov2-base"
    assert shown["trainer"]["deepspeed"]["zero_optimization"]["stage"] == 2
    assert (shown["trainer"]["num_train_epochs"], shown["trainer"]["bf16"]) == (1.0, True)


# docs/data.md


def test_records_are_read_as_the_page_shows_them(tmp_path: Path):
    for name in ("cat.png", "cup.png", "a.png", "b.png"):
        picture().save(tmp_path / name)
    text = TEXTS["docs/data.md"].partition("## Forms of records")[2].partition("### A reader")[0]
    forms = re.findall(r"^\*\*`(\w+)`\*\*(.*?)(?=^\*\*`|\Z)", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in forms] == list(FORMATS)
    for name, described in forms:
        example = (re.findall(r"```json\n(.*?)```", described, re.DOTALL) or re.findall(r"`(\{\".*?\})`", described))[0]
        sample = FORMATS[name](json.loads(example), tmp_path)
        assert sample.images
        for option in re.findall(r"`dataset\.options\.(\w+)=", described):
            assert option in signature(FORMATS[name]).parameters


def test_the_reader_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_reader.py").write_text(blocks("docs/data.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    try:
        permit_names(["my_reader:read"])
        read = get_reader("my_reader:read")
        sample = read({"file": "cat.png", "label": "A cat."}, tmp_path, question="Which?")
    finally:
        sys.modules.pop("my_reader", None)
    assert [turn.content[-1] for turn in sample.turns] == ["\nWhich?", "A cat."]
    assert sample.images == [ImageRef(tmp_path / "cat.png")]


def test_the_mixture_composes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from vlm.cli.main import main

    (tmp_path / "mixed.yaml").write_text(blocks("docs/data.md", "yaml")[0])
    main(["--config-dir", str(tmp_path), "-cn", "mixed", "--cfg", "job"])
    sources = yaml.safe_load(capsys.readouterr().out)["dataset"]["sources"]
    assert sources["talk"]["weight"] == 2
    assert sources["captions"]["options"] == {"prompt": "Describe the image."}


def test_the_tools_are_all_described():
    assert set(re.findall(r"`vlm data (\w+) ", TEXTS["docs/data.md"])) == set(TOOLS)
    kinds = re.search(r"`conceptual-captions`.*", TEXTS["docs/data.md"])[0]
    assert [kind for kind in CONVERSIONS if f"`{kind}`" not in kinds and kind not in FORMATS] == []


# docs/inference.md


def test_the_ways_to_ask_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every command's options, and the settings that it takes from a run."""
    from vlm.cli import chat
    from vlm.cli import generate as generate_command
    from vlm.cli.model_options import read_inference_settings

    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "talkative.yaml").write_text(blocks("docs/inference.md", "yaml")[0])
    lines = [line for block in blocks("docs/inference.md", "sh")
             for line in block.replace("\\\n", " ").replace("my-runs", str(tmp_path)).splitlines()]  # fmt: skip
    asked = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert len(asked) > 8
    settings = []
    for _, name, *words in asked:
        make_parser = {"generate": generate_command, "chat": chat}[name].make_parser()
        settings.append(read_inference_settings(make_parser.parse_intermixed_args(words)))
    assert {(one.temperature, one.max_new_tokens) for one in settings} == {(0.0, 128), (0.8, 256), (0.8, 128)}


def test_the_python_that_asks_runs(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, processor = parts.model("clip", "llama", template="chatml")
    model.save_pretrained(tmp_path / "outputs/smol-finetune/final")
    processor.save_pretrained(tmp_path / "outputs/smol-finetune/final")
    for name in ("cat.png", "a.png", "b.png"):
        picture().save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for code in blocks("docs/inference.md", "python"):
        exec(code, {})
