"""Every example of docs/extending.md runs, as a user's own files in a folder of theirs."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.fixtures import compose_config, losses
from tests.tiny_parts import Parts
from vlm.config.named import permit_names
from vlm.data.records.formats import get_reader
from vlm.families.parts import get_part_names
from vlm.families.table import FAMILIES
from vlm.models.connectors import CONNECTORS
from vlm.models.heads import HEADS

TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
SHORT = ("trainer.max_steps=2", "trainer.num_samples=0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a user, with every file of the page; afterwards their modules and classes are gone."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tables = [(table, dict(table)) for table in (CONNECTORS, HEADS, FAMILIES)]
    yield tmp_path
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def overrides(name: str) -> list[str]:
    """The overrides of the page's command that names a class or function, without its data and checkpoint."""
    (line,) = [line for line in re.findall(r"^vlm -cn .*?(?<!\\)$", TEXT, re.MULTILINE | re.DOTALL) if name in line]
    words = re.findall(r"""(?:[^\s'"\\]|"[^"]*"|'[^']*')+""", line)
    own = [word for word in words if "=" in word and not word.startswith(("dataset.path", "trainer.from_pretrained"))]
    return [word.replace("'", "").replace('"', "") for word in own]


def test_the_connector_is_trained(folder: Path, train: Callable[..., Path]):
    run = train("pretrain-smol", folder / "run", *overrides("GatedConnector"), *SHORT)
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["connector"] == {"type": "my_connector:GatedConnector", "options": {"bias": False}}
    assert len(losses(run)) == 2


def test_the_connector_gates(parts: Parts):
    model, _ = parts.model("siglip", "llama", connector="my_connector:GatedConnector")
    features = model.get_image_features(torch.zeros(2, 3, 24, 24))
    assert features.shape[:2] == (2, 9)


def test_the_encoder_is_a_choice(folder: Path, capsys: pytest.CaptureFixture[str]):
    from vlm.cli.main import main

    command = ["--config-dir", "my_runs", "-cn", "pretrain-smol", "model/visual_encoder=dinov2-giant"]
    main([*command, "dataset.path=x.json", "--cfg", "job"])
    assert "hf_name: facebook/dinov2-giant" in capsys.readouterr().out


def test_the_family_names_the_part_of_every_parameter():
    import my_family  # noqa: F401 # pyright: ignore[reportMissingImports] - written by the fixture

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["mistral3"]())
    names = get_part_names(model.config)
    parts = {name: names.part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"visual_encoder", "connector", "language_model"}
    assert parts["model.language_model.embed_tokens.weight"] == "language_model"
    assert parts["model.vision_tower.patch_conv.weight"] == "connector"


def test_the_format_reads_a_record():
    permit_names(["my_format:read"])
    sample = get_reader("my_format:read")(
        {"file": "cat.png", "label": "a cat"}, Path("images"), question="Which animal?"
    )
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    assert sample.turns[0].content[0].path == Path("images/cat.png")


def test_the_head_is_trained(folder: Path, train_head: Callable[..., Path]):
    run = train_head("head-binary", "bright", folder / "run", *overrides("BottleneckHead"), *SHORT)
    config = json.loads((run / "final" / "config.json").read_text())
    assert (config["heads"][0]["type"], config["heads"][0]["options"]) == ("my_head:BottleneckHead", {"rank": 4})


def test_the_objective_adds_to_the_loss(folder: Path, train: Callable[..., Path]):
    plain = train("pretrain-smol", folder / "plain", *SHORT)
    penalised = train("pretrain-smol", folder / "penalised", *overrides("ZLoss"), *SHORT)
    assert losses(penalised)[0] > losses(plain)[0]


def test_the_optimiser_steps_by_signs_and_the_metric_is_logged(folder: Path, train: Callable[..., Path]):
    words = [*overrides("SignSGD"), *overrides("starts_alike"), "trainer.lr_scheduler_type=constant"]
    run = train("pretrain-smol", folder / "run", *words, *SHORT, "trainer.warmup_steps=0", "trainer.num_train_epochs=1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_my_metric:starts_alike" in line or "eval_starts_alike" in line for line in lines)
    assert losses(run)[1] != losses(run)[0]


def test_every_command_of_the_page_composes():
    for name in ("GatedConnector", "BottleneckHead", "ZLoss", "SignSGD", "starts_alike", "my_format"):
        run = "head-binary" if name == "BottleneckHead" else "pretrain-smol"
        compose_config(run, ["dataset.path=x.json", *overrides(name)])
