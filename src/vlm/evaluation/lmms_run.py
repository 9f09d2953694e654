"""Runs lmms-eval's tasks in a separate environment, and reads their scores.

lmms-eval pins a version of antlr4 that conflicts with Hydra's omegaconf; `make install-eval` makes `.venv-eval` for it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from vlm.evaluation.published import PUBLISHED_RESULTS

VENV_PYTHON = Path(".venv-eval", "bin", "python")
REPOSITORY = Path(__file__).parents[3]
"""The folder of the clone, where this package runs from a clone."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, and its standard error, if known.

    The metric's name is followed by that of a filter where there is one. The value is None where lmms-eval only writes
    a file to submit.
    """

    task: str
    metric: str
    value: float | None
    error: float | None


def find_interpreter(requested: Path | None) -> str:
    """Return the Python that has lmms-eval: the requested one, this one, or that of `.venv-eval` here or in the clone.

    Raises:
        ValueError: there is none, or it lacks lmms-eval or this package.
    """
    if requested is not None and not requested.is_file():
        raise ValueError(f"--lmms-eval-python {requested}: no such file")
    this_python = [Path(sys.executable)] if importlib.util.find_spec("lmms_eval") else []
    candidates = [requested] if requested is not None else [*this_python, VENV_PYTHON, REPOSITORY / VENV_PYTHON]
    python = next((str(file) for file in candidates if file.is_file()), None)
    if python is None:
        raise ValueError(
            "lmms-eval needs its own environment: run `make install-eval` in a clone (it creates .venv-eval); "
            "--lmms-eval-python names the Python of another one"
        )
    code = (
        "import importlib.util as u, sys; "
        "sys.exit(','.join(name for name in ('lmms_eval', 'vlm') if not u.find_spec(name)) or 0)"
    )
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if process.returncode:
        hint = "`make install-eval` creates .venv-eval with both lmms-eval and vlm"
        missing = process.stderr.strip() or "it"
        raise ValueError(f"{python}: {missing} is missing there; {hint}")
    return python


def format_model_args(values: dict[str, object]) -> str:
    """Return a model's arguments as lmms-eval parses them.

    Raises:
        ValueError: a value contains a comma, a quote or a bracket, which lmms-eval would misread.
    """
    for name, value in values.items():
        if set(str(value)) & set(",'\"[]{}"):
            raise ValueError(f"{name}={value}: lmms-eval cannot handle a name with a comma, a quote or a bracket")
    return ",".join(f"{name}={value}" for name, value in values.items())


def run_tasks(
    python: str,
    arguments: str,
    tasks: Sequence[str],
    *,
    batch_size: int,
    limit: float | None = None,
    include: Path | None = None,
) -> dict[str, dict[str, object]]:
    """Run tasks; their output is shown as it comes.

    Args:
        python: the interpreter, see `find_interpreter`.
        arguments: the model's arguments, see `format_model_args`.
        tasks: the names of tasks.
        batch_size: number of requests in a batch.
        limit: the number of documents of each task, or the share of them; the first ones are taken.
        include: a folder with further tasks.

    Returns:
        lmms-eval's results: task -> metric -> value.

    Raises:
        ValueError: lmms-eval wrote no results.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-eval-") as folder:
        options = {"model": "vlm", "model_args": arguments, "tasks": ",".join(tasks), "batch_size": batch_size}
        options |= {"output_path": folder, "include_path": include, "limit": None if limit is None else f"{limit:g}"}
        words = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
        subprocess.run([python, "-m", "lmms_eval", *chain(*words)], env=make_environment(), check=False)
        written = sorted(Path(folder).rglob("*_results.json"))  # a failure ends with exit code 0
        if not written:
            raise ValueError("lmms-eval produced no results; see its last lines above")
        return json.loads(written[-1].read_text(encoding="utf-8"))["results"]


def make_environment() -> dict[str, str]:
    """Return this process's environment with HF_TOKEN under another name, as lmms-eval prints HF_TOKEN."""
    environment = dict(os.environ)
    if token := environment.pop("HF_TOKEN", None):
        environment["HUGGING_FACE_HUB_TOKEN"] = token  # huggingface_hub reads it too
    return environment


def parse_scores(results: dict[str, dict[str, object]]) -> list[TaskScore]:
    """Return the metrics in lmms-eval's results, whose keys are `metric,filter` and `metric_stderr,filter`."""
    scores = []
    for task, values in results.items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if not comma or "_stderr" in name:
                continue
            metric = name if kind == "none" else f"{name} ({kind})"
            error = values.get(f"{name}_stderr,{kind}")
            scores.append(TaskScore(task, metric, _to_float(value), _to_float(error)))
    return scores


def _to_float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def make_rows(scores: Sequence[TaskScore]) -> list[tuple[str, ...]]:
    """Return a table of the scores with a value, and the published results where there are any."""
    header = ("task", "metric", "value", "± standard error", "LLaVA-1.5 7B, this recipe", "LLaVA-1.5 7B, original")
    rows: list[tuple[str, ...]] = [header]
    for score in scores:
        if score.value is None:
            continue
        published = PUBLISHED_RESULTS.get((score.task, score.metric.partition(" (")[0]))
        others = ("", "")
        if published is not None:
            reproduced, original = published
            others = (f"{reproduced:g}", f"{original:g}")
        error = "" if score.error is None else f"{score.error:.2g}"
        rows.append((score.task, score.metric, f"{score.value:.4g}", error, *others))
    return rows if any(row[-1] for row in rows[1:]) else [row[:-2] for row in rows]


def scores_to_json(scores: Sequence[TaskScore]) -> list[dict[str, object]]:
    """Return scores for a JSON file."""
    return [asdict(score) for score in scores]
