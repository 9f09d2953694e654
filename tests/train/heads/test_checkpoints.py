"""What a run with prediction heads begins with and leaves: checkpoints, adapters on a base, families, resumed runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoProcessor

from tests.families.tiny_families import save_family
from tests.fixtures import compose_config, head_words, losses, quick_report
from tests.train.heads.head_runs import CONNECTOR, SHORT, alone, ask, rewritten, scores_of
from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from vlm.assembly.adapter_merge import merge
from vlm.assembly.checkpoint import open_checkpoint
from vlm.inference.predict import Predictor
from vlm.models import VLMForPrediction
from vlm.train.run import run

LORA = ["trainer.lora.language_model.r=4", "trainer.max_steps=4"]


def read_head_outputs(told: list[dict[str, Any]]) -> np.ndarray:
    """What the newest run's model said of its test records."""
    return told[-1]["test"]["label"].outputs


# Adapters


@pytest.mark.parametrize(
    ("start", "pooling"),
    [
        ("parts", "query"),
        ("checkpoint", "last"),
        pytest.param("parts", "last", marks=pytest.mark.slow),
        pytest.param("checkpoint", "query", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_with_a_head_loads_and_merges(
    train_head: Callable[..., Path], composed: Path, labelled: Path, told: list[dict[str, Any]], tmp_path: Path,
    pooling: str, start: str,
):  # fmt: skip
    """On the parts or the checkpoint that it was trained on, and complete by itself."""
    begun = [f"trainer.from_pretrained={composed}"] if start == "checkpoint" else []
    words = [*LORA, *begun, f"model.head.pooling={pooling}", f"dataset.test_path={labelled}"]
    final = train_head("head-classification", "colour", tmp_path / "run", *words) / "final"
    said = read_head_outputs(told)
    assert not list(final.glob("model*.safetensors"))
    assert all(".lora_" in name for name in load_file(final / ADAPTER_WEIGHTS))
    others = load_file(final / NON_LORA_WEIGHTS)
    assert {name for name in others if name.startswith("heads.")} == {
        "heads.label.layers.linear.weight", "heads.label.layers.linear.bias"
    }  # fmt: skip
    rows = {
        name: len(value) for name, value in others.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    if start == "checkpoint":
        assert list(rows) == (["body.language_model.model.embed_tokens.weight"] if pooling == "query" else [])
        assert all(number < 64 for number in rows.values())  # from the new token on
    for merged in (False, True):
        model = open_checkpoint(final).load_model(merge=merged)
        assert isinstance(model, VLMForPrediction)
        assert any("lora_" in name for name, _ in model.named_parameters()) != merged
        found = ask(Predictor(model.eval(), AutoProcessor.from_pretrained(final)), labelled)["label"]
        np.testing.assert_allclose(found, said, rtol=1e-4, atol=1e-4)
    merge(str(final), tmp_path / "whole")
    np.testing.assert_allclose(ask(alone(tmp_path / "whole"), labelled)["label"], said, rtol=1e-4, atol=1e-4)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "whole"), VLMForPrediction)
    assert not list((tmp_path / "whole").glob("adapter*"))


def test_training_goes_on_from_an_adapter_with_a_head(
    train_head: Callable[..., Path], composed: Path, labelled: Path, told: list[dict[str, Any]], tmp_path: Path
):
    first = train_head(
        "head-classification", "colour", tmp_path / "first", *LORA, f"trainer.from_pretrained={composed}"
    )  # fmt: skip
    words = [f"trainer.from_pretrained={first / 'final'}", f"dataset.test_path={labelled}"]
    second = train_head("head-classification", "colour", tmp_path / "second", *words, *SHORT)
    merged = open_checkpoint(first / "final").load_model().body.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(second / "final").body.state_dict()
    torch.testing.assert_close(after, merged)
    train_head("head-classification", "colour", tmp_path / "third", *words, *LORA)
    said = read_head_outputs(told)
    found = ask(
        Predictor(
            open_checkpoint(tmp_path / "third" / "final").load_model().eval(),
            AutoProcessor.from_pretrained(first / "final"),
        ),
        labelled,
    )
    np.testing.assert_allclose(found["label"], said, rtol=1e-4, atol=1e-4)


# What a run begins with


@pytest.fixture(scope="module")
def composed(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without heads."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "composed", "trainer.max_steps=1") / "final"


@pytest.fixture(scope="module")
def headed(train_head: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head that has learnt colours."""
    folder = tmp_path_factory.mktemp("runs") / "headed"
    words = ["model.head.pooling=image", "trainer.num_train_epochs=40", "model.head.type=mlp"]
    return train_head("head-classification", "colour", folder, *words) / "final"


def test_a_composed_checkpoint_gets_a_head(
    train_head: Callable[..., Path], composed: Path, labelled: Path, told: list[dict[str, Any]], tmp_path: Path
):
    words = [f"trainer.from_pretrained={composed}", f"dataset.test_path={labelled}", *SHORT]
    folder = train_head("head-regression", "light", tmp_path / "run", *words)
    np.testing.assert_allclose(
        ask(alone(folder / "final"), labelled)["label"], read_head_outputs(told), rtol=1e-4, atol=1e-3
    )
    before, after = load_file(composed / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(value, after[f"body.{name}"]) for name, value in before.items())
    recipe = json.loads((folder / "final" / "config.json").read_text())["recipe"]
    assert recipe["visual_encoder"]["hf_name"]
    assert recipe["head"]["task"] == "regression"


def test_a_head_goes_on_with_its_weights(train_head: Callable[..., Path], headed: Path, labelled: Path, tmp_path: Path):
    words = [f"trainer.from_pretrained={headed}", f"dataset.test_path={labelled}", "trainer.max_steps=1",
             "trainer.learning_rate.head_learning_rate=1e-9", "model.head.label_smoothing=0.1"]  # fmt: skip
    folder = train_head("head-classification", "colour", tmp_path / "run", *words)
    before, after = load_file(headed / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-7)
    assert scores_of(folder, "test")["accuracy"] == 1
    settings = alone(folder / "final").heads[0]
    assert (settings.pooling, settings.type, settings.label_smoothing) == ("image", "mlp", 0.1)


def test_a_heads_scale_stays(train_head: Callable[..., Path], labelled: Path, tmp_path: Path):
    """Its weights were learned for it, whatever the new records' spread is."""
    first = train_head("head-regression", "light", tmp_path / "first", *SHORT) / "final"
    darker = rewritten(labelled, tmp_path, lambda index, record: record.update(light=record["light"] / 10))
    second = train_head(
        "head-regression", "light", tmp_path / "run", f"trainer.from_pretrained={first}", *darker, *SHORT
    )
    scales = [(one.shift, one.scale) for one in (alone(first).heads[0], alone(second / "final").heads[0])]
    assert scales[0] == scales[1]


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("head-binary", [], "You asked for model.head.task=binary, but it has multiclass"),
        ("head-classification", ["model.head.pooling=last"], "model.head.pooling=last, but it has image"),
        ("head-classification", ["model.head.type=linear"], "model.head.type=linear, but it has mlp"),
        ("head-classification", ["model.head.layer=-2"], "model.head.layer=-2, but it has None"),
        ("head-classification", ["model.head.name=other"], "model.head.name=other, but it has label"),
        ("head-classification", ["model.head.labels=[red,green,blue]"],
         r"model.head.labels=\['red', 'green', 'blue'\], but it has \['blue', 'green', 'red'\]"),
        ("head-classification", ["model.head.extra_heads.age.task=regression"],
         "model.head.extra_heads.age=regression, but it has only label"),
        ("head-classification", ["model.language_model.quantization=8bit"], "such a checkpoint is loaded as it is"),
        ("pretrain-smol", ["dataset.options={}"], "it has prediction heads; choose a run with one, such as head-bin"),
    ],
)  # fmt: skip
def test_a_checkpoints_heads_are_not_contradicted(
    train_head: Callable[..., Path], headed: Path, tmp_path: Path, name: str, overrides: list[str], said: str
):
    words = [f"trainer.from_pretrained={headed}", *overrides]
    if name == "pretrain-smol":
        words += ["trainer.eval_strategy=epoch"]
    with pytest.raises(ValueError, match=said):
        train_head(name, "colour", tmp_path / "run", *words)


def test_saying_again_what_a_checkpoint_has_is_no_contradiction(
    train_head: Callable[..., Path], headed: Path, tmp_path: Path
):
    words = ["model.head.pooling=image", "model.head.type=mlp", "model.head.labels=[blue,green,red]",
             "model/head=multiclass", "model.head.class_weights=balanced"]  # fmt: skip
    words = [f"trainer.from_pretrained={headed}", *words, *SHORT]
    assert (train_head("head-classification", "colour", tmp_path / "run", *words) / "final").is_dir()


def test_a_checkpoints_query_goes_on_learning(train_head: Callable[..., Path], tmp_path: Path):
    first = train_head("head-binary", "bright", tmp_path / "first", *SHORT, "model.head.pooling=query") / "final"
    start = f"trainer.from_pretrained={first}"
    second = train_head("head-binary", "bright", tmp_path / "second", *SHORT, start) / "final"
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    name = "body.language_model.model.embed_tokens.weight"
    moved = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == alone(second).model.config.suffix_ids
    rate = "trainer.learning_rate.language_model_learning_rate=null"
    with pytest.raises(ValueError, match=f"{rate}: a positive number is needed"):
        train_head("head-binary", "bright", tmp_path / "third", *SHORT, start, rate)


# Resumed runs


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param([], id="cached", marks=pytest.mark.slow),
        pytest.param([*CONNECTOR, "model.head.pooling=query"], id="moving"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train_head: Callable[..., Path], tmp_path: Path, trained: list[str]):
    words = ["trainer.save_strategy=steps", "trainer.save_steps=5", "trainer.num_train_epochs=2", *trained]
    whole = train_head("head-classification", "colour", tmp_path / "run", *words, "model.head.options.dropout=0.2")
    expected, weights = losses(whole), load_file(whole / "final" / "model.safetensors")
    scores = (whole / "scores.json").read_text()
    shutil.rmtree(whole / "checkpoint-10")
    shutil.rmtree(whole / "final")
    held = load_file(whole / "checkpoint-5" / "trained.safetensors")
    assert {name.split(".")[0] for name in held} == ({"heads"} if not trained else {"heads", "body"})
    words += ["model.head.options.dropout=0.2"]
    resumed = train_head("head-classification", "colour", tmp_path / "run", *words)
    assert losses(resumed) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(load_file(resumed / "final" / "model.safetensors"), weights, rtol=0, atol=1e-6)
    assert (whole / "scores.json").read_text() == scores


# Families


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`families(name)`: a tiny model of a family, made once."""
    root = tmp_path_factory.mktemp("families")

    def of(name: str) -> Path:
        if not (root / name).is_dir():
            save_family(name, root / name)
        return root / name

    return of


@pytest.fixture(scope="module")
def train_family(train_whole: Callable[..., Path], labelled: Path, families: Callable[[str], Path]):
    """As `train_head`, on a family's model."""

    def start(family: str, name: str, column: str, output_dir: Path, *overrides: str) -> Path:
        words = [word for word in head_words(labelled, column) if word != "model=composed"]
        rates = ["trainer.learning_rate.connector_learning_rate=1e-3", "dataset.max_length=600"]
        with quick_report():
            return train_whole(name, families(family), output_dir, *words, *rates, *overrides)

    return start


FROZEN, MOVING = ["model.head.pooling=attention"], [*CONNECTOR, "model.head.pooling=query"]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        pytest.param("qwen2-vl", FROZEN, id="qwen2-vl, frozen"),
        pytest.param("llava-onevision", MOVING, id="llava-onevision, moving"),
        pytest.param("qwen2-vl", LORA[:1], id="qwen2-vl, adapter"),
        pytest.param("llava-onevision", FROZEN, id="llava-onevision, frozen", marks=pytest.mark.slow),
        pytest.param("qwen2-vl", MOVING, id="qwen2-vl, moving", marks=pytest.mark.slow),
        pytest.param("llava-onevision", LORA[:1], id="llava-onevision, adapter", marks=pytest.mark.slow),
    ],
)
def test_a_familys_model_gets_a_head(
    train_family: Any, families: Callable[[str], Path], labelled: Path, told: list[dict[str, Any]], tmp_path: Path,
    family: str, words: list[str],
):  # fmt: skip
    tested = f"dataset.test_path={labelled}"
    folder = train_family(family, "head-classification", "colour", tmp_path / "run", *words, *SHORT, tested)
    final = folder / "final"
    if words == LORA[:1]:
        merge(str(final), tmp_path / "whole")
        final = tmp_path / "whole"
    predictor = Predictor.load(final, device="cpu")
    assert isinstance(predictor.model, VLMForPrediction)
    np.testing.assert_allclose(ask(predictor, labelled)["label"], read_head_outputs(told), rtol=1e-3, atol=1e-3)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(final), VLMForPrediction)
    before, after = load_file(families(family) / "model.safetensors"), load_file(final / "model.safetensors")
    assert after.keys() >= {f"body.{name}" for name in before}
    changed = {name for name, value in before.items() if not torch.equal(after[f"body.{name}"][: len(value)], value)}
    if words == FROZEN:
        assert not changed
    elif words == MOVING:
        assert changed
        assert not any("layers" in name and "language_model" in name for name in changed)


