"""How much memory a device has, or what this process may take of the machine's."""

from pathlib import Path

import psutil
import torch

CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may take."""


def available_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, else the smaller of the machine's memory and of what its container may take."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [psutil.virtual_memory().total]
    for file in map(Path, CGROUP_FILES):
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
            limits.append(int(text))
    return min(limits)
