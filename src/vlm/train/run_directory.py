"""The run directory: everything that a run needs to be repeated, resumed or explained lies in it."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from transformers.utils import is_torchvision_available

from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset

PACKAGES = (
    "small-vlm", "torch", "torchvision", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "timm",
    "hydra-core", "omegaconf", "safetensors", "numpy", "pillow", "flash-attn",
)  # fmt: skip


def choose_directory(config: RunConfig, name: str) -> Path:
    """The run's directory: `trainer.output_dir`, or one that rank 0 names and tells the others."""
    if config.trainer.output_dir:
        return Path(config.trainer.output_dir)
    told: list[str] = [f"outputs/{name}-{datetime.now():%Y%m%d-%H%M%S}"]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return Path(told[0])


def describe(folder: Path, config: RunConfig) -> None:
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


def describe_data(folder: Path, datasets: dict[str, tuple[str, SampleDataset | None]]) -> None:
    """Write what each data file gave (`data.json`) and what was left out (`skipped.jsonl`).

    Args:
        folder: the run directory.
        datasets: role -> (path, dataset).
    """
    facts = {}
    skipped = []
    for role, (path, dataset) in datasets.items():
        if dataset is not None:
            facts[role] = {
                "path": path,
                "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
                "samples": len(dataset),
                "skipped": len(dataset.skipped),
                "truncated": dataset.num_truncated,
                "images": sum(dataset.num_images),
                "tokens": sum(dataset.lengths),
                "longest": max(dataset.lengths),
            }
            skipped += [asdict(one) for one in dataset.skipped]
    write_json(folder / "data.json", facts)
    lines = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in skipped)
    (folder / "skipped.jsonl").write_text(lines, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people: indented, with real letters."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