def test_a_familys_head_goes_on(train_family: Any, brief: list[str], labelled: Path, tmp_path: Path):
    first = train_family("qwen2-vl", "head-binary", "bright", tmp_path / "first", *SHORT, "model.head.pooling=query")
    words = [*brief, *head_words(labelled, "bright")[1:], f"trainer.from_pretrained={first / 'final'}", *SHORT]
    config = compose_config(
        "head-binary", [*words, "dataset.max_length=600", f"trainer.output_dir={tmp_path / 'second'}"]
    )
    with quick_report():
        second = run(config, "head-binary", [word.split("=")[0] for word in words])
    before = load_weights_alone(first)
    after = load_weights_alone(second)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"heads", "body"}
    assert [name for name in changed if name.startswith("body.")] == [
        name for name in before if name.endswith("language_model.embed_tokens.weight")
    ]


def load_weights_alone(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder / "final").state_dict()


def test_a_familys_adapter_keeps_the_tokens_that_it_added(
    train_family: Any, labelled: Path, told: list[dict[str, Any]], tmp_path: Path
):
    """The base's vocabulary is smaller: it grows as it is loaded."""
    words = [*LORA, "model.head.pooling=query", f"dataset.test_path={labelled}"]
    final = train_family("llava-onevision", "head-binary", "bright", tmp_path / "run", *words) / "final"
    predictor = Predictor.load(final, device="cpu")
    np.testing.assert_allclose(ask(predictor, labelled)["label"], read_head_outputs(told), rtol=1e-3, atol=1e-3)
