"""Metrics of answers while a model trains: logged beside the loss, the same as those of its checkpoint afterwards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import config_of
from tests.train.test_distributed import launch
from vlm import VisionLanguageModel
from vlm.config import check as module
from vlm.config.check import ConfigError, check
from vlm.inference.text_metrics import METRICS, measure
from vlm.train.callbacks import read_metrics

ANSWERS = [
    "trainer.eval_metrics=[exact_match,anls,rouge]",
    "trainer.eval_metrics_samples=6",
    "trainer.eval_strategy=epoch",
    "inference.max_new_tokens=6",
    "trainer.num_samples=0",
]


def evaluated(run: Path) -> dict[str, float]:
    """The last line of a run's log that is of an evaluation."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line][-1]


def test_metrics_of_answers_stand_beside_the_loss(train: Callable[..., Path], world: Path, tmp_path: Path):
    """They are those of what the finished model answers to the first records."""
    records = json.loads((world / "records.json").read_text())
    for one in records:
        one["answers"] = [one["conversations"][-1]["value"].upper(), "6 cats"]
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(records))
    run = train(
        "pretrain-smol", tmp_path / "run", *ANSWERS, "trainer.num_train_epochs=1", f"dataset.eval_path={held_out}",
        "dataset.template=chatml", f"dataset.eval_image_folder={world / 'images'}",
    )  # fmt: skip
    line = evaluated(run)
    model = VisionLanguageModel.load(run / "final", device="cpu")
    first = records[:6]
    answers = [
        model.generate(
            one["conversations"][0]["value"].replace("<image>\n", ""),
            [world / "images" / one["image"]] if "image" in one else [], max_new_tokens=6,
        )
        for one in first
    ]  # fmt: skip
    found = measure(["exact_match", "anls", "rouge"], answers, [one["answers"] for one in first])
    for name, score in found.items():
        assert line[f"eval_{name}"] == pytest.approx(score.value, abs=1e-6)


def test_what_cannot_be_measured_is_refused(common: list[str]):
    def refused(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check(config_of("finetune-smol", [*common, "trainer.eval_strategy=no", *words]))
        return str(caught.value)

    assert "trainer.eval_metrics: meteor is none; allowed are exact_match" in refused("trainer.eval_metrics=[meteor]")
    assert "set trainer.eval_strategy to epoch or steps" in refused("trainer.eval_metrics=[anls]")
    assert "eval_metrics_samples=0: at least 1" in refused("trainer.eval_metrics_samples=0")


def test_the_names_are_those_of_the_table():
    assert tuple(METRICS) == module.EVAL_METRICS


@pytest.mark.slow
def test_two_ranks_answer_as_one_does(
    common: list[str], train: Callable[..., Path], world: Path, tmp_path: Path
):  # fmt: skip
    """Under ZeRO-3 too, where every rank takes part in every call; text-only records are among them."""
    words = [
        *ANSWERS, "trainer.num_train_epochs=1", "trainer.train_sampling_strategy=sequential",
        f"dataset.eval_path={world / 'records.json'}", f"dataset.eval_image_folder={world / 'images'}",
        "dataset.template=chatml", "trainer.eval_metrics_samples=12",
    ]  # fmt: skip
    single = evaluated(train("pretrain-smol", tmp_path / "single", *words))
    launch([
        "-cn", "pretrain-smol", *common, *words, "trainer.deepspeed=zero3", f"trainer.output_dir={tmp_path / 'two'}",
        "trainer.per_device_train_batch_size=4",
    ])  # fmt: skip
    two = evaluated(tmp_path / "two")
    for name in ("loss", "exact_match", "anls", "rouge"):
        assert two[f"eval_{name}"] == pytest.approx(single[f"eval_{name}"], abs=2e-3)
