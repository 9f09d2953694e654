"""The results of `vlm eval` in a run directory. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from vlm.checks.weights import is_of_other_weights
from vlm.runs.files import Folder, JsonObject, as_number, get, mapping_at, number_at


@dataclass(frozen=True)
class Evaluation:
    """The results of `vlm eval` for a run's model.

    Attributes:
        name: the folder's path below `eval/`, mostly the name of the data.
        folder: where its `results.json` and its answers are.
        results: its `results.json`.
        scores: metric -> its value and the ends of its 95% interval, None if there are none.
        is_of_other_weights: whether the run's checkpoint was replaced since.
    """

    name: str
    folder: Path
    results: JsonObject = field(default_factory=dict)
    scores: dict[str, tuple[float | None, float | None, float | None]] = field(default_factory=dict)
    is_of_other_weights: bool = False


def read_evaluations(run: Path, files: Folder) -> list[Evaluation]:
    """Return the results of `vlm eval` for a run's model, by name.

    Args:
        run: the run directory.
        files: its files; damaged ones are added to `damaged`.
    """
    found = []
    for file in files.files("eval/**/results.json"):
        folder = Folder(file.parent)
        results = folder.json(file.name)
        name = file.parent.relative_to(run / "eval").as_posix()
        files.damaged |= {f"eval/{name}/{key}": why for key, why in folder.damaged.items()}
        name, stale = "evaluation" if name == "." else name, is_of_other_weights(results, run)
        found.append(Evaluation(name, file.parent, results, read_scores(results), stale))
    return found


def read_scores(results: JsonObject) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Return metric -> value and ends of its interval, of a `results.json`; for tasks of lmms-eval, by task."""
    if metrics := mapping_at(results, "metrics"):
        return {name: _score(score) for name, score in metrics.items()}
    tasks = mapping_at(results, "results")
    return {f"{task} {name}": _score(score) for task in tasks for name, score in mapping_at(tasks, task).items()}


def _score(score: object) -> tuple[float | None, float | None, float | None]:
    if not isinstance(score, dict):
        return as_number(score), None, None
    return as_number(get(score, "value")), number_at(score, "low"), number_at(score, "high")
