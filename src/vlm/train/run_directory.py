"""The run directory: everything that a run needs to be repeated, resumed or explained lies in it."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tabulate import tabulate
from transformers.utils import is_torchvision_available

from vlm.checks.sweep import is_sweep, words_of_run
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import RunConfig
from vlm.config.secrets import mask_settings, mask_words
from vlm.data.dataset import Contribution, SampleDataset
from vlm.data.skipped import Skipped, check_skipped_share
from vlm.data.stream import SampleStream
from vlm.runs.read import REPORT_FILE
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.objectives.base import PreparedRun

CONFIG_FILE, COMMAND_FILE, VERSIONS_FILE = "config.yaml", "command.txt", "versions.json"
CHANGES_FILE = "changes.jsonl"
"""What was other at later starts of a run than at the one before: a line a start."""

DATA_FILE = "data.json"
SKIPPED_FILE = "skipped.jsonl"
MIN_STREAM_RECORDS = 1000
"""Records of a stream that must have been read before the share of those left out can stop the run."""

PACKAGES = (
    "small-vlm", "torch", "torchvision", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "timm",
    "hydra-core", "omegaconf", "safetensors", "numpy", "pillow", "pyarrow", "datasets", "flash-attn",
)  # fmt: skip


def choose_directory(config: RunConfig, name: str) -> Path:
    """Return the run directory: `trainer.output_dir`, or one that rank 0 names and tells the others."""
    if config.trainer.output_dir:
        return Path(config.trainer.output_dir)
    return Path(broadcast_from_rank0(f"outputs/{name}-{datetime.now():%Y%m%d-%H%M%S}"))


def write_run_files(folder: Path, config: RunConfig) -> None:
    """Write the resolved configuration, the command and the versions of a run that begins; called on one rank."""
    for name in (
        CHANGES_FILE,
        DATA_FILE,
        SKIPPED_FILE,
        "metrics.jsonl",
        "samples.md",
        "guard.jsonl",
        "first_batch.html",
        REPORT_FILE,
    ):
        (folder / name).unlink(missing_ok=True)  # of a start that saved nothing
    write_text_whole(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(mask_settings(asdict(config)))))
    write_text_whole(folder / COMMAND_FILE, _command())
    write_json(folder / VERSIONS_FILE, versions())


def add_command(folder: Path) -> None:
    """Add the command of a run that goes on to those before it."""
    _add_line(folder / COMMAND_FILE, _command())


def add_changes(folder: Path, step: int, changes: Mapping[str, Sequence[object]]) -> None:
    """Record what is other from a step on; the files of a run's first start stay as they are.

    Args:
        folder: the run directory.
        step: the step that the run goes on from.
        changes: key -> its value before, and now.
    """
    if changes:
        line = {"step": step, "time": f"{datetime.now():%Y-%m-%dT%H:%M:%S}", "changes": changes}
        _add_line(folder / CHANGES_FILE, f"{json.dumps(line, ensure_ascii=False)}\n")


def _add_line(file: Path, line: str) -> None:
    """Add a line to a file of few lines, whole or not at all."""
    write_text_whole(file, "".join([*_read_lines(file), line]))


def _command() -> str:
    """Return the command of this process, without secrets: a run directory is shown to others, and published."""
    words = sys.orig_argv[1:]
    if is_sweep():
        number = len(sys.argv) - 1  # the words that Hydra was given, behind those that started Python
        words = [*words[: len(words) - number], *words_of_run(words[len(words) - number :])]
    return f"{shlex.join(mask_words([sys.executable, *words]))}\n"


def versions() -> dict[str, object]:
    """Return packages, Python, devices, the backend of image processors, and the git revision of the source, if any."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "image_backend": "torchvision" if is_torchvision_available() else "pillow",
        **_code_revision(),
    }


@cache
def package_versions() -> dict[str, str | None]:
    """Return package -> its installed version, None if it is not installed."""
    return {name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES}


@cache  # a process goes on with the source that it has imported, though the files change
def _code_revision() -> dict[str, object]:
    """Return the commit of this package's source, None where it is no checkout, and whether the code has changed."""
    package = Path(__file__).parents[1]
    return {"git": _git(package, "rev-parse", "HEAD"), "git_changes": has_changed_code(package)}


def _git(folder: Path, *words: str) -> str | None:
    """Return the output of a git command in a folder, or None where it is no checkout."""
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def has_changed_code(package: Path) -> bool:
    """Return whether files of a checkout differ from its commit, or the folder of its package has further files.

    Other files that git does not know, such as records and runs beside the code, are no code of the run.
    """
    tracked = _git(package, "status", "--porcelain", "--untracked-files=no")
    return bool(tracked or _git(package, "status", "--porcelain", "."))


