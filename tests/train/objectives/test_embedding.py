"""Runs that learn vectors: what they leave behind, on which start they go on, what they refuse; two ranks as one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import check_config, compose_config, losses
from tests.train.embeddings.embedding_runs import WORDS, few_resamples, write_pairs
from tests.train.test_distributed_runs import launch
from vlm import Embedder, Predictor
from vlm.checks.fields import ConfigError
from vlm.runs.read import RunDirectory

METRICS = {"loss", "mrr", "reverse_mrr", *(f"{way}recall@{depth}" for way in ("", "reverse_") for depth in (1, 5, 10))}


@pytest.fixture(scope="module")
def pairs(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pairs(labelled, tmp_path_factory.mktemp("pairs") / "pairs.json")


@pytest.fixture(scope="module")
def finished(train: Callable[..., Path], pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a learned temperature, with a linear head on a frozen encoder, and a test set."""
    with few_resamples():
        return train(
            "embed-smol", tmp_path_factory.mktemp("embed") / "run", *pairs, *WORDS, "trainer/lora=none",
            "trainer.unfreeze.train_language_model=true", "model.head.type=linear", "model.head.dim=32",
            "model.head.loss_options.learned_temperature=true", "dataset.test_split=0.2", "trainer.eval_on_start=true",
        )  # fmt: skip


def test_a_run_measures_recall_in_both_directions(finished: Path):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert len(evaluations) == 2
    assert {f"eval_{name}" for name in METRICS} <= evaluations[0].keys()
    kept = RunDirectory(finished).records_at(evaluations[-1]["step"])
    assert kept is not None
    assert kept.metrics["loss"].value == pytest.approx(evaluations[-1]["eval_loss"], rel=1e-4)
    assert evaluations[0]["eval_loss"] != evaluations[1]["eval_loss"]
    assert all(line["temperature"] != 0.02 for line in lines if "loss" in line)
    found = json.loads((finished / "scores.json").read_text())
    assert found.keys() == {"evaluation", "test"}
    resampled = json.loads((finished / "scores_resampled.json").read_text())
    assert resampled["test"]["label"]["metrics"].keys() == found["test"]["label"]["scores"].keys()
    scores = found["test"]["label"]
    assert scores["scores"].keys() == METRICS - {"loss"}
    assert scores["widths"].keys() == {"8"}
    assert scores["baseline"]["recall@1"]["value"] == pytest.approx(1 / scores["documents"])
    assert "blank_pictures" in scores
    assert "nothing" in (finished / "first_batch.html").read_text()
    assert (finished / "best").is_dir()


def test_the_final_model_embeds_and_does_not_predict(finished: Path):
    embedder = Embedder.load(finished / "final", device="cpu")
    vectors = embedder.embed(["red of level 1", "blue"], side="document")
    assert vectors.shape == (2, 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    queries = embedder.embed(["red of level 1"], side="query")
    assert not np.allclose(queries[0], vectors[0]), "queries have a system turn"
    with pytest.raises(ValueError, match="has an embedding head"):
        Predictor.load(finished / "final")


def test_a_run_goes_on_from_a_checkpoint_with_its_head(
    train: Callable[..., Path], pairs: list[str], finished: Path, tmp_path: Path
):
    words = [
        *pairs,
        *WORDS,
        "trainer/lora=none",
        f"trainer.from_pretrained={finished / 'final'}",
        "trainer.max_steps=1",
    ]
    with few_resamples():
        folder = train("embed-smol", tmp_path / "run", *words, "model.head.type=linear", "model.head.dim=32")
    names = {"heads.label.layers.linear.weight", "heads.label.temperature.log_temperature"}
    before, after = (load_file(place / "final" / "model.safetensors") for place in (finished, folder))
    assert names <= before.keys() == after.keys()
    assert torch.equal(before["body.language_model.model.norm.weight"], after["body.language_model.model.norm.weight"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["model.head.task=binary"], "does not make vectors; choose model/head=embedding"),
        (["model.head.loss_options.temperature=0"], "temperature=0: a number above 0 is needed"),
        (["model.head.loss_options.widths=[8,8]"], "a list of different whole numbers"),
        (["model.head.dim=16"], "identity keeps the width of hidden states"),
        (["model.head.loss_options.width_weights=[1]"], "a number above 0 for each"),
        (["+model.head.prompts.passage=x"], "allowed are query, document"),
        (["trainer/lora=none", "trainer/unfreeze=head"], "nothing trains in this head"),
        (["dataset.over_length=truncate"], "records of embeddings are never cut"),
        (["dataset.system_prompt=Hi"], "set model.head.prompts.query"),
        (["dataset.folds=3"], "embeddings are evaluated on held-out records"),
        (["model.head.generation_weight=1"], "an embedding head trains alone"),
        (["trainer.packing=true"], "embeddings cannot be packed"),
        (["trainer.keep_best=recall@2"], "no evaluation measures it"),
        (["trainer.objective=prediction"], "it trains alone, with trainer.objective=embedding"),
    ],
)
def test_what_contradicts_vectors_is_refused(words: list[str], problem: str, common: list[str], pairs: list[str]):
    with pytest.raises(ConfigError, match=problem):
        check_config(compose_config("embed-smol", [*common, *pairs, *WORDS, "trainer/lora=language-model", *words]))


