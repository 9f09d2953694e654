"""The commands of an evaluation, an export and a merge, from the values of the page's fields.

A value is never an option: values that could be read as one are refused. What only the command line may do, such as
records from another machine or code of the user's own, is refused as in a run. Needs neither torch nor Gradio.
"""

import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm.checks.fields import ConfigError
from vlm.checks.surface import check_surface
from vlm.config.choices import (
    ADAPTER_FORMAT_DESCRIPTIONS,
    ANSWER_METRICS,
    EXPORT_DTYPES,
    FORMAT_DESCRIPTIONS,
    HALLUCINATION_METRICS,
    LOSS_METRICS,
    OBJECT_METRICS,
)
from vlm.config.dataset_schema import SourceConfig
from vlm.config.derived import BASE_FILE
from vlm.config.schema import InferenceConfig
from vlm.runs.files import is_inside
from vlm.web.tasks import EVALUATION, EXPORT, Task

METRICS = (*LOSS_METRICS, *ANSWER_METRICS, *OBJECT_METRICS, *HALLUCINATION_METRICS)
MERGED = "merged"
"""The format of a merged adapter, which `vlm merge-lora` writes."""
EXPORT_DESCRIPTIONS = {MERGED: "an adapter merged into its base", **FORMAT_DESCRIPTIONS, **ADAPTER_FORMAT_DESCRIPTIONS}
"""Format -> who reads it."""
RECORD_FORMATS = (
    "llava",
    "messages",
    "caption",
    "question",
    "labelled",
    "alpaca",
    "cauldron",
    "minicpm",
)
"""Formats of records with replies that answers can be compared with."""


@dataclass(frozen=True)
class Place:
    """Where the page may write, and how it loads checkpoints.

    Attributes:
        outputs: the folder that everything is written below.
        base: the new place of an adapter's base, as in `vlm generate --base`.
        trusted: checkpoints whose code may run: names that the command line gave.
    """

    outputs: Path
    base: Sequence[str] = ()
    trusted: Collection[str] = field(default_factory=frozenset)

    def loading_words(self, checkpoint: str) -> list[str]:
        """Return the options with which a checkpoint is loaded."""
        is_adapter = (Path(checkpoint) / BASE_FILE).is_file()
        words = [f"--base={path}" for path in self.base] if is_adapter else []
        return [*words, "--trust-remote-code"] if checkpoint in self.trusted else words

    def check_writable(self, folder: Path) -> None:
        """Raise ConfigError if a folder is not below the folder of outputs, links followed."""
        if folder.resolve() == self.outputs.resolve() or not is_inside(folder, self.outputs):
            raise ConfigError(f"{folder}: the page writes below {self.outputs}/ only; name a folder there")


@dataclass(frozen=True)
class Evaluation:
    """The fields of an evaluation; None if the browser has not shown a field yet."""

    checkpoint: str | None
    data: str | None
    image_folder: str | None = None
    metrics: Sequence[str] = ()
    format: str | None = None
    max_new_tokens: float | None = InferenceConfig.max_new_tokens
    batch_size: float | None = 16

    def make(self, place: Place) -> tuple[Task, list[str]]:
        """Return the task and its command.

        Raises:
            ConfigError: a field has to be corrected.
        """
        checkpoint, data = _require(self.checkpoint, "Choose a checkpoint"), _require(self.data, "Name the records")
        if not self.metrics:
            raise ConfigError("Choose at least one metric")
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"{metric}: the page offers {', '.join(METRICS)}; use vlm eval for your own metrics")
        if self.format and self.format not in RECORD_FORMATS:
            raise ConfigError(f"{self.format}: the page offers {', '.join(RECORD_FORMATS)}; use vlm eval for others")
        images = (self.image_folder or "").strip() or None
        check_surface(SourceConfig(path=data, image_folder=images, format=self.format or "llava"))
        folder = choose_evaluation_folder(checkpoint, data, place)
        place.check_writable(folder)
        options = {
            "data": data,
            "image-folder": images,
            "metrics": ",".join(self.metrics),
            "format": self.format,
            "batch-size": _at_least_one(self.batch_size, "Batch size"),
            "max-new-tokens": _at_least_one(self.max_new_tokens, "Longest answer"),
            "output": str(folder),
        }
        words = [f"--{name}={value}" for name, value in options.items() if value]
        title = f"Evaluation of {checkpoint} on {data}"
        command = [sys.executable, "-m", "vlm", "eval", checkpoint, *words, *place.loading_words(checkpoint)]
        return Task(EVALUATION, title, str(folder)), command