def write_data_summary(folder: Path, datasets: Mapping[str, SampleDataset | SampleStream | None]) -> None:
    """Write what each role's sources gave: `data.json`."""
    summary: dict[str, dict[str, object]] = {}
    for role, dataset in datasets.items():
        if isinstance(dataset, SampleStream):
            summary[role] = {
                "streamed": [{"source": source.name, "path": source.shown_path} for source in dataset.sources]
            }
        elif dataset is not None:
            summary[role] = {
                "samples": len(dataset),
                "skipped": len(dataset.skipped),
                "images": int(dataset.num_images.sum()),
                "tokens": int(dataset.lengths.sum()),
                "longest": int(dataset.lengths.max()),
                "sources": [asdict(source) for source in dataset.contributions],
            }
    write_json(folder / DATA_FILE, summary)


def list_skipped(folder: Path, datasets: Mapping[str, SampleDataset | SampleStream | None]) -> None:
    """Add the records that were left out while data sets were read to `skipped.jsonl`, those that it lacks.

    What a run left out before it was resumed stays listed.
    """
    read = [dataset for dataset in datasets.values() if isinstance(dataset, SampleDataset)]
    lines = [_skipped_as_json_line(record) for dataset in read for record in dataset.skipped]
    file = folder / SKIPPED_FILE
    write_text_whole(file, "".join(dict.fromkeys([*_read_lines(file), *lines])))


def _read_lines(file: Path) -> list[str]:
    """Return the whole lines of a file, with their ends; the last one may be torn, and is left out then."""
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [f"{line}\n" for line in lines]


def contribution_table(contributions: Sequence[Contribution]) -> str:
    """Return what each source gives, as a table for the log."""
    total = sum(source.samples for source in contributions) or 1
    header = ("source", "records", "samples", "share", "images", "tokens", "skipped", "truncated")
    rows = [
        (
            source.source,
            f"{source.records:,}",
            f"{source.samples:,}",
            f"{source.samples / total:.1%}",
            f"{source.images:,}",
            f"{source.tokens:,}",
            f"{source.skipped:,}",
            f"{source.truncated:,}",
        )
        for source in contributions
    ]
    return tabulate(rows, header, tablefmt="plain", colalign=("left", *["right"] * 7), disable_numparse=True)


def describe_held_out(train: SampleDataset, evaluation: SampleDataset | SampleStream | None) -> str:
    """Return how many samples of a run's table are held out of its training; empty where all are trained on."""
    total = sum(source.samples for source in train.contributions)
    if not isinstance(evaluation, SampleDataset) or len(train) >= total:
        return ""
    return f"{len(train):,} of these samples are trained on; {len(evaluation):,} are held out for evaluation."


def _skipped_as_json_line(record: Skipped) -> str:
    return f"{json.dumps(asdict(record), ensure_ascii=False)}\n"


class SkippedRecords:
    """Adds the records that a run leaves out on the way to `skipped.jsonl`, and stops it where that is not allowed.

    `world_size` is the number of ranks that have records of their own. Without `is_writer`, another rank, which is told
    of the same records, adds them. It is saved with checkpoints, see `SavedWithCheckpoint`.
    """

    def __init__(self, run: PreparedRun, config: DatasetConfig, world_size: int, *, is_writer: bool = True):
        self.path, self.is_writer = run.folder / SKIPPED_FILE, is_writer
        self.dataset, self.config, self.world_size = run.data.records["train"], config, world_size
        self.rank = run.args.process_index
        self.listed = set(_read_lines(self.path))
        self.known_skipped: set[Skipped] = set()
        self.num_seen = 0

    def __call__(self, skipped: list[Skipped], num_samples: int) -> None:
        """Take note of a batch of samples, and of the records left out of it.

        Raises:
            ValueError: the policy is `error`, or more records cannot be used than `dataset.max_skipped` allows.
        """
        self.num_seen += num_samples
        for record in skipped:
            if getattr(self.config, record.policy) == "error":
                raise record.as_error()
        new = [record for record in skipped if record not in self.known_skipped]
        if not new:
            return
        self.known_skipped.update(new)
        if self.is_writer:
            lines = [line for line in map(_skipped_as_json_line, new) if line not in self.listed]
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
            self.listed.update(lines)
        if isinstance(self.dataset, SampleDataset):
            total = (len(self.dataset) + len(self.dataset.skipped)) / self.world_size
        else:
            total = max(self.num_seen, MIN_STREAM_RECORDS)
        bad = [record for record in self.known_skipped if record.policy == "on_bad_sample"]
        check_skipped_share(new[0].source, bad, round(total), self.config.max_skipped)

    def save_to(self, checkpoint: Path) -> None:
        """Write what this rank has seen and left out."""
        content = {"seen": self.num_seen, "skipped": [asdict(record) for record in sorted(self.known_skipped, key=str)]}
        write_json(checkpoint / f"skipped-{self.rank}.json", content)

    def load_from(self, checkpoint: Path) -> None:
        """Read it; checkpoints of earlier versions, and of fewer ranks, have none."""
        file = checkpoint / f"skipped-{self.rank}.json"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            self.num_seen = content["seen"]
            self.known_skipped = {Skipped(**record) for record in content["skipped"]}


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read: indented, letters not escaped."""
    write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
