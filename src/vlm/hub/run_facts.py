"""What a run directory tells of the model that it left: for the model card.

Imports the schema's names and the cleaning of paths only.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm.config.schema import PARTS, TRAIN_FLAGS
from vlm.hub.cleaning import find_hub_name, last_path_component
from vlm.hub.folders import read_json


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run; what is not there is empty.

    Attributes:
        checkpoint: what it left.
        config: `config.yaml`.
        name: what `-cn` named.
        metrics: the lines of `metrics.jsonl`.
        data: `data.json`.
        versions: `versions.json`.
        scores: `scores.json`: set of records -> head -> measures.
        evaluations: name of an evaluation -> its `results.json`.
        plot: the picture of its loss.
    """

    checkpoint: Path
    config: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    plot: Path | None = None

    def recipe(self) -> list[tuple[str, str]]:
        """How it was trained: what and its value, in the order of the card."""
        trainer = self.config.get("trainer")
        if not trainer:
            return []
        found = [("stage", self.name)] if self.name else []
        if started := trainer.get("from_pretrained"):
            found.append(("began with", find_hub_name(started, self.checkpoint) or "an earlier stage's checkpoint"))
        found += [(f"learning rate of {part}", rate) for part, rate in _learning_rates(trainer, bool(self.scores))]
        found += list(self._training_amounts(trainer))
        for key in ("lr_scheduler_type", "warmup_steps", "optim", "loss_average", "seed"):
            if trainer.get(key) is not None:
                found.append((key, str(trainer[key])))
        found.append(("precision", next((key for key in ("bf16", "fp16") if trainer.get(key)), "float32")))
        if stage := (trainer.get("deepspeed") or {}).get("zero_optimization", {}).get("stage"):
            found.append(("DeepSpeed", f"ZeRO-{stage}"))
        template = self.config.get("dataset", {}).get("template")
        return found + ([("chat template", last_path_component(str(template)))] if template else [])

    def _training_amounts(self, trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
        batch = trainer.get("per_device_train_batch_size", 0) * trainer.get("gradient_accumulation_steps", 1)
        ranks = self.versions.get("world_size", 1)
        yield "samples a step", f"{batch * ranks} ({ranks} × {batch})" if ranks > 1 else str(batch)
        last = self.metrics[-1] if self.metrics else {}
        if "epoch" in last:
            yield "epochs", f"{last['epoch']:.3g}"
        if "step" in last:
            yield "steps", f"{last['step']:,}"

    def sources(self) -> list[tuple[str, str, int | None, int | None]]:
        """What it read: role, name, samples, images; None where a stream was not counted."""
        found = []
        for role, facts in self.data.items():
            sources = facts.get("sources", [])
            for one in sources:
                if len(sources) == 1:  # of which records may have been split off
                    one = {**one, "samples": facts["samples"], "images": facts["images"]}
                name = find_hub_name(one["path"], self.checkpoint) or last_path_component(str(one["source"]))
                found.append((role, name, one["samples"], one["images"]))
            if not sources and "samples" in facts:
                found.append((role, "split off", facts["samples"], facts["images"]))
            found += [(role, find_hub_name(one["path"], self.checkpoint) or last_path_component(str(one["source"])), None, None)
                      for one in facts.get("streamed", [])]  # fmt: skip
        return found

    def hub_datasets(self) -> list[str]:
        """Names of data sets on the Hub that it read."""
        paths = [one["path"] for facts in self.data.values()
                 for one in [*facts.get("sources", []), *facts.get("streamed", [])]]  # fmt: skip
        found = [
            name for path in paths if str(path).startswith("hf://") and (name := find_hub_name(path, self.checkpoint))
        ]
        return list(dict.fromkeys(found))

    def last_losses(self) -> list[tuple[str, float]]:
        """The last of each loss that was logged."""
        titles = {
            "loss": "training loss, last logged",
            "train_loss": "training loss, mean of the run",
            "eval_loss": "evaluation loss",
            "eval_blank_loss": "evaluation loss on blank pictures",
        }
        last = {key: value for line in self.metrics for key, value in line.items()}
        return [(title, last[key]) for key, title in titles.items() if isinstance(last.get(key), int | float)]


def read_run(checkpoint: Path) -> RunSummary:
    """What lies beside a checkpoint that is a run's folder `final`; nothing is known of others."""
    run = checkpoint.resolve().parent
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        return RunSummary(checkpoint)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    plot = run / "loss.png"
    return RunSummary(
        checkpoint, yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}, _read_run_name(run),
        [json.loads(line) for line in lines if line.strip()], read_json(run / "data.json"),
        read_json(run / "versions.json"), read_json(run / "scores.json"), dict(_read_evaluations(run)),
        plot if plot.is_file() else None,
    )  # fmt: skip


def _read_run_name(run: Path) -> str | None:
    """What the last command of a run named with `-cn`."""
    file = run / "command.txt"
    words = shlex.split(file.read_text(encoding="utf-8").splitlines()[-1]) if file.is_file() else []
    named = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-cn", "--config-name")]
    return named[-1] if named else None


def _read_evaluations(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted((run / "eval").glob("**/results.json")):
        yield "/".join(file.relative_to(run / "eval").parts[:-1]) or "evaluation", read_json(file)


def _learning_rates(trainer: dict[str, Any], has_head: bool) -> Iterator[tuple[str, str]]:
    """Part -> its learning rate, or that it was frozen."""
    for part in PARTS:
        rate = trainer["learning_rate"].get(f"{part}_learning_rate")
        rank = (trainer.get("lora", {}).get(part) or {}).get("r")
        if rank is not None:
            yield part, f"{rate:g}, LoRA of rank {rank}"
        else:
            yield part, f"{rate:g}" if trainer["unfreeze"].get(TRAIN_FLAGS[part]) and rate is not None else "frozen"
    if has_head:
        yield "head", f"{trainer['learning_rate']['head_learning_rate']:g}"