def test_widths_beyond_those_of_vectors_are_refused(train: Callable[..., Path], pairs: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match=r"\[64\] are larger than the width of vectors, 32"):
        train("embed-smol", tmp_path, *pairs, *WORDS, "model.head.loss_options.widths=[8,64]")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["null", "zero2", "zero3"])
def test_two_ranks_reach_the_single_process(
    train: Callable[..., Path], common: list[str], pairs: list[str], tmp_path: Path, stage: str
):
    words = [
        *pairs, *WORDS, "trainer.max_grad_norm=0", "trainer.train_sampling_strategy=sequential",
        "trainer.per_device_train_batch_size=8", "trainer/lora=none", "dataset.eval_split=0.34",
        "trainer.unfreeze.train_language_model=true", "model.head.loss_options.learned_temperature=true",
    ]  # fmt: skip
    with few_resamples():
        single = train("embed-smol", tmp_path / "single", *words)
    two = tmp_path / "two"
    launch(["-cn", "embed-smol", *common, *words, f"trainer.output_dir={two}", f"trainer.deepspeed={stage}",
            "trainer.per_device_train_batch_size=4"])  # fmt: skip
    assert losses(two) == pytest.approx(losses(single), abs=5e-4)
    found: list[Any] = [json.loads((folder / "scores.json").read_text()) for folder in (single, two)]
    scores, others = (
        {name: score["value"] for name, score in one["evaluation"]["label"]["scores"].items()} for one in found
    )
    assert others == pytest.approx(scores, abs=1e-6)


@pytest.mark.slow
def test_images_find_their_texts(train: Callable[..., Path], tmp_path: Path):
    """Scenes that were not trained on, of pairs of colour and shape that were: well above chance in half a minute."""
    from tests.train.embeddings.scene_pairs import write_scene_pairs

    words = write_scene_pairs(tmp_path, 700)
    folder = train(
        "embed-smol", tmp_path / "run", *words, "dataset.format=pair", "dataset.template=chatml",
        "trainer/unfreeze=all", "trainer/lora=none", "trainer/learning_rate=demo",
        "+trainer.learning_rate.head_learning_rate=1e-3",
        "trainer.num_train_epochs=4", "trainer.per_device_train_batch_size=32", "trainer.logging_steps=20",
        "model.head.loss_options={temperature:0.05,widths:[16,128]}", "dataset.eval_split=0.2",
    )  # fmt: skip
    scores = json.loads((folder / "scores.json").read_text())["evaluation"]["label"]
    assert scores["scores"]["recall@1"]["value"] > 0.5 > 20 * scores["baseline"]["recall@1"]["value"]
    assert scores["widths"]["16"]["recall@5"]["value"] > 0.5
    assert scores["blank_pictures"]["recall@1"]["value"] < 0.1
