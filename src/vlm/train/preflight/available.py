"""How much memory a device has, or what this process may take of the machine's."""

import os
from pathlib import Path

import psutil
import torch

CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may take."""


def ranks_here(world_size: int) -> int:
    """Return the number of ranks on this machine: as the launcher says, else all."""
    named = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    return next((int(number) for number in named if number.isdigit()), max(world_size, 1))


def available_bytes(device: torch.device, ranks: int = 1) -> int:
    """Return the memory of a GPU, else a rank's share of the machine's memory, or of what its container may take.

    `ranks` is the number of ranks on this machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [psutil.virtual_memory().total]
    for file in map(Path, CGROUP_FILES):
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
            limits.append(int(text))
    return min(limits) // ranks
