"""Prediction heads on two ranks on the CPU: they reach the single process, whatever of the model trains beside them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import head_words, losses
from tests.train.heads.head_runs import CONNECTOR, alone, scores_of
from tests.train.test_distributed_runs import launch

RUN = [  # of 48 records, 8 are measured on and 8 evaluated on: all batches of the others are whole ones
    "trainer.train_sampling_strategy=sequential", "trainer.max_steps=6", "trainer.eval_strategy=epoch",
    "dataset.test_split=0.16", "dataset.eval_split=0.2", "trainer.max_grad_norm=0",
    "trainer.learning_rate.connector_learning_rate=1e-3",
]  # fmt: skip
WORDS = {
    "frozen": ["model.head.pooling=attention"],
    "connector": [*CONNECTOR, "model.head.pooling=image"],
    "query": ["model.head.pooling=query"],
    "folds": ["dataset.folds=2", "dataset.eval_split=null", "trainer.eval_strategy=no"],
    "several": [
        *CONNECTOR, "model.head.name=colour", "dataset.options.label_key=[colour,light]",
        "model.head.extra_heads.light.task=regression", "model.head.extra_heads.light.pooling=alltoken",
    ],
    "replies": [
        *CONNECTOR, "dataset.format=tests.train.heads.head_runs:sometimes_answered", "dataset.options={}",
        "trainer.unfreeze.train_language_model=true", "model.head.generation_weight=0.5",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("frozen", "null"),
        ("frozen", "zero2"),
        ("connector", "zero2"),
        ("connector", "zero3"),
        ("query", "zero2"),
        ("query", "zero3"),
        ("folds", "zero2"),
        ("several", "null"),
        ("several", "zero2"),
        ("replies", "null"),
    ],
)
def test_two_ranks_reach_the_single_process(
    common: list[str], train_head: Callable[..., Path], labelled: Path, tmp_path: Path, kind: str, stage: str
):
    """Losses, measures and the saved heads; `null` is DistributedDataParallel."""
    words = [*RUN, *WORDS[kind], f"dataset.cache_dir={tmp_path / 'cache'}"]
    single = train_head("head-classification", "colour", tmp_path / "single", *words)
    shutil.rmtree(tmp_path / "cache" / "features", ignore_errors=True)  # each computes for itself
    two = tmp_path / "two"
    words = [*common, *head_words(labelled, "colour"), *words, f"trainer.output_dir={two}"]
    launch(["-cn", "head-classification", *words, f"trainer.deepspeed={stage}",
            "trainer.per_device_train_batch_size=4"])  # fmt: skip
    # Replies of other lengths: the mean over a rank's tokens is not that over all.
    assert losses(two) == pytest.approx(losses(single), abs=2e-2 if kind == "replies" else 5e-4)
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (single, two))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=5e-2 if kind == "replies" else 5e-3, msg=name)
    found = [json.loads((folder / "scores.json").read_text()) for folder in (single, two)]
    sizes = [
        {(part, name): head["records"] for part, heads in one.items() for name, head in heads.items()} for one in found
    ]
    assert sizes[0] == sizes[1]
    first = "colour" if kind == "several" else "label"
    assert np.isclose(scores_of(two, "test", first)["auroc"], scores_of(single, "test", first)["auroc"], atol=0.05)
    if kind == "query":
        rows = "body.language_model.model.embed_tokens.weight"
        begun = load_file(before(tmp_path, train_head))[rows]
        still = 0 if stage == "zero2" else 1e-3  # ZeRO-3 draws the rows of new tokens in another precision
        moved = ((others[rows] - begun).abs() > still).any(dim=1)
        assert moved.nonzero()[:, 0].tolist() == alone(two / "final").model.config.suffix_ids


def before(folder: Path, train_head: Callable[..., Path]) -> Path:
    """The weights that a run begins with: those of one that learns nothing."""
    still = ["trainer.learning_rate.language_model_learning_rate=1e-30", "model.head.pooling=query"]
    run = train_head("head-classification", "colour", folder / "still", *RUN, *still, "trainer.max_steps=1")
    return run / "final" / "model.safetensors"
