"""Keeps what an evaluation found of each record, so that runs can be compared record by record."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.data.dataset import SampleDataset
from vlm.data.record_identity import identify_records
from vlm.runs.evaluated_records import RECORDS_FOLDER, EvaluatedRecords, records_file
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
        if not state.is_world_process_zero or not self.objective.record_sums or self._identity is None:
            return
        evaluated = EvaluatedRecords.to_keep(self._identity, self.objective.record_sums)
        if evaluated is None:
            return
        kept = {records_file(step) for step in (state.global_step, self.best_step()) if step is not None}
        (self.folder / RECORDS_FOLDER).mkdir(exist_ok=True)
        write_text_whole(self.folder / records_file(state.global_step), evaluated.to_json())
        for file in (self.folder / RECORDS_FOLDER).glob("*.json"):
            if f"{RECORDS_FOLDER}/{file.name}" not in kept:
                file.unlink()
