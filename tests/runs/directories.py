"""Run directories as files alone, without a training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from vlm.evaluation.record_sums import RecordSums
from vlm.runs.evaluated_records import RECORDS_FOLDER, EvaluatedRecords, records_file

CONFIG = {
    "model": {"language_model": {"hf_name": "tiny"}, "connector": {"type": "mlp"}},
    "trainer": {
        "max_steps": -1, "num_train_epochs": 2.0, "seed": 42, "from_pretrained": None, "output_dir": "outputs/run",
        "keep_best": None, "learning_rate": {"connector_learning_rate": 1e-3},
        "unfreeze": {"train_connector": True, "train_language_model": False, "train_vision_model": False},
    },
    "dataset": {"path": "train.json"},
}  # fmt: skip


def logged(losses: Sequence[float], *, rate: float = 1e-3) -> list[dict[str, object]]:
    """Lines of `metrics.jsonl`, a training loss at every tenth step, and an evaluation behind the last."""
    lines: list[dict[str, object]] = [
        {"step": 10 * number, "loss": loss, "learning_rate/connector": rate, "grad_norm": 1.0,
         "tokens_per_second": 1000.0, "epoch": number / len(losses)}
        for number, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    return [*lines, {"step": 10 * len(losses), "eval_loss": losses[-1] + 0.1, "eval_image_gain": 0.5,
                     "eval_image_gain_ci95": 0.2, "epoch": 1.0}]  # fmt: skip


def write_run(
    folder: Path, lines: Sequence[Mapping[str, object]] = (), *, settings: Mapping[str, object] | None = None,
    command: str = "python -m vlm -cn finetune-smol", is_done: bool = True,
) -> Path:  # fmt: skip
    """Write a run directory; `settings` are dotted keys of its configuration, set on the command line too."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    words = [f"{key}={value}" for key, value in (settings or {}).items()]
    for key, value in (settings or {}).items():
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "command.txt").write_text(" ".join([command, *words]) + "\n")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if is_done:
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text('{"model_type": "vlm"}')
    return folder


def write_records(
    folder: Path, step: int, metrics: Mapping[str, tuple[np.ndarray, np.ndarray]], *, records: str = "val"
) -> None:
    """Write what an evaluation found of each record: metric -> sums and counts."""
    (folder / RECORDS_FOLDER).mkdir(exist_ok=True)
    kept = EvaluatedRecords(records, {name: RecordSums(*columns) for name, columns in metrics.items()})
    (folder / records_file(step)).write_text(kept.to_json())


def write_samples(folder: Path, step: int, answers: Sequence[str]) -> None:
    """Add answers at a step to `samples.md`, each with a red image."""
    (folder / "samples").mkdir(exist_ok=True)
    lines = [f"## Step {step}\n"]
    for number, answer in enumerate(answers):
        Image.new("RGB", (40, 30), "red").save(folder / "samples" / f"{number}.png")
        lines += [f"![sample {number}](samples/{number}.png)\n", f"- **question**: question {number}",
                  f"- **reference**: reference {number}", f"- **answer**: {answer}", ""]  # fmt: skip
    with (folder / "samples.md").open("a") as file:
        file.write("\n".join(lines) + "\n")
