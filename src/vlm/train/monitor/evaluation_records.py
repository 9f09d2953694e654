"""Keeps what an evaluation found of each record, so that runs can be compared record by record."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.data.dataset import SampleDataset
from vlm.data.record_identity import identify_records
from vlm.runs.evaluated_records import MAX_RECORDS, RECORDS_FOLDER, EvaluatedRecords, records_file
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.objectives.base import Objective


class EvaluationRecords(TrainerCallback):
    """Writes `eval_records/STEP.json` at each evaluation; files but those of the last and the best one are removed.

    Args:
        folder: the run directory.
        objective: the run's, whose `record_sums` are written.
        dataset: the evaluation records; None, or a stream: nothing is written.
        best_step: returns the step of the best evaluation before this one; None: none is kept.
    """

    def __init__(self, folder: Path, objective: Objective, dataset: object, best_step: Callable[[], int | None]):
        self.folder, self.objective, self.dataset, self.best_step = folder, objective, dataset, best_step

    @cached_property
    def _identity(self) -> str | None:
        return identify_records(self.dataset) if isinstance(self.dataset, SampleDataset) else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Write the file of this evaluation."""
        sums = {name: one for name, one in self.objective.record_sums.items() if one.is_finite}
        if not state.is_world_process_zero or not sums or self._identity is None:
            return
        if max(len(one.sums) for one in sums.values()) > MAX_RECORDS:
            return
        kept = {records_file(step) for step in (state.global_step, self.best_step()) if step is not None}
        (self.folder / RECORDS_FOLDER).mkdir(exist_ok=True)
        content = EvaluatedRecords(self._identity, sums).to_json()
        write_text_whole(self.folder / records_file(state.global_step), content)
        for file in (self.folder / RECORDS_FOLDER).glob("*.json"):
            if f"{RECORDS_FOLDER}/{file.name}" not in kept:
                file.unlink()
