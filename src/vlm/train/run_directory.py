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

from vlm.config.schema import DatasetConfig, RunConfig
from vlm.data.dataset import Contribution, SampleDataset, Skipped, check_skipped_share
from vlm.data.stream import SampleStream
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.objectives.base import PreparedRun

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
    """Write the resolved configuration, the command and the versions; called on one rank.

    A resumed run adds its command to those before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")
    resumed = config.trainer.resume_from_checkpoint
    with (folder / "command.txt").open("a" if resumed else "w", encoding="utf-8") as file:
        file.write(f"{shlex.join([sys.executable, *sys.orig_argv[1:]])}\n")
    write_json(folder / "versions.json", versions())


def versions() -> dict[str, object]:
    """Return packages, Python, devices, the backend of image processors, and the git revision of the source, if any."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "image_backend": "torchvision" if is_torchvision_available() else "pillow",
        "git": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain")),
    }


@cache
def package_versions() -> dict[str, str | None]:
    """Return package -> its installed version, None where it is not installed."""
    return {name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES}


def _git(*words: str) -> str | None:
    """Return the output of a git command on this package's source, or None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_data_summary(
    folder: Path, datasets: Mapping[str, SampleDataset | SampleStream | None], *, resumed: bool = False
) -> None:
    """Write what each role's sources gave (`data.json`) and which records were left out (`skipped.jsonl`).

    Where a run is `resumed`, the records that it left out before stay listed.
    """
    summary: dict[str, dict[str, object]] = {}
    skipped = []
    for role, dataset in datasets.items():
        if isinstance(dataset, SampleStream):
            summary[role] = {"streamed": [{"source": source.name, "path": source.path} for source in dataset.sources]}
        elif dataset is not None:
            summary[role] = {
                "samples": len(dataset),
                "skipped": len(dataset.skipped),
                "images": int(dataset.num_images.sum()),
                "tokens": int(dataset.lengths.sum()),
                "longest": int(dataset.lengths.max()),
                "sources": [asdict(source) for source in dataset.contributions],
            }
            skipped += dataset.skipped
    write_json(folder / "data.json", summary)
    file = folder / SKIPPED_FILE
    before = file.read_text(encoding="utf-8").splitlines(keepends=True) if resumed and file.exists() else []
    whole = [line for line in before if line.endswith("}\n")]  # the run may have been killed in the middle of one
    write_text_whole(file, "".join(dict.fromkeys([*whole, *map(_skipped_as_json_line, skipped)])))


def contribution_table(contributions: Sequence[Contribution]) -> str:
    """Return what each source gives, as a table for the log."""
    total = sum(source.samples for source in contributions) or 1
    header = ("source", "records", "samples", "share", "images", "tokens", "skipped", "truncated")
    rows = [
        (source.source, f"{source.records:,}", f"{source.samples:,}", f"{source.samples / total:.1%}",
         f"{source.images:,}", f"{source.tokens:,}", f"{source.skipped:,}", f"{source.truncated:,}")
        for source in contributions
    ]  # fmt: skip
    return tabulate(rows, header, tablefmt="plain", colalign=("left", *["right"] * 7), disable_numparse=True)


def _skipped_as_json_line(record: Skipped) -> str:
    return f"{json.dumps(asdict(record), ensure_ascii=False)}\n"


class SkippedRecords:
    """Adds the records that a run leaves out on the way to `skipped.jsonl`, and stops it where that is not allowed.

    `world_size` is the number of ranks that have records of their own. Without `is_writer`, another rank, which is told
    of the same records, adds them.
    """

    def __init__(self, run: PreparedRun, config: DatasetConfig, world_size: int, *, is_writer: bool = True):
        self.path, self.is_writer = run.folder / SKIPPED_FILE, is_writer
        self.dataset, self.config, self.world_size = run.data.records["train"], config, world_size
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
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_skipped_as_json_line, new)))
        if isinstance(self.dataset, SampleDataset):
            total = (len(self.dataset) + len(self.dataset.skipped)) / self.world_size
        else:
            total = max(self.num_seen, MIN_STREAM_RECORDS)
        bad = [record for record in self.known_skipped if record.policy == "on_bad_sample"]
        check_skipped_share(new[0].source, bad, round(total), self.config.max_skipped)


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read: indented, letters not escaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
