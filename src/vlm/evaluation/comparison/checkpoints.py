"""Comparing two checkpoints: one model is in memory at a time, and what each made of the records is kept in tables.

`before.jsonl` and `after.jsonl` have a row for each record, `before-on-after.jsonl` the losses of the model before on
the answers of the one after. A comparison that is stopped goes on with the first row that is missing.
"""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from vlm.config.schema import InferenceConfig
from vlm.data.cache import json_digest
from vlm.data.sample import BadSample, Sample
from vlm.evaluation.comparison.measure import Measured, Measurer
from vlm.evaluation.comparison.records import ComparedRecord
from vlm.evaluation.comparison.report import Comparison, compare, write_comparison
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.resumable_table import ResumableTable
from vlm.models.text_loss import SupervisedScores

STATE_FILE = "state.json"
"""The fingerprints of the tables that are finished."""

Records = Sequence[ComparedRecord | BadSample]
Row = dict[str, object]


@dataclass(frozen=True)
class ComparedCheckpoint:
    """A checkpoint to compare.

    Attributes:
        name: as the user calls it.
        fingerprint: of its weights and of how it is loaded.
        load: loads it.
    """

    name: str
    fingerprint: str
    load: Callable[[], VisionLanguageModel]

    @contextmanager
    def loaded(self) -> Iterator[VisionLanguageModel]:
        """Yield the model, and free its memory afterwards."""
        ready = self.load()
        try:
            yield ready
        finally:
            ready.feature_cache = None
            del ready
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class ComparisonSettings:
    """How checkpoints are compared.

    Attributes:
        metrics: metrics of answers to records of the user's.
        inference: generation settings.
        batch_size: number of records in a batch.
        data_fingerprint: of all that the records depend on, besides the models' processors.
        overwrite: whether to replace tables that were made of something else.
    """

    metrics: Sequence[str]
    inference: InferenceConfig
    batch_size: int
    data_fingerprint: str
    overwrite: bool = False


def compare_checkpoints(
    before: ComparedCheckpoint,
    after: ComparedCheckpoint,
    read: Callable[[VisionLanguageModel], Records],
    settings: ComparisonSettings,
    folder: Path,
    run_info: dict[str, object],
) -> Comparison:
    """Compare two checkpoints on records, and write everything into a folder.

    Args:
        before: the checkpoint before.
        after: the one after.
        read: returns the records as a model reads them, each time in the same order.
        settings: how they are compared.
        folder: the folder of tables and reports.
        run_info: how the comparison was made, for `results.json`.

    Raises:
        ValueError: the folder has tables of other checkpoints, records or settings; or nothing can be compared.
    """
    tables = _Tables(folder, settings)
    prints = before.fingerprint, after.fingerprint
    tables.check({"before": prints[:1], "after": prints[::-1], "before-on-after": prints})
    with before.loaded() as ready:
        rows_before = tables.measure("before", prints[:1], ready, read(ready))
    answers = [row.answer for row in rows_before]
    with after.loaded() as ready:
        records = read(ready)
        rows_after = tables.measure("after", prints[::-1], ready, records, answers)
        samples = [record.sample if isinstance(record, ComparedRecord) else None for record in records]
    with before.loaded() as ready:
        losses = tables.losses("before-on-after", prints, ready, read(ready), [row.answer for row in rows_after])
    rows_before = [replace(row, other_loss=loss) for row, loss in zip(rows_before, losses, strict=True)]
    comparison, places = compare((before.name, after.name), rows_before, rows_after, settings.metrics)
    compared: list[Sample] = [sample for place in places if (sample := samples[place]) is not None]
    write_comparison(comparison, compared, folder, run_info)
    return comparison


@dataclass
class _Tables:
    """The tables of a comparison in their folder, each with the fingerprint of what it was made of."""

    folder: Path
    settings: ComparisonSettings

    def check(self, names: dict[str, tuple[str, ...]]) -> None:
        """Refuse a folder with tables of something else, before any model loads; with `overwrite`, remove these."""
        state = self._state()
        for name, models in names.items():
            if state.get(name, fingerprint := self._fingerprint(models)) == fingerprint:
                continue
            if not self.settings.overwrite:
                raise ValueError(
                    f"{self._path(name)} was made from another checkpoint, other records or other "
                    "options; name another "
                    "folder with --output, or give --overwrite"
                )
            self._path(name).unlink(missing_ok=True)

    def measure(
        self,
        name: str,
        models: tuple[str, ...],
        ready: VisionLanguageModel,
        records: Records,
        others: Sequence[str | None] = (),
    ) -> list[Measured]:
        """Return what a model makes of all records, from the table or measured now."""
        measurer = Measurer(ready, self.settings.inference, SupervisedScores(ready.model))

        def run(part: slice) -> list[Row]:
            """Measure a batch of records."""
            return [row.as_row() for row in measurer.measure(records[part], others[part])]

        return [Measured.from_row(row) for row in self._fill(name, models, len(records), run)]

    def losses(
        self,
        name: str,
        models: tuple[str, ...],
        ready: VisionLanguageModel,
        records: Records,
        answers: Sequence[str | None],
    ) -> list[float | None]:
        """Return a model's losses of given answers, from the table or measured now."""
        measurer = Measurer(ready, self.settings.inference, SupervisedScores(ready.model))

        def run(part: slice) -> list[Row]:
            """Measure a batch of answers."""
            return [{"loss": loss} for loss in measurer.losses_of_answers(records[part], answers[part])]

        rows = self._fill(name, models, len(records), run)
        return [loss if isinstance(loss := row["loss"], float) else None for row in rows]

    def _fill(self, name: str, models: tuple[str, ...], number: int, run: Callable[[slice], list[Row]]) -> list[Row]:
        """Return the rows of a table of so many records, and make those that are missing, batch by batch."""
        path, fingerprint = self._path(name), self._fingerprint(models)
        if path.exists() and self._state().get(name) == fingerprint:
            with path.open(encoding="utf-8") as file:
                return list(map(json.loads, file))
        table = ResumableTable(path, (), fingerprint)
        done = table.begin_or_resume(overwrite=self.settings.overwrite)
        size = self.settings.batch_size
        with (
            table.open_writer() as write,
            tqdm(total=number, initial=len(done), desc=name, unit="record", disable=None) as bar,
        ):
            for start in range(0, number, size):
                numbers = range(start, min(start + size, number))
                if done.issuperset(numbers):
                    continue
                write(zip(numbers, run(slice(start, start + size)), strict=True))
                bar.update(len(set(numbers) - done))
        rows = table.rows()
        table.finalize()
        state = json.dumps(self._state() | {name: fingerprint}, indent=2)
        self.folder.joinpath(STATE_FILE).write_text(f"{state}\n", encoding="utf-8")
        return rows

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _state(self) -> dict[str, str]:
        """Return the fingerprints of finished tables, by their names."""
        file = self.folder / STATE_FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _fingerprint(self, models: tuple[str, ...]) -> str:
        settings = self.settings
        return json_digest(models, settings.data_fingerprint, vars(settings.inference))
