"""Prediction heads from the records to the folder that loads alone: each task, what is refused, what is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures import losses
from tests.train.heads.head_runs import SHORT, alone, ask, rewritten, scores_of
from vlm.evaluation.head_metrics import CLUSTERED_SHARES, SHARES
from vlm.models.poolings import POOLINGS
from vlm.runs.comparison import RunComparison
from vlm.runs.read import RunDirectory
from vlm.train import run as train_run
from vlm.train.heads.outputs import HeadOutputs

LONG = ["model.head.pooling=image", "trainer.num_train_epochs=60"]
TASKS = {
    "binary": ("head-binary", "bright"),
    "multiclass": ("head-classification", "colour"),
    "multilabel": ("head-classification", "tags"),
    "regression": ("head-regression", "light"),
    "ordinal": ("head-regression", "level"),
    "pairwise": ("head-regression", "light"),
}
"""Task -> a shipped run, and the column of the records that it learns."""
GROUPED = {"pairwise": ["dataset.options.group_key=set", "dataset.eval_split=0.3"]}
"""Task -> what else it needs: only records of a group are compared."""

FILES = (
    "config.yaml", "command.txt", "versions.json", "data.json", "metrics.jsonl", "loss.png", "scores.json",
    "speed.json", "first_batch.html", "skipped.jsonl", "final/config.json", "final/model.safetensors",
    "final/processor_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(
    train_head: Callable[..., Path], labelled: Path, told: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, dict[str, Any]]]:  # fmt: skip
    """`trained(task)`: a finished run of a task, once; it is also measured on all records, in their order."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(task: str) -> tuple[Path, dict[str, Any]]:
        if task not in done:
            name, column = TASKS[task]
            folder = train_head(
                name, column, tmp_path_factory.mktemp("runs") / task, f"model/head={task}", *LONG,
                f"dataset.test_path={labelled}", *GROUPED.get(task, []), plots=True,
            )  # fmt: skip
            done[task] = folder, told[-1]
        return done[task]

    return of


# Each task


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_everything_behind(trained: Any, task: str):
    folder, _ = trained(task)
    for name in FILES:
        assert (folder / name).is_file(), name
    for part in ("evaluation", "test"):
        assert list((folder / "scores" / part).glob("*.png")), part
    data = json.loads((folder / "data.json").read_text())
    held_out = 16 if task in GROUPED else 12
    assert {role: one["samples"] for role, one in data.items()} == {
        "train": 48 - held_out,
        "eval": held_out,
        "test": 48,
    }
    assert "image token" in (folder / "first_batch.html").read_text()
    assert json.loads((folder / "speed.json").read_text())["samples_per_second"] > 0
    found = json.loads((folder / "scores.json").read_text())
    assert found["evaluation"]["label"]["records"] == held_out
    shares = (*SHARES.get(task, ()), *CLUSTERED_SHARES.get(task, ()))
    for name, score in found["evaluation"]["label"]["scores"].items():
        if score["low"] is None:  # all resamples agree
            assert name not in shares
            assert score["value"] == pytest.approx(round(score["value"]), abs=1e-6)
        else:
            assert score["low"] <= score["value"] <= score["high"]
    assert found["test"]["label"]["baseline"]


@pytest.mark.parametrize("task", TASKS)
def test_heads_are_compared_on_the_same_records(trained: Any, task: str):
    """A run beside itself: of the same records, so that no difference is left."""
    run = RunDirectory(trained(task)[0])
    rows = RunComparison([run, RunDirectory(run.path)]).metrics
    heads = [row for row in rows if row.place.startswith("label, ")]
    assert {row.place for row in heads} == {"label, evaluation", "label, test"}
    for row in heads:
        assert row.is_paired(0), row
        difference = row.differences[0]
        assert difference is not None
        assert difference.value == 0
        assert difference.low is difference.high is None, "all resamples agree, which says nothing about other records"


