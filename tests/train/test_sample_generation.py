"""Metrics while a model trains: logged beside the loss, the same as those of its checkpoint afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import check_config, compose_config
from tests.train.test_distributed_runs import launch
from vlm import VisionLanguageModel
from vlm.checks.fields import ConfigError
from vlm.config.dataset_schema import SourceConfig
from vlm.evaluation.records import InferenceLosses, load_supervised_dataset, prepare_loss_metrics
from vlm.train import run as run_module
from vlm.train.monitor.callbacks import read_metrics

ANSWERS = [
    "trainer.eval_metrics=[exact_match,anls,rouge]",
    "trainer.eval_metrics_samples=6",
    "trainer.eval_strategy=epoch",
]


def evaluated(run: Path) -> dict[str, float]:
    """The last line of a run's log that is of an evaluation."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line][-1]


@pytest.fixture(scope="module")
def held_out(train: Callable[..., Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of which every other has a reference that is what the model answers once it is trained."""
    run = train(*make_run_config(world, tmp_path_factory.mktemp("before")))
    model = VisionLanguageModel.load(run / "final", device="cpu")
    records = json.loads((world / "records.json").read_text())
    for number, one in enumerate(records):
        question, images = one["conversations"][0]["value"], [world / "images" / one["image"]] if "image" in one else []
        answer = model.generate(question, images, max_new_tokens=6)
        one["answers"] = ["something else", answer.upper() if number % 2 else "nothing"]
    path = tmp_path_factory.mktemp("records") / "held_out.json"
    path.write_text(json.dumps(records))
    return path


def make_run_config(world: Path, folder: Path) -> list[Any]:
    return [
        "pretrain-smol", folder, "trainer.num_train_epochs=1", "dataset.template=chatml", "inference.max_new_tokens=6",
        "trainer.train_sampling_strategy=sequential", "trainer.num_samples=0",
        f"dataset.eval_image_folder={world / 'images'}",
    ]  # fmt: skip


def test_metrics_of_answers_stand_beside_the_loss(
    train: Callable[..., Path], world: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They are those of what the model answers to the first records, of which every other is answered so."""
    (tmp_path / "running_metrics.py").write_text("def number(answers, references): return float(len(answers))")
    monkeypatch.syspath_prepend(tmp_path)
    words = [*ANSWERS, "trainer.eval_metrics=[exact_match,anls,rouge,'running_metrics:number']"]
    run = train(*make_run_config(world, tmp_path / "run"), *words, f"dataset.eval_path={held_out}")
    assert evaluated(run)["eval_number"] == 6.0
    assert evaluated(run)["eval_exact_match"] == 0.5
    assert evaluated(run)["eval_rouge"] == pytest.approx(0.5, abs=0.2)


RETRIEVAL = ["trainer.eval_metrics=[retrieval]", "trainer.eval_retrieval_candidates=3", "trainer.eval_strategy=epoch"]


def test_retrieval_stands_beside_the_gain(train: Callable[..., Path], world: Path, tmp_path: Path):
    """From pixels and from cached features; as `vlm eval` has it of the checkpoint."""
    name, folder, *words = make_run_config(world, tmp_path / "pixels")
    words += [*RETRIEVAL, f"dataset.eval_path={world / 'records.json'}", "trainer.per_device_eval_batch_size=2"]
    pixels = evaluated(train(name, folder, *words))
    assert pixels["eval_retrieval_chance"] == pytest.approx(1 / 3)
    assert 0 <= pixels["eval_retrieval"] <= 1
    assert pixels["eval_retrieval_ci95"] > 0
    cached = evaluated(train(name, tmp_path / "cached", *words, "dataset.cache_features=true"))
    for measure in ("retrieval", "retrieval_ci95", "loss", "image_gain"):
        assert cached[f"eval_{measure}"] == pytest.approx(pixels[f"eval_{measure}"], abs=1e-5)
    ready = VisionLanguageModel.load(tmp_path / "pixels/final", device="cpu")
    config = SourceConfig(path=str(world / "records.json"), image_folder=str(world / "images"))
    dataset = load_supervised_dataset(ready, config, 8)
    (metric,) = prepare_loss_metrics(dataset, ["retrieval"], 3).values()
    assert metric.num_samples == 18
    scores = metric.compute(dataset, InferenceLosses(ready, 4, 0)).scores
    assert scores["retrieval"].value == pixels["eval_retrieval"]


def test_records_that_retrieval_cannot_compare_are_refused_before_weights_load(
    train: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_module, "load_weights", lambda *given: pytest.fail("weights were loaded"))
    records = json.loads((world / "records.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps([record for record in records if "image" not in record]))

    def refused(*words: str) -> str:
        name, folder, *rest = make_run_config(world, tmp_path / "run")
        with pytest.raises(ValueError, match="retrieval: ") as caught:
            train(name, folder, *rest, *RETRIEVAL, *words)
        return str(caught.value)

    assert "none of the 6 records shows an image" in refused(f"dataset.eval_path={tmp_path / 'text.json'}")
    said = refused(f"dataset.eval_path={world / 'records.json'}", "trainer.eval_retrieval_candidates=10")
    assert "10 different texts are needed, and for record '0' there are 6" in said
    assert "lower trainer.eval_retrieval_candidates (now 10)" in said


def test_what_cannot_be_measured_is_refused(common: list[str]):
    def refused(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_config(compose_config("finetune-smol", [*common, "trainer.eval_strategy=no", *words]))
        return str(caught.value)

    assert "trainer.eval_metrics=meteor: allowed are exact_match" in refused("trainer.eval_metrics=[meteor]")
    assert "set trainer.eval_strategy to epoch or steps" in refused("trainer.eval_metrics=[anls]")
    assert (
        "allowed are exact_match, vqa_accuracy, anls, cider, bleu, rouge, iou, acc@0.5, point_in_box, retrieval, or"
        in refused("trainer.eval_metrics=[loss]")
    )
    assert "eval_retrieval_candidates=1: at least 2" in refused("trainer.eval_retrieval_candidates=1")
    assert "eval_metrics_samples=0: at least 1" in refused("trainer.eval_metrics_samples=0")


@pytest.mark.slow
def test_two_ranks_answer_as_one_does(
    common: list[str], train: Callable[..., Path], world: Path, held_out: Path, tmp_path: Path
):
    """Under ZeRO-3 too, where every rank takes part in every call; text-only records are among them."""
    words = [
        *ANSWERS, "trainer.eval_metrics=[exact_match,anls,rouge,retrieval]", f"dataset.eval_path={held_out}",
        "trainer.eval_metrics_samples=12", "trainer.eval_retrieval_candidates=3",
    ]  # fmt: skip
    name, folder, *rest = make_run_config(world, tmp_path / "single")
    single = evaluated(train(name, folder, *rest, *words))
    launch([
        "-cn", name, *common, *rest, *words, "trainer.deepspeed=zero3", f"trainer.output_dir={tmp_path / 'two'}",
        "trainer.per_device_train_batch_size=4",
    ])  # fmt: skip
    two = evaluated(tmp_path / "two")
    assert single["eval_exact_match"] == 0.5
    for measure in ("loss", "loss_ci95", "exact_match", "anls", "rouge", "retrieval", "retrieval_ci95"):
        assert two[f"eval_{measure}"] == pytest.approx(single[f"eval_{measure}"], abs=2e-3)
