"""What evaluations found of each record, and what two runs differ in on the same records.

`eval_records/STEP.json` has it of a run's last evaluation and of its best; `train/monitor/evaluation_records.py` writes
it. `record_sums.json`, beside the `results.json` of `vlm eval`, has it of the losses there; `cli/evaluate.py` writes
it. Metrics of heads are no ratios of sums: `scores_resampled.json` has them on each resample of the records, which are
the same resamples for all runs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.evaluation.bootstrap import Score, make_score
from vlm.evaluation.record_sums import RecordSums, difference
from vlm.runs.files import Folder, as_number, list_at, mapping_at, text_at

RECORDS_FOLDER = "eval_records"
RECORD_SUMS_FILE = "record_sums.json"
RESAMPLES_FILE = "scores_resampled.json"
MAX_RECORDS = 100_000
"""Most records of an evaluation that are kept: of more, intervals are narrow without pairs."""
DIGITS = 6


@dataclass(frozen=True)
class EvaluatedRecords:
    """Metrics of the records of one evaluation.

    Attributes:
        records: a digest of which records they are, in their order.
        metrics: metric, without `eval_` -> its sum and count of each record.
    """

    records: str
    metrics: Mapping[str, RecordSums]

    @classmethod
    def to_keep(cls, records: str, metrics: Mapping[str, RecordSums]) -> "EvaluatedRecords | None":
        """Return what is kept of an evaluation: its finite metrics; None without any, and for too many records."""
        finite = {name: sums for name, sums in metrics.items() if sums.is_finite}
        if not finite or max(len(sums.sums) for sums in finite.values()) > MAX_RECORDS:
            return None
        return cls(records, finite)

    def to_json(self) -> str:
        """Return the content of a file, in a line for each metric."""
        lines = [
            f'{json.dumps(name)}: {{"sums": {_numbers(one.sums)}, "counts": {_numbers(one.counts)}}}'
            for name, one in self.metrics.items()
        ]
        listed = ",\n".join(lines)
        return f'{{"records": {json.dumps(self.records)}, "metrics": {{\n{listed}\n}}}}\n'


def _numbers(values: np.ndarray) -> str:
    return f"[{', '.join(f'{value:.{DIGITS}g}' for value in values.tolist())}]"


def records_file(step: int) -> str:
    """Return the name of the file of an evaluation, within the run directory."""
    return f"{RECORDS_FOLDER}/{step}.json"


def read_evaluated_records(folder: Folder, file: str) -> EvaluatedRecords | None:
    """Return what an evaluation found of each record; None if that was not kept, or its file is damaged.

    Args:
        folder: the run directory, or the folder of an evaluation.
        file: its name there: `records_file` of a step, or `RECORD_SUMS_FILE`.
    """
    content = folder.json(file)
    metrics: dict[str, RecordSums] = {}
    for name in mapping_at(content, "metrics"):
        columns = [list(map(as_number, list_at(content, "metrics", name, key))) for key in ("sums", "counts")]
        if len(columns[0]) != len(columns[1]) or None in columns[0] or None in columns[1]:
            return None
        sums, counts = (np.array(column, dtype=np.float64) for column in columns)
        metrics[name] = RecordSums(sums, counts)
    records = text_at(content, "records")
    return EvaluatedRecords(records, metrics) if records and metrics else None


def paired_metric(first: EvaluatedRecords | None, other: EvaluatedRecords | None, metric: str) -> Score | None:
    """Return a metric of `other` minus that of `first`; None if they are not of the same records.

    `metric` may begin with `eval_`.
    """
    name = metric.removeprefix("eval_")
    if first is None or other is None or first.records != other.records:
        return None
    before, after = first.metrics.get(name), other.metrics.get(name)
    if before is None or after is None or len(before.sums) != len(after.sums):
        return None
    return difference(before, after)


def resamples_as_json(records: str, scores: Mapping[str, Score]) -> dict[str, object]:
    """Return the entry of a head in `scores_resampled.json`; null where a metric is undefined on a resample.

    Args:
        records: a digest of the records and of all that the resamples depend on.
        scores: the metrics, as `bootstrap` gives them.
    """
    metrics = {name: [_rounded(value) for value in score.resampled] for name, score in scores.items()}
    return {"records": records, "metrics": metrics}


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def paired_resamples(first: object, other: object, metric: str, values: Sequence[float | None]) -> Score | None:
    """Return a metric of `other` minus that of `first`; None if the resamples are not of the same records.

    Args:
        first: the entry of a head, see `resamples_as_json`.
        other: that of another run.
        metric: its name.
        values: the metric on all records, of both.
    """
    columns = [list(map(as_number, list_at(entry, "metrics", metric))) for entry in (first, other)]
    if text_at(first, "records") != text_at(other, "records") or len(columns[0]) != len(columns[1]) or not columns[0]:
        return None
    if values[0] is None or values[1] is None:
        return None
    pairs = zip(*columns, strict=True)
    differences = [after - before for before, after in pairs if before is not None and after is not None]
    return make_score(values[1] - values[0], differences)
