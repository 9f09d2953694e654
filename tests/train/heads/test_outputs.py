"""Outputs of heads: those of several sets as those of one, and the metrics that a run logs of them."""

import numpy as np
import pytest

from vlm.models.configuration_prediction import HeadSettings
from vlm.train.heads.outputs import HeadOutputs, concatenate_outputs, head_metrics


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
