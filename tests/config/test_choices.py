"""Names that the schema lists without importing torch: each list is that of the table elsewhere."""

import inspect

import numpy as np
import torch
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from vlm.config import choices
from vlm.data.pairs.dataset import Members
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.embedding_metrics import embedding_scores
from vlm.evaluation.hallucination import HALLUCINATION_METRICS
from vlm.evaluation.head_metrics import scores
from vlm.evaluation.loss_metrics import LOSS_METRICS
from vlm.evaluation.object_metrics import OBJECT_METRICS
from vlm.evaluation.text_metrics import METRICS
from vlm.models import head_losses
from vlm.models.configuration_vlm import FEATURE_STRATEGIES
from vlm.models.head_tasks import CLASSIFICATION_TASKS, EMBEDDING, NUM_OUTPUTS_BY_TASK, TASKS
from vlm.models.heads import HEADS
from vlm.models.pixels import ALPHA_BACKGROUNDS
from vlm.models.poolings import POOLINGS
from vlm.models.processing_vlm import IMAGE_MODES


def keywords(function: object) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()  # pyright: ignore[reportArgumentType] - a function
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def test_losses_are_those_of_the_code():
    ours = {task: names for task, names in choices.LOSSES.items() if task not in head_losses.STEP_LOSSES}
    assert ours == {task: tuple(losses) for task, losses in head_losses.LOSSES.items()}
    assert set(choices.LOSSES) == set(TASKS) == {*NUM_OUTPUTS_BY_TASK, EMBEDDING}


def test_loss_options_are_keyword_parameters():
    functions = {name: loss for losses in head_losses.LOSSES.values() for name, loss in losses.items()}
    functions |= {choices.LOSSES[task][0]: loss for task, loss in head_losses.STEP_LOSSES.items()}
    options = {name: keywords(function) for name, function in functions.items()}
    assert {name: names for name, names in options.items() if names} == choices.LOSS_OPTIONS


def test_head_options_are_keyword_parameters():
    ours = {name: kind for name, kind in HEADS.items() if ":" not in name}  # other tests may have added their own
    assert {name: keywords(kind.__init__) for name, kind in ours.items()} == choices.HEAD_TYPES


def test_head_metrics_are_those_that_are_measured():
    targets = {"multilabel": np.array([[0, 1], [1, 0], [1, 1], [0, 0]]), "regression": np.arange(4.0)}
    for task in NUM_OUTPUTS_BY_TASK:
        names = choices.HEAD_METRICS[task]
        known = targets.get(task, np.array([0, 1, 1, 0]))
        outputs = np.random.RandomState(0).randn(4, 1 if task in ("binary", "regression", "pairwise") else 2)
        groups = np.zeros(4) if task == "pairwise" else None
        measured = scores(task, outputs, known, Calibration(), groups=groups, num_resamples=0)
        assert set(measured) == set(names), task
    members = Members(np.zeros((4, 2)), np.array([0, 1]), np.array([2, 3]), np.array([2, 3]))
    assert set(embedding_scores(torch.eye(4), members, num_resamples=0)) == set(choices.HEAD_METRICS[EMBEDDING])


def test_the_other_lists_are_those_of_the_code():
    assert tuple(POOLINGS) == choices.POOLINGS
    assert choices.CLASSIFICATION_TASKS == CLASSIFICATION_TASKS
    assert choices.FEATURE_STRATEGIES == FEATURE_STRATEGIES
    assert choices.IMAGE_MODES == IMAGE_MODES
    assert tuple(ALPHA_BACKGROUNDS) == choices.ALPHA_BACKGROUNDS
    assert tuple(METRICS) == choices.ANSWER_METRICS
    assert tuple(LOSS_METRICS) == choices.LOSS_METRICS
    assert tuple(OBJECT_METRICS) == choices.OBJECT_METRICS
    assert tuple(HALLUCINATION_METRICS) == choices.HALLUCINATION_METRICS
    assert set(choices.EVAL_METRICS) == {*METRICS, *OBJECT_METRICS, *LOSS_METRICS} - {"loss"}, (
        "the loss is always measured"
    )
    assert set(choices.CACHE_IMPLEMENTATIONS) <= set(ALL_CACHE_IMPLEMENTATIONS)