@dataclass(frozen=True)
class Export:
    """The fields of an export; `name` is the new folder's path below the folder of outputs."""

    checkpoint: str | None
    format: str | None
    name: str | None = None
    dtype: str | None = None
    vision_tower: str | None = None

    def make(self, place: Place) -> tuple[Task, list[str]]:
        """Return the task and its command.

        Raises:
            ConfigError: a field has to be corrected.
        """
        checkpoint = _require(self.checkpoint, "Choose a checkpoint")
        if self.format not in EXPORT_DESCRIPTIONS:
            raise ConfigError(f"Choose a format: {', '.join(EXPORT_DESCRIPTIONS)}")
        if self.dtype and self.dtype not in EXPORT_DTYPES:
            raise ConfigError(f"{self.dtype}: allowed are {', '.join(EXPORT_DTYPES)}")
        folder = place.outputs / ((self.name or "").strip() or default_export_name(checkpoint, self.format))
        if str(folder).startswith("-"):
            raise ConfigError(f"{folder}: name a folder that does not start with a hyphen")
        place.check_writable(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists already; name a new folder")
        if Path(checkpoint).is_dir() and is_inside(folder, Path(checkpoint)):
            raise ConfigError(f"{folder} is inside the checkpoint, which stays as it is; name another folder")
        out = str(folder)
        if self.format == MERGED:
            words = ["merge-lora", checkpoint, out, *place.loading_words(checkpoint)]
        else:
            options = {"format": self.format}
            options |= {"dtype": self.dtype} if self.dtype and self.format == "gguf" else {}
            if self.format == "llava-original" and (tower := (self.vision_tower or "").strip()):
                options |= {"vision-tower": tower}
            base = [word for word in place.loading_words(checkpoint) if word.startswith("--base=")]
            words = ["export", checkpoint, out, *(f"--{name}={value}" for name, value in options.items())]
            words += base if self.format in ADAPTER_FORMAT_DESCRIPTIONS else []
        title = f"Export of {checkpoint} as {self.format}"
        return Task(EXPORT, title, out), [sys.executable, "-m", "vlm", *words]


def choose_evaluation_folder(checkpoint: str, data: str, place: Place) -> Path:
    """Return where results go: `eval/DATA` in the checkpoint's run, with a number where that has results already.

    Results of a checkpoint that is not below the folder of outputs go into `eval/` there.
    """
    folder, stem = Path(checkpoint), Path(data).stem or "records"
    if folder.is_dir() and folder.resolve() != place.outputs.resolve() and is_inside(folder, place.outputs):
        parent = folder.parent / "eval" / (stem if folder.name == "final" else f"{folder.name}-{stem}")
    else:
        parent = place.outputs / "eval" / f"{_plain_name(checkpoint)}-{stem}"
    candidates = [parent, *(parent.with_name(f"{parent.name}-{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not (candidate / "results.json").exists())


def default_export_name(checkpoint: str, format_name: str) -> str:
    """Return the name of an export's folder where the user gives none."""
    return f"{_plain_name(checkpoint)}-{format_name}"


def format_command(command: Sequence[str]) -> str:
    """Return a command to copy into a shell, one word or option a line."""
    words = ["vlm", *command[3:]]
    return " \\\n  ".join([shlex.join(words[:3]), *map(shlex.quote, words[3:])])


def _plain_name(checkpoint: str) -> str:
    """Return a name for a checkpoint: that of its run for a run's `final`, else its own."""
    parts = [part for part in Path(checkpoint).parts if part not in ("/", "..", ".")]
    if parts and parts[-1] == "final":
        parts = parts[:-1]
    return (parts[-1] if Path(checkpoint).is_dir() else "--".join(parts)) if parts else "model"


def _require(value: str | None, message: str) -> str:
    """Return a field's value without surrounding white space; ConfigError if it is empty or an option."""
    text = (value or "").strip()
    if not text:
        raise ConfigError(message)
    if text.startswith("-"):
        raise ConfigError(f"{text}: options are not taken here; give a path or a name")
    return text


def _at_least_one(value: float | None, label: str) -> int:
    if value is None or value < 1:
        raise ConfigError(f"{label}: got {value}; a number of 1 or more is needed")
    return int(value)
