"""The peak of a device in operations per second, with which those of a run are compared."""

import time
from dataclasses import dataclass

import torch

DATA_SHEET_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "B100": 1800.0,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "H100 NVL": 835.0,
    "H100 PCIE": 756.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "GH200": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "RTX 6000 ADA": 364.25,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
    "MI250X": 191.5,
}
"""Part of a GPU's name -> TFLOP/s of dense bfloat16 matrix products with float32 sums, from its data sheet. An MI250X
is two devices, and this is the figure of one. The longest name that matches is taken."""

REDUCED_DEVICE_WORDS = {"LAPTOP", "MIG"}
"""Words in the name of a device that is slower than its data sheet: a part of a GPU, or one with less power."""

MEASURED = "measured: "
MEASURE_SECONDS = 0.3
"""How long a device that is not in the table is measured, in seconds."""
SIDES = {"cuda": (8192,), "cpu": (256, 512, 1024)}
"""Sides of the square matrices that a device multiplies. On a CPU, small products take about a millisecond, so that on
a busy machine some of them finish before another process gets the core."""


@dataclass(frozen=True)
class Peak:
    """The peak of a device in 10^12 operations per second, and the source of the number."""

    tflops: float
    source: str

    @property
    def is_measured(self) -> bool:
        """Whether the number was measured on this machine, and may be too low."""
        return self.source.startswith(MEASURED)


def get_peak_tflops(device: torch.device, dtype: torch.dtype, override: float | None) -> Peak:
    """Return the peak of a device: `trainer.peak_tflops` if given, from the table, or measured in this precision."""
    if override is not None:
        return Peak(override, "trainer.peak_tflops")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if (tflops := data_sheet_tflops(name)) is not None:
        return Peak(tflops, f"data sheet of {name}, dense bfloat16")
    precision = str(dtype).removeprefix("torch.")
    source = f"{MEASURED}a matrix product in {precision} on this {name or device.type}, the fastest of many"
    return Peak(measure_tflops(device, dtype), source)


def data_sheet_tflops(name: str) -> float | None:
    """Return the table's entry for a GPU by its name; None if there is none, or the device is part of a GPU."""
    words = f" {name.upper().replace('-', ' ')} "
    if REDUCED_DEVICE_WORDS.intersection(words.split()):
        return None
    matches = [entry for entry in DATA_SHEET_TFLOPS if f" {entry} " in words]
    return DATA_SHEET_TFLOPS[max(matches, key=len)] if matches else None


def measure_tflops(device: torch.device, dtype: torch.dtype, seconds: float = MEASURE_SECONDS) -> float:
    """Return TFLOP/s of the fastest of many square matrix products of several sizes, measured for `seconds` in all.

    Other work on the machine hardly slows down the fastest one.
    """
    sides = SIDES["cuda" if device.type == "cuda" else "cpu"]
    return max(_measure_side(side, device, dtype, seconds / len(sides)) for side in sides)


def _measure_side(side: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # kernels are chosen
    synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
