"""The facts that `vlm doctor` shows: versions, devices, extras, space, caches, and what works on this machine.

Each is a row of a name and a text. Torch is imported, transformers is not. To add a fact, add a row to the function of
its section; to add an extra, add it to `EXTRAS`.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from vlm.assembly.hub_reach import behind_proxy, why_unreachable, without_password

EXTRAS = {
    "eval": (("rouge_score", "sacrebleu", "rapidfuzz", "pycocoevalcap"), "metrics of answers: vlm eval --data"),
    "export": (("gguf", "onnx", "onnxruntime", "onnxscript"), "vlm export --format gguf and onnx"),
    "flash": (("flash_attn",), "FlashAttention 2, on GPUs"),
    "liger": (("liger_kernel",), "trainer.use_liger_kernel=true, on Linux with GPUs"),
    "quant": (("bitsandbytes",), "4-bit and 8-bit models (QLoRA)"),
    "serve": (("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance"), "vlm serve"),
    "mlflow": (("mlflow",), "trainer.report_to=mlflow"),
    "sweep": (("hydra_plugins", "optuna"), "searches: hydra/sweeper=optuna"),
    "track": (("wandb",), "trainer.report_to=wandb"),
    "trackio": (("trackio",), "trainer.report_to=trackio"),
    "video": (("av",), "records with videos"),
    "web": (("gradio",), "vlm web"),
}
"""Extra -> the modules that it installs, and what they are for."""

PACKAGES = (
    "small-vlm", "torch", "torchvision", "transformers", "accelerate", "peft", "deepspeed", "datasets", "tokenizers",
    "huggingface-hub", "hydra-core", "omegaconf", "timm", "numpy", "pillow", "flash-attn", "bitsandbytes",
)  # fmt: skip
"""Packages whose versions are shown."""

VARIABLES = (
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "NCCL_DEBUG",
    "TORCHDYNAMO_DISABLE",
)
"""Environment variables that change what runs do, shown where they are set."""


@dataclass(frozen=True)
class Section:
    """A title and its rows: name and text."""

    title: str
    rows: list[tuple[str, str]]


def find_facts(*, offline: bool = False) -> list[Section]:
    """Return all sections; with `offline`, the Hub is not asked whether it answers."""
    sections = {
        "Versions": _find_versions(),
        "Machine": _find_machine(),
        "Extras": _find_extras(),
        "Caches and the Hub": _find_caches(offline=offline),
        "What works here": _find_abilities(),
    }
    return [Section(title, [*_without_home(rows)]) for title, rows in sections.items()]


def _without_home(rows: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield rows with `~` for the home folder, and what a broken library raises as the last one."""
    try:
        for name, text in rows:
            yield name, hide_home(text)
    except Exception as error:
        yield "failed", hide_home(_describe(error))


def hide_home(text: str) -> str:
    """Return a text with `~` for the home folder."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _find_versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        yield name, get_version(name) or "not installed"


def get_version(package: str) -> str | None:
    """Return the version of an installed package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _find_machine() -> Iterator[tuple[str, str]]:
    import psutil
    import torch

    yield "system", f"{platform.system()} {platform.release()} ({platform.machine()})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    yield "CPU", f"{cores} cores"
    yield "memory", f"{_format_size(memory.total)}, {_format_size(memory.available)} available"
    yield "disk", f"{_format_size(shutil.disk_usage(Path.cwd()).free)} free in the current folder"
    yield "CUDA", f"torch was built for {torch.version.cuda}" if torch.version.cuda else "torch was built without it"
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use; runs use the CPU"
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"compute capability {device.major}.{device.minor}"
        yield f"GPU {number}", f"{device.name}, {_format_size(free)} of {_format_size(total)} free, {capability}"


def _find_extras() -> Iterator[tuple[str, str]]:
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        if not missing:
            yield extra, f"installed ({purpose})"
        else:
            yield extra, f"missing {', '.join(missing)}, needed for {purpose}: {install_command(extra)}"


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    isolation = "--no-build-isolation " if extra == "flash" else ""  # its build imports torch
    return f"pip install {isolation}'small-vlm[{extra}]'"


def _find_caches(*, offline: bool) -> Iterator[tuple[str, str]]:
    from huggingface_hub import constants, get_token

    folder = Path(constants.HF_HUB_CACHE)
    yield "Hugging Face cache", f"{folder}, {_format_size(_free_space(folder))} free"
    records = Path(constants.HF_HOME) / "vlm"
    yield "cache of vlm", f"{records}{'' if records.is_dir() else ', not there yet'}"
    yield "token", "there is one" if get_token() else "none (public models need none)"
    yield "endpoint", describe_endpoint(constants.ENDPOINT, offline=offline or constants.HF_HUB_OFFLINE)
    for name in VARIABLES:
        if name in os.environ:
            yield name, without_password(os.environ[name])


def _free_space(folder: Path) -> int:
    """Return the free bytes where a folder is or would be made."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def describe_endpoint(address: str, *, offline: bool) -> str:
    """Return the Hub's address, without a password in it, and whether its host accepts a connection."""
    shown = without_password(address)
    if offline:
        return f"{shown}, not asked (offline)"
    if behind_proxy():
        return f"{shown}, through a proxy, not asked"
    if reason := why_unreachable(address):
        return f"{shown}, cannot be reached ({reason}); use local folders, or a mirror in HF_ENDPOINT"
    return f"{shown}, can be reached"


def _find_abilities() -> Iterator[tuple[str, str]]:
    """Yield what is tried here, each with its outcome; a library that fails in any way is what is looked for."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    missing = "no C++ compiler, which DeepSpeed's offloading and torch.compile need: apt install g++"
    yield "C++ compiler", compiler or missing
    yield "ninja", shutil.which("ninja") or "not on PATH, which DeepSpeed's compiled operations need"
    yield (
        "CUDA compiler",
        shutil.which("nvcc") or "no nvcc, which only building flash-attn and DeepSpeed's CUDA ops needs",
    )
    for name, attempt in {"bf16": _try_bf16, "gloo": _try_gloo, "NCCL": _try_nccl}.items():
        yield name, _outcome(attempt)


def _outcome(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except Exception as error:
        return f"fails: {_describe(error)}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _try_bf16() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    result = float((matrix @ matrix)[0, 0])
    native = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    speed = "" if native else "; this GPU emulates it, so trainer.fp16=true is faster"
    return f"works on {device}{speed}" if result == 16 else f"is wrong on {device}: 16 ones add up to {result}"


def _try_gloo() -> str:
    """Make and destroy a group of one process, which training on several CPUs needs."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return "torch was built without it; several processes need it on CPUs"
    if dist.is_initialized():
        return "works (a process group is running)"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
    return "works"


def _try_nccl() -> str:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_nccl_available():
        return f"torch was built without it on {sys.platform}; several GPUs need it"
    return "in this torch"


def _format_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
