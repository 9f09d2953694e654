"""Outputs of heads: those of several sets as those of one, and the metrics that a run logs of them."""

import numpy as np
import pytest
import torch

from vlm.models.configuration_prediction import HeadSettings
from vlm.train.heads.outputs import (
    HeadOutputs,
    _make_head_outputs,
    concatenate_outputs,
    head_metrics,
    record_losses,
)


def outputs(*values: float, targets: list[float], loss: float, groups: list[int] | None = None) -> HeadOutputs:
    ranking_groups = None if groups is None else np.array(groups)
    return HeadOutputs(np.array(values)[:, None], np.array(targets), ranking_groups, loss)


def test_sets_of_samples_stand_one_behind_the_other():
    joined = concatenate_outputs(
        [outputs(1, 2, 3, targets=[0, 1, 1], loss=0.5), outputs(4, targets=[0], loss=2.5)]
    )  # fmt: skip
    assert joined.outputs.tolist() == [[1], [2], [3], [4]]
    assert joined.targets.tolist() == [0, 1, 1, 0]
    assert joined.ranking_groups is None
    assert joined.loss == pytest.approx(1.0)  # a mean over samples, not over sets


def test_groups_of_rankings_are_joined_too():
    parts = [outputs(1, 2, targets=[0, 1], loss=1, groups=[3, 3]), outputs(1, targets=[0], loss=1, groups=[5])]
    groups = concatenate_outputs(parts).ranking_groups
    assert groups is not None
    assert groups.tolist() == [3, 3, 5]


def test_metrics_of_several_heads_have_their_names():
    bright = HeadSettings(name="bright", task="binary", labels=["no", "yes"])
    light = HeadSettings(name="light", task="regression")
    said = {
        "bright": outputs(-2, 3, -1, targets=[0, 1, 0], loss=0.25),
        "light": outputs(1, 2, 3.5, targets=[1, 2, 3], loss=0.75),
    }
    alone = head_metrics([bright], said)
    assert (alone["loss"], alone["accuracy"]) == (0.25, 1)
    both = head_metrics([bright, light], said)
    assert (both["bright_loss"], both["light_loss"]) == (0.25, 0.75)
    assert both["bright_accuracy"] == 1
    assert both["light_mae"] == pytest.approx(0.5 / 3)
    assert "loss" not in both


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression", "pairwise"])
def test_the_losses_of_samples_or_groups_are_those_of_their_mean(task: str):
    random, number = np.random.default_rng(0), 3 if task == "multiclass" else 2
    labels = {"labels": [str(at) for at in range(number)]} if task in ("binary", "multiclass") else {}
    loss = {"binary": "bce", "multiclass": "ce", "regression": "mse", "pairwise": "margin"}[task]
    head = HeadSettings(name="it", task=task, loss=loss, **labels)
    width = {"binary": 1, "multiclass": 3, "regression": 1, "pairwise": 1}[task]
    batch = {
        "outputs": {"it": torch.tensor(random.normal(size=(24, width)))},
        "labels": {"it": torch.tensor(random.integers(0, number, (24, 1))).float()},
        "groups": torch.arange(24) // 2,
    }
    batch["labels"]["it"][5] = torch.nan
    outputs = _make_head_outputs(head, [batch])
    losses = record_losses([head], {"it": outputs})["loss"]
    assert losses.value == pytest.approx(outputs.loss, rel=1e-5)
    assert len(losses.sums) == (12 if task == "pairwise" else 23)
    logged = head_metrics([head], {"it": outputs})
    if task != "pairwise":
        assert logged["loss_ci95"] == pytest.approx(1.96 * losses.sums.std(ddof=1) / 23**0.5)