@pytest.mark.parametrize(
    ("task", "measure", "least"),
    [("binary", "accuracy", 1), ("multiclass", "accuracy", 1), ("multilabel", "exact_match", 1),
     ("regression", "r2", 0.9), ("ordinal", "accuracy", 1), ("pairwise", "pair_accuracy", 0.8)],
)  # fmt: skip
def test_heads_learn_what_pictures_show(trained: Any, task: str, measure: str, least: float):
    folder, _ = trained(task)
    assert scores_of(folder)[measure] >= least
    assert losses(folder)[-1] < 0.3 * losses(folder)[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_saved_model_says_what_was_measured(trained: Any, labelled: Path, task: str):
    folder, told = trained(task)
    said: HeadOutputs = told["test"]["label"]
    predictor = alone(folder / "final")
    np.testing.assert_allclose(ask(predictor, labelled)["label"], said.outputs, rtol=1e-4, atol=1e-4)
    settings = predictor.heads[0]
    chosen = json.loads((folder / "scores.json").read_text())["test"]["label"]
    assert (settings.temperature, settings.threshold) == (chosen["temperature"], chosen["threshold"])


def test_labels_are_in_the_configuration(trained: Any):
    configs = {task: alone(trained(task)[0] / "final").model.config for task in ("binary", "multiclass", "regression")}
    assert configs["multiclass"].id2label == {0: "blue", 1: "green", 2: "red"}
    assert configs["multiclass"].label2id == {"blue": 0, "green": 1, "red": 2}
    assert configs["binary"].id2label == {0: "no", 1: "yes"}
    assert configs["binary"].settings[0].threshold is not None
    light = configs["regression"].settings[0]
    assert light.scale > 1
    assert 100 < light.shift < 250


# What is refused before a weight is loaded


def drops_label(index: int, record: dict) -> None:
    if index == 5:
        del record["colour"]


def puts(column: str, value: Any, place: int = 5) -> Callable[[int, dict], None]:
    def change(index: int, record: dict) -> None:
        if index == place:
            record[column] = value

    return change


REFUSED: dict[str, tuple[str, str, Callable[[int, dict], None], list[str], str]] = {
    "no label": ("head-classification", "colour", drops_label, [], r"1 of 48 train records have no label; the"),
    "unknown": ("head-classification", "colour", puts("colour", "pink"), ["model.head.labels=[red,green,blue]"],
                r"'pink' is not one of its labels"),
    "absent": ("head-classification", "colour", puts("id", "5"), ["model.head.labels=[red,green,blue,pink]"],
               r"'pink', but no training record"),
    "lonely": ("head-classification", "colour", puts("colour", "pink"), [], r"'pink' has 1"),
    "not a number": ("head-regression", "light", puts("light", float("nan")), [], r"needs a finite number, got nan"),
    "infinite": ("head-regression", "light", puts("light", float("inf")), [], r"needs a finite number, got inf"),
    "a text": ("head-regression", "light", puts("light", "much"), [], r"needs a finite number, got 'much'"),
    "all equal": ("head-regression", "same", lambda index, record: record.update(same=3), [],
                  r"model.head.task=regression: all labels are equal \(3"),
    "three of two": ("head-binary", "colour", puts("id", "5"), [], r"binary needs exactly 2 labels"),
    "which is positive": ("head-binary", "side", lambda index, record: record.update(side=["left", "right"][index % 2]),
                          [], r"which of 'left' and 'right' is the positive label is unknown"),
    "one text": ("head-classification", "colour", puts("id", "5"), ["model/head=multilabel"],
                 r"multilabel needs a list of labels, got "),
    "layer": ("head-binary", "bright", puts("id", "5"), ["model.head.layer=3"],
              r"model.head.layer=3: the language model has hidden states 0 to 2, or -3 to -1"),
    "token": ("head-binary", "bright", puts("id", "5"), ["model.head.pooling=token", "model.head.token=MARK"],
              r"model.head.token=MARK: the vocabulary has no such token; add it: model.language_model.new_tokens"),
    "class": ("head-binary", "bright", puts("id", "5"), ["model.head.type=no_such:Head"],
              r"model.head.type=no_such:Head: No module named 'no_such'"),
    "dropout": ("head-binary", "bright", puts("id", "5"), ["model.head.options.dropout=2"],
                r"model.head.options=\{'dropout': 2\}: linear does not take them: dropout probability"),
    "name": ("head-binary", "bright", puts("id", "5"), ["model.head.name=values"],
             r"model.head: torch modules already have an attribute values; choose another name"),
    "weights": ("head-classification", "colour", puts("id", "5"), ["model.head.class_weights=[1,2]"],
                r"model.head.class_weights=\[1, 2\]: one for each of 3 labels is needed"),
    "one label everywhere": ("head-classification", "all", lambda index, record: record.update(
        all=["a", *["b"] * (index % 2)]), ["model/head=multilabel", "model.head.class_weights=balanced"],
        r"class_weights=balanced: every record has the label number 0"),
}  # fmt: skip
"""Run, column, what is done to the records, overrides, and what is said."""


@pytest.mark.parametrize(("name", "column", "change", "overrides", "said"), REFUSED.values(), ids=REFUSED)
def test_records_are_known_to_be_right_before_weights_are_loaded(
    train_head: Callable[..., Path], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    column: str, change: Callable[[int, dict], None], overrides: list[str], said: str,
):  # fmt: skip
    monkeypatch.setattr(train_run, "load_weights", lambda *given: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=said):
        train_head(name, column, tmp_path / "run", *rewritten(labelled, tmp_path, change), *overrides)


# What is read


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_is_one_override(
    train_head: Callable[..., Path], labelled: Path, told: list[dict[str, Any]], tmp_path: Path, pooling: str
):
    token = ["model.head.token='<|im_start|>'"] if pooling == "token" else []
    words = [f"model.head.pooling={pooling}", *token, *SHORT, f"dataset.test_path={labelled}"]
    folder = train_head("head-regression", "light", tmp_path / "run", *words)
    said = told[-1]["test"]["label"].outputs
    np.testing.assert_allclose(ask(alone(folder / "final"), labelled)["label"], said, rtol=1e-4, atol=1e-3)
    assert np.isfinite(losses(folder)).all()


def test_the_log_says_how_the_records_are_divided(
    train_head: Callable[..., Path], labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="vlm.train.run"):
        train_head("head-classification", "colour", tmp_path / "run", *SHORT, "dataset.test_split=0.25")
    said = next(one.getMessage() for one in caplog.records if one.getMessage().startswith("Records:"))
    number = len(json.loads(labelled.read_text()))
    train, held, test = (int(word.split()[0]) for word in said.split("\n\n")[1].splitlines()[0].split(", "))
    assert train + held + test == number
    counts = [int(one.split()[-1]) for one in said.strip().splitlines()[-1].partition(": ")[2].split(", ")]
    assert sum(counts) == train
