"""What the report at the end of a run with heads says beside its tables."""

import numpy as np
import pytest

from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.models.configuration_prediction import HeadSettings
from vlm.train.heads import report


def settings(task: str, temperature: float) -> HeadSettings:
    return HeadSettings(name="kind", task=task, labels=["a", "b", "c"], temperature=temperature)


def test_a_temperature_explains_why_the_table_differs_from_the_log():
    note = report._note("evaluation", settings("multiclass", 1.626))
    assert "differ from those of the log, which are at temperature 1 (now 1.63); auroc and average_precision" in note
    assert "auroc" not in report._note("evaluation", settings("binary", 1.626))
    assert "the log" not in report._note("evaluation", settings("multiclass", 1.0))
    assert report._note("test", settings("multiclass", 1.626)) == "nothing was tuned on these records"
    assert report._note("evaluation", settings("regression", 1.0)) == ""


@pytest.mark.parametrize("classes", [2, 3])
def test_a_temperature_orders_records_anew_among_several_classes_only(classes: int):
    random = np.random.default_rng(0)
    outputs, targets = random.normal(size=(30, classes)) * 3, random.integers(0, classes, 30).astype(float)
    task = "multiclass"
    found = [scores(task, outputs, targets, calibration=Calibration(warm))["auroc"].value for warm in (1.0, 2.0)]
    assert (found[0] == found[1]) is (classes == 2)
