"""Running lmms-eval's tasks in its own environment, and reading what came of them.

lmms-eval pins an antlr4 that Hydra's omegaconf cannot live with, so it has an environment of its own: `make
install-eval` makes `.venv-eval`. Imports the standard library and siblings that do.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm.evaluation.published import published

VENV_PYTHON = Path(".venv-eval", "bin", "python")
REPOSITORY = Path(__file__).parents[3]
"""The clone's folder, where this package runs out of one."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: the metric's name, with a filter's where there is one.
        value: the number; None where lmms-eval gives none (a file to submit).
        error: its standard error, if it has one.
    """

    task: str
    metric: str
    value: float | None
    error: float | None


def find_interpreter(requested: Path | None) -> str:
    """The Python that has lmms-eval: the given one, this one, or that of `.venv-eval` here or in the clone.

    Raises:
        ValueError: there is none, or it has not both lmms-eval and this package.
    """
    here = [Path(sys.executable)] if importlib.util.find_spec("lmms_eval") else []
    places = [requested] if requested is not None else [*here, VENV_PYTHON, REPOSITORY / VENV_PYTHON]
    found = next((place for place in places if place.is_file()), None)
    if found is None and requested is not None:
        raise ValueError(f"--lmms-eval-python {requested}: no such file")
    if found is None:
        raise ValueError(
            "lmms-eval needs an environment of its own: make install-eval, in a clone, makes .venv-eval; "
            "--lmms-eval-python names the Python of another one"
        )
    look = (
        "import importlib.util as u, sys; "
        "sys.exit(','.join(name for name in ('lmms_eval', 'vlm') if not u.find_spec(name)) or 0)"
    )
    asked = subprocess.run([str(found), "-c", look], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"{found}: {asked.stderr.strip() or 'it'} is missing there; make install-eval makes "
                         ".venv-eval with both lmms-eval and vlm")  # fmt: skip
    return str(found)


def format_model_args(values: dict[str, object]) -> str:
    """Arguments of a model as lmms-eval reads them.

    Raises:
        ValueError: a value has a comma, a quote or a bracket in it, which would be read as something else.
    """
    for name, value in values.items():
        if set(str(value)) & set(",'\"[]{}"):
            raise ValueError(f"{name}={value}: lmms-eval cannot be told a name with a comma, a quote or a bracket")
    return ",".join(f"{name}={value}" for name, value in values.items())


def run_tasks(
    python: str, arguments: str, tasks: Sequence[str], *, batch_size: int, limit: float | None = None,
    include: Path | None = None,
) -> dict[str, dict[str, object]]:  # fmt: skip
    """Run tasks, whose output is shown as it comes.

    Args:
        python: the interpreter, see `interpreter`.
        arguments: of the model, see `model_args`.
        tasks: their names.
        batch_size: requests at a time.
        limit: of each task the first so many documents, or this share of them.
        include: a folder with further tasks.

    Returns:
        What lmms-eval calls its results: task -> metric -> value.

    Raises:
        ValueError: it came to no results.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-eval-") as folder:
        words = [
            python, "-m", "lmms_eval", "--model", "vlm", "--model_args", arguments, "--tasks", ",".join(tasks),
            "--batch_size", str(batch_size), "--output_path", folder,
            *([] if limit is None else ["--limit", f"{limit:g}"]),
            *([] if include is None else ["--include_path", str(include)]),
        ]  # fmt: skip
        subprocess.run(words, env=make_environment(), check=False)
        written = sorted(Path(folder).rglob("*_results.json"))  # on a failure it says so and ends as if all were well
        if not written:
            raise ValueError("lmms-eval came to no results; what it printed last says why")
        return json.loads(written[-1].read_text(encoding="utf-8"))["results"]


def make_environment() -> dict[str, str]:
    """This process's, but for the name of a token: lmms-eval prints what is called HF_TOKEN."""
    found = dict(os.environ)
    if token := found.pop("HF_TOKEN", None):
        found["HUGGING_FACE_HUB_TOKEN"] = token  # where huggingface_hub looks next
    return found


def parse_scores(results: dict[str, dict[str, object]]) -> list[TaskScore]:
    """The metrics in lmms-eval's results, which it keeps as `metric,filter` beside `metric_stderr,filter`."""
    found = []
    for task, values in results.items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or "_stderr" in name:
                continue
            error = values.get(f"{name}_stderr,{kind}")
            metric = name if kind == "none" else f"{name} ({kind})"
            found.append(TaskScore(task, metric, _to_float(value), _to_float(error)))
    return found


def _to_float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def make_rows(scores: Sequence[TaskScore]) -> list[tuple[str, ...]]:
    """A table of scores, beside published ones where there are any; of metrics without a number nothing."""
    head = ("task", "metric", "value", "± standard error", "LLaVA-1.5 7B, this recipe", "LLaVA-1.5 7B, original")
    rows: list[tuple[str, ...]] = [head]
    for one in scores:
        if one.value is None:
            continue
        beside = published(one.task, one.metric.partition(" (")[0])
        others = ("", "") if beside is None else (f"{beside.reproduced:g}", f"{beside.original:g}")
        rows.append(
            (one.task, one.metric, f"{one.value:.4g}", "" if one.error is None else f"{one.error:.2g}", *others)
        )
    known = any(row[-1] for row in rows[1:])
    return rows if known else [row[:-2] for row in rows]


def scores_to_json(scores: Sequence[TaskScore]) -> list[dict[str, object]]:
    """Scores for a JSON file."""
    return [asdict(one) for one in scores]
