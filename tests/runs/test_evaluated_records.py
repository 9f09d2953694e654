"""What evaluations found of each record, written and read back, and differences on the same records."""

from pathlib import Path

import numpy as np
import pytest

from tests.runs.directories import write_records
from vlm.evaluation.bootstrap import Score, bootstrap
from vlm.evaluation.record_sums import RecordSums, difference
from vlm.runs.evaluated_records import (
    MAX_RECORDS,
    EvaluatedRecords,
    paired_metric,
    paired_resamples,
    read_evaluated_records,
    records_file,
    resamples_as_json,
)
from vlm.runs.files import Folder

SUMS, COUNTS = np.linspace(0.1, 12.34567, 30), np.arange(1.0, 31.0)


def test_what_is_written_is_read_back_and_paired(tmp_path: Path):
    write_records(tmp_path, 5, {"loss": (SUMS, COUNTS), "blank_loss": (2 * SUMS, COUNTS)})
    write_records(tmp_path, 6, {"loss": (SUMS + 1, COUNTS)})
    first, other = (read_evaluated_records(Folder(tmp_path), records_file(step)) for step in (5, 6))
    assert first is not None
    assert np.allclose(first.metrics["loss"].sums, SUMS, rtol=1e-5)
    wanted = difference(RecordSums(SUMS, COUNTS), RecordSums(SUMS + 1, COUNTS))
    found = paired_metric(first, other, "eval_loss")
    assert found is not None
    assert (found.value, found.low) == pytest.approx((wanted.value, wanted.low), abs=1e-5)
    assert paired_metric(first, other, "blank_loss") is None
    assert paired_metric(first, None, "loss") is None


def test_finite_metrics_of_not_too_many_records_are_kept():
    finite, infinite = RecordSums(SUMS, COUNTS), RecordSums(SUMS * np.inf, COUNTS)
    kept = EvaluatedRecords.to_keep("val", {"loss": finite, "blank_loss": infinite})
    assert kept is not None
    assert list(kept.metrics) == ["loss"]
    assert EvaluatedRecords.to_keep("val", {"blank_loss": infinite}) is None
    many = np.ones(MAX_RECORDS + 1)
    assert EvaluatedRecords.to_keep("val", {"loss": RecordSums(many, many)}) is None


def test_other_records_are_not_paired(tmp_path: Path):
    write_records(tmp_path, 5, {"loss": (SUMS, COUNTS)})
    write_records(tmp_path, 6, {"loss": (SUMS, COUNTS)}, records="others")
    pair = [read_evaluated_records(Folder(tmp_path), records_file(step)) for step in (5, 6)]
    assert paired_metric(*pair, "loss") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"records": "a"}',
        '{"records": "a", "metrics": {"loss": {"sums": [1]}}}',
        '{"records": "a", "metrics": {"loss": {"sums": ["x"], "counts": [1]}}}',
    ],
)
def test_a_damaged_file_is_none(tmp_path: Path, content: str):
    (tmp_path / "eval_records").mkdir()
    (tmp_path / "eval_records" / "5.json").write_text(content)
    assert read_evaluated_records(Folder(tmp_path), records_file(5)) is None


def test_differences_of_resamples_are_those_of_the_bootstrap_of_both():
    """Metrics that are no ratio of sums, on the same resamples: as if the difference itself were resampled."""
    random = np.random.default_rng(0)
    before = random.normal(0, 1, 50)
    after = before + random.normal(0.2, 0.1, 50)

    def measure(values: np.ndarray) -> dict[str, Score]:
        return bootstrap(lambda rows: {"median": float(np.median(values[rows]))}, 50, 200, seed=0)

    scores = measure(before), measure(after)
    entries = [resamples_as_json("val", one) for one in scores]
    found = paired_resamples(*entries, "median", [one["median"].value for one in scores])
    wanted = bootstrap(
        lambda rows: {"difference": float(np.median(after[rows]) - np.median(before[rows]))}, 50, 200, seed=0
    )["difference"]
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high), abs=1e-4)
    other = resamples_as_json("others", scores[1])
    assert paired_resamples(entries[0], other, "median", [0.0, 0.0]) is None
    assert paired_resamples({}, {}, "median", [0.0, 0.0]) is None
