"""The facts of a run directory that the model card tells. Imports no torch."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import yaml

from vlm.checks.weights import is_of_other_weights
from vlm.config.schema import PARTS, TRAIN_FLAGS
from vlm.hub.cleaning import find_hub_name, last_path_component
from vlm.hub.folders import JsonObject, read_json

CHANGED_KEYS = frozenset(
    f"trainer.{name}"
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "loss_average",
        "seed",
        "bf16",
        "fp16",
    )
)
"""Settings besides learning rates that a card tells where they changed on the way."""


@dataclass(frozen=True)
class RunSummary:
    """The known facts of a run, by the names of their files; those of files that do not exist are empty."""

    checkpoint: Path
    config: JsonObject = field(default_factory=dict)
    name: str | None = None
    """The configuration that `-cn` named."""
    metrics: list[JsonObject] = field(default_factory=list)
    data: JsonObject = field(default_factory=dict)
    versions: JsonObject = field(default_factory=dict)
    scores: JsonObject = field(default_factory=dict)
    """Set of records -> head -> measures."""
    evaluations: dict[str, JsonObject] = field(default_factory=dict)
    """Name of an evaluation -> its `results.json`; those of weights that were replaced are left out."""
    plot: Path | None = None
    changes: list[JsonObject] = field(default_factory=list)
    """What was other at later starts: `step`, and `changes` of keys with two values each."""

    def recipe(self) -> list[tuple[str, str]]:
        """Return the settings of the training with their values, in the order of the card."""
        trainer = self.config.get("trainer")
        if not trainer:
            return []
        rows = [("stage", self.name)] if self.name else []
        if started := trainer.get("from_pretrained"):
            rows.append(("began with", find_hub_name(started, self.checkpoint) or "an earlier stage's checkpoint"))
        rows += [(f"learning rate of {part}", rate) for part, rate in _learning_rates(trainer, bool(self.scores))]
        rows += self._training_amounts(trainer)
        settings = ("lr_scheduler_type", "warmup_steps", "optim", "loss_average", "seed")
        rows += [(key, str(trainer[key])) for key in settings if trainer.get(key) is not None]
        rows.append(("precision", next((key for key in ("bf16", "fp16") if trainer.get(key)), "float32")))
        if stage := (trainer.get("deepspeed") or {}).get("zero_optimization", {}).get("stage"):
            rows.append(("DeepSpeed", f"ZeRO-{stage}"))
        rows += self._changed_settings()
        template = self.config.get("dataset", {}).get("template")
        return rows + ([("chat template", last_path_component(str(template)))] if template else [])

    def _changed_settings(self) -> Iterator[tuple[str, str]]:
        """Yield the settings that were accepted on the way."""
        for line in self.changes:
            for key, (_, now) in line["changes"].items():
                if key.startswith("trainer.learning_rate.") or key in CHANGED_KEYS:
                    yield f"{key.rpartition('.')[2]} from step {line['step']:,}", str(now)

    def _training_amounts(self, trainer: JsonObject) -> Iterator[tuple[str, str]]:
        batch = trainer.get("per_device_train_batch_size", 0) * trainer.get("gradient_accumulation_steps", 1)
        ranks = self.versions.get("world_size", 1)
        yield "samples a step", f"{batch * ranks} ({ranks} × {batch})" if ranks > 1 else str(batch)
        last = self.metrics[-1] if self.metrics else {}
        if "epoch" in last:
            yield "epochs", f"{last['epoch']:.3g}"
        if "step" in last:
            yield "steps", f"{last['step']:,}"

    def sources(self) -> list[tuple[str, str, int | None, int | None]]:
        """Return the sources of the data: role, name, samples, images; None where a stream was not counted."""
        rows = []
        for role, facts in self.data.items():
            sources = facts.get("sources", [])
            for source in sources:
                counts = facts if len(sources) == 1 else source  # of one source, records may have been split off
                rows.append((role, self._name_source(source), counts["samples"], counts["images"]))
            if not sources and "samples" in facts:
                rows.append((role, "split off", facts["samples"], facts["images"]))
            rows += [(role, self._name_source(stream), None, None) for stream in facts.get("streamed", [])]
        return rows

    def _name_source(self, source: JsonObject) -> str:
        return find_hub_name(source["path"], self.checkpoint) or last_path_component(str(source["source"]))

    def hub_datasets(self) -> list[str]:
        """Return the names of data sets on the Hub that the run read."""
        sources = [[*facts.get("sources", []), *facts.get("streamed", [])] for facts in self.data.values()]
        paths = [str(source["path"]) for source in chain.from_iterable(sources)]
        names = [find_hub_name(path, self.checkpoint) for path in paths if path.startswith("hf://")]
        return list(dict.fromkeys(filter(None, names)))

    def last_losses(self) -> list[tuple[str, float]]:
        """Return the last value of each loss that was logged."""
        titles = {
            "loss": "training loss, last logged",
            "train_loss": "training loss, mean of the run",
            "eval_loss": "evaluation loss",
            "eval_blank_loss": "evaluation loss on blank images",
        }
        last = {key: value for line in self.metrics for key, value in line.items()}
        return [(title, last[key]) for key, title in titles.items() if isinstance(last.get(key), int | float)]


def read_run(checkpoint: Path) -> RunSummary:
    """Return the facts beside a checkpoint that is a run's folder `final`; of others nothing is known."""
    run = checkpoint.resolve().parent
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        return RunSummary(checkpoint)
    plot = run / "loss.png"
    evaluations = {}
    for file in sorted((run / "eval").rglob("results.json")):
        name = file.parent.relative_to(run / "eval").as_posix()
        results = read_json(file)
        is_comparison = not isinstance(results.get("metrics", {}), dict)  # of two models: it lists its metrics' names
        if not is_comparison and not is_of_other_weights(results, run):
            evaluations["evaluation" if name == "." else name] = results
    return RunSummary(
        checkpoint,
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {},
        _read_run_name(run),
        _read_lines(run / "metrics.jsonl"),
        read_json(run / "data.json"),
        read_json(run / "versions.json"),
        read_json(run / "scores.json"),
        evaluations,
        plot if plot.is_file() else None,
        _read_lines(run / "changes.jsonl"),
    )


def _read_lines(file: Path) -> list[JsonObject]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def _read_run_name(run: Path) -> str | None:
    """Return the configuration that the last command of a run named with `-cn`."""
    file = run / "command.txt"
    words = shlex.split(file.read_text(encoding="utf-8").splitlines()[-1]) if file.is_file() else []
    named = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-cn", "--config-name")]
    return named[-1] if named else None


def _learning_rates(trainer: JsonObject, has_head: bool) -> Iterator[tuple[str, str]]:
    """Yield each part with its learning rate, or `frozen`."""
    for part in PARTS:
        rate = trainer["learning_rate"].get(f"{part}_learning_rate")
        rank = (trainer.get("lora", {}).get(part) or {}).get("r")
        if rank is not None:
            yield part, f"{rate:g}, LoRA of rank {rank}"
        else:
            yield part, f"{rate:g}" if trainer["unfreeze"].get(TRAIN_FLAGS[part]) and rate is not None else "frozen"
    if has_head:
        yield "head", f"{trainer['learning_rate']['head_learning_rate']:g}"
