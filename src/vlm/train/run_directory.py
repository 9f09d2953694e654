"""The run directory: everything that a run needs to be repeated, resumed or explained lies in it."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers.utils import is_torchvision_available

from vlm.config.schema import DatasetConfig, RunConfig
from vlm.data.dataset import Contribution, SampleDataset, Skipped, check_skipped_share
from vlm.data.stream import SampleStream
from vlm.train.distributed import broadcast_from_rank0

SKIPPED_FILE = "skipped.jsonl"
MIN_STREAM_RECORDS = 1000
"""So many records of a stream are waited for before a share of them says anything."""

PACKAGES = (
    "small-vlm", "torch", "torchvision", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "timm",
    "hydra-core", "omegaconf", "safetensors", "numpy", "pillow", "pyarrow", "datasets", "flash-attn",
)  # fmt: skip


def choose_directory(config: RunConfig, name: str) -> Path:
    """The run's directory: `trainer.output_dir`, or one that rank 0 names and tells the others."""
    if config.trainer.output_dir:
        return Path(config.trainer.output_dir)
    return Path(broadcast_from_rank0(f"outputs/{name}-{datetime.now():%Y%m%d-%H%M%S}"))


def write_run_files(folder: Path, config: RunConfig) -> None:
    """Write the resolved configuration, the command and the versions; called on one rank.

    A resumed run adds its command to those before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")
    resumed = config.trainer.resume_from_checkpoint
    with (folder / "command.txt").open("a" if resumed else "w", encoding="utf-8") as file:
        file.write(f"{shlex.join([sys.executable, *sys.orig_argv[1:]])}\n")
    write_json(folder / "versions.json", versions())


def versions() -> dict[str, Any]:
    """Packages, Python, devices, the backend of image processors, and the git revision of the source, if any."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "image_backend": "torchvision" if is_torchvision_available() else "pillow",
        "git": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain")),
    }


def _git(*words: str) -> str | None:
    """What git says about this package's source, or None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_data_summary(
    folder: Path, datasets: Mapping[str, SampleDataset | SampleStream | None], *, resumed: bool = False
) -> None:
    """Write what each source gave (`data.json`) and what was left out (`skipped.jsonl`).

    Args:
        folder: the run directory.
        datasets: role -> dataset.
        resumed: whether what was left out before, on the way, stays listed.
    """
    facts: dict[str, Any] = {}
    skipped = []
    for role, dataset in datasets.items():
        if isinstance(dataset, SampleStream):
            facts[role] = {"streamed": [{"source": one.name, "path": one.path} for one in dataset.sources]}
        elif dataset is not None:
            facts[role] = {
                "samples": len(dataset),
                "skipped": len(dataset.skipped),
                "images": int(dataset.num_images.sum()),
                "tokens": int(dataset.lengths.sum()),
                "longest": int(dataset.lengths.max()),
                "sources": [asdict(one) for one in dataset.contributions],
            }
            skipped += dataset.skipped
    write_json(folder / "data.json", facts)
    file = folder / SKIPPED_FILE
    before = file.read_text(encoding="utf-8").splitlines(keepends=True) if resumed and file.exists() else []
    file.write_text("".join(dict.fromkeys([*before, *map(skipped_as_json_line, skipped)])), encoding="utf-8")


def contribution_table(contributions: Sequence[Contribution]) -> str:
    """What each source gives, for the log."""
    total = sum(one.samples for one in contributions) or 1
    rows = [("source", "records", "samples", "share", "images", "tokens", "skipped", "truncated")]
    rows += [
        (one.source, f"{one.records:,}", f"{one.samples:,}", f"{one.samples / total:.1%}", f"{one.images:,}",
         f"{one.tokens:,}", f"{one.skipped:,}", f"{one.truncated:,}")
        for one in contributions
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(lines)


def skipped_as_json_line(one: Skipped) -> str:
    """A record that was left out, as a line of `skipped.jsonl`."""
    return f"{json.dumps(asdict(one), ensure_ascii=False)}\n"


class SkippedRecords:
    """Adds to `skipped.jsonl` what is left out while a run goes on, and stops it where that is not allowed.

    Args:
        folder: the run directory.
        dataset: what is trained on.
        config: the policies, and how many may be left out.
        world_size: ranks; each sees its own part of the records.
        is_writer: whether it adds them itself; else another rank, which is told of the same, does.
    """

    def __init__(
        self, folder: Path, dataset: SampleDataset | SampleStream, config: DatasetConfig, world_size: int, *,
        is_writer: bool = True,
    ):  # fmt: skip
        self.path = folder / SKIPPED_FILE
        self.is_writer = is_writer
        self.dataset, self.config, self.world_size = dataset, config, world_size
        self.known_skipped: set[Skipped] = set()
        self.num_seen = 0

    def __call__(self, left_out: list[Skipped], number: int) -> None:
        """Take note of a batch of `number` samples.

        Raises:
            ValueError: the policy is `error`, or more records cannot be used than `dataset.max_skipped` allows.
        """
        self.num_seen += number
        for one in left_out:
            if getattr(self.config, one.policy) == "error":
                raise one.as_error()
        new = [one for one in left_out if one not in self.known_skipped]
        if not new:
            return
        self.known_skipped.update(new)
        if self.is_writer:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(skipped_as_json_line, new)))
        if isinstance(self.dataset, SampleDataset):
            total = (len(self.dataset) + len(self.dataset.skipped)) / self.world_size
        else:
            total = max(self.num_seen, MIN_STREAM_RECORDS)
        bad = [one for one in self.known_skipped if one.policy == "on_bad_sample"]
        check_skipped_share(new[0].source, bad, round(total), self.config.max_skipped)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people: indented, with real letters."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
