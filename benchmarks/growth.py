"""Growth of costs: time and memory of a step by its tokens, and the time to the first step by the number of records.

    python -m benchmarks.growth [--gpu] [--part steps|start] [--tokens N …] [--records N …] [--different N]

Steps: SmolLM2-135M's and ViT-B/16's shapes, packed rows, lengths of LLaVA-665k up to 1,024 tokens, each number of
tokens in a separate process. A number that would need more memory than there is, by extrapolation, is left out and
reported. Start: a tiny model, so that the time from the call of the run to the end of its first step is that of
reading, counting and packing records of a short question and answer; then the same again with the cache. Each step but
the first of a process is a measurement. About ten minutes on two cores.
"""

import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import counting, isolated
from benchmarks.lengths import Record, Source, conversation, draw_records, write_records
from benchmarks.memory import peak_gigabytes
from benchmarks.report import RESULTS, Row, compared, report
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import release_memory, run_ours, silence_libraries

MAX_GIGABYTES = 20.0
"""The memory limit of a machine without a GPU."""
LINEAR = 1.1
"""Largest allowed growth of the cost of each token or record, as a factor."""
CACHED = 0.1
"""Largest allowed time of each further record at a start with a cache, as a share of its time at the first start."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the shape of the model whose steps are measured, a name of `SHAPES`.
        tokens: `trainer.max_tokens_per_batch`, ascending.
        records: numbers of records of the start, ascending.
        different: number of different texts in the start's data; further records repeat them under other ids, and the
            tokens of short texts that a process has just seen are not counted again.
        steps: number of steps for each number of tokens; the first is not measured.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "smol"
    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    records: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    different: int = 1_000
    steps: int = 4
    bf16: bool = False


GPU = Size(tokens=(1024, 2048, 4096, 8192, 16384, 32768, 65536), steps=10, bf16=True)
"""The size for one large GPU."""


@dataclass
class GrowthMeasurements:
    """Measurements by the number of tokens in a step.

    Attributes:
        seconds: seconds of each real token, for every measured step.
        peaks: peak memory of the process, in GB.
        left_out: why a number of tokens was not measured.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    peaks: dict[int, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


# --- steps -----------------------------------------------------------------------------------------------------------


def short_records(size: Size, tokens: int) -> list[Record]:
    """Return records that fill as many packs as there are steps; none is longer than the smallest pack."""
    shape = SHAPES[size.shape]
    shortest = min(size.tokens)
    drawn = draw_records(size.steps * tokens // 50)
    lengths = [len(sample["input_ids"]) for sample in counting.make_blank_samples(drawn, shape)]
    records = [record for record, length in zip(drawn, lengths, strict=True) if length <= shortest]
    return counting.select_records(records, shape, tokens, size.steps)


def measure_steps(size: Size, tokens: int, folder: Path) -> dict[str, Any]:
    """Return seconds of each real token in every step but the first, and the peak memory of this process."""
    path = write_records(folder / f"data-{tokens}", short_records(size, tokens), SHAPES[size.shape].side)
    words = [f"trainer.max_tokens_per_batch={tokens}", f"trainer.bf16={str(size.bf16).lower()}"]
    run = run_ours(folder / "parts", path, folder / f"{tokens} tokens", *words, keeps=True)
    tokens_per_step = [sum(batch["input_ids"].numel() for batch in step) for step in run.batches]
    seconds = [time / number for time, number in zip(run.seconds, tokens_per_step, strict=True)]
    return {"seconds": seconds[1:], "peak": peak_gigabytes()}


def grow_steps(size: Size, folder: Path) -> GrowthMeasurements:
    """Measure every number of tokens that memory suffices for."""
    write_parts(folder / "parts", SHAPES[size.shape])
    grown = GrowthMeasurements()
    for tokens in size.tokens:
        needed = expected_peak(grown.peaks, tokens)
        if needed > memory_limit():
            grown.left_out.append(f"{tokens:,} tokens: about {needed:.0f} GB needed, {memory_limit():.0f} GB there")
            print(f"Left out, {grown.left_out[-1]}", flush=True)
            continue
        result = isolated.run_in_subprocess("growth", str(tokens), size, folder)
        grown.seconds[tokens], grown.peaks[tokens] = result["seconds"], result["peak"]
        print(f"{tokens:,} tokens: {result['peak']:.2f} GB", flush=True)
    return grown


def expected_peak(peaks: dict[int, float], tokens: int) -> float:
    """Return the expected peak of a number of tokens, on a line through the last two measurements."""
    if len(peaks) < 2:
        return 0.0
    (few, low), (many, high) = sorted(peaks.items())[-2:]
    return high + (high - low) / (many - few) * (tokens - many)


def memory_limit() -> float:
    """Return the GB that a process may use."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable:"))
    return min(free, MAX_GIGABYTES)


# --- the start -------------------------------------------------------------------------------------------------------


def write_text_records(folder: Path, number: int, different: int) -> Path:
    """Write records without images, of a short question and answer, one a line; so many have different texts."""
    (folder / "images").mkdir(parents=True)  # a run expects the folder
    source = Source("short", 1, (1, 1), (10, 0.3), (8, 0.5), has_image=False)
    draw = random.Random(0)
    pool = [
        json.dumps(conversation(draw, Record(source, ((draw.randint(5, 15), draw.randint(3, 15)),))))
        for _ in range(min(number, different))
    ]
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            file.write(f'{{"id": "{index}", "conversations": {pool[index % len(pool)]}}}\n')
    return path


def grow_start(size: Size, folder: Path) -> dict[int, tuple[float, float]]:
    """Return number of records -> seconds to the end of the first step, without and with a cache."""
    write_parts(folder / "tiny", SHAPES["tiny"])
    seconds = {}
    for number in (size.records[0], *size.records):  # the first round is a warm-up
        data = folder / f"{number} records"
        path = write_text_records(data, number, size.different)
        words = ["trainer.max_tokens_per_batch=1024", "trainer.max_steps=1"]
        times = []
        for turn in ("first", "second"):
            run = run_ours(folder / "tiny", path, data / turn, *words)
            times.append(release_memory(run).seconds_to_first_step)
        seconds[number] = (times[0], times[1])
        print(f"{number:,} records: {times[0]:.2f} s, the second time {times[1]:.2f} s", flush=True)
        shutil.rmtree(data)
    return seconds


# --- the report ------------------------------------------------------------------------------------------------------


def step_rows(grown: GrowthMeasurements) -> list[Row]:
    """Return the time of each token against that of the smallest step, and the memory of each further token."""
    first, *rest = grown.seconds
    rows = [
        compared(f"time a token, {tokens:,} a step over {first:,}", _microseconds(grown.seconds[tokens]),
                 _microseconds(grown.seconds[first]), (f"{tokens:,}", f"{first:,}"), "µs", LINEAR, "lower")
        for tokens in rest
    ]  # fmt: skip
    sizes = list(grown.peaks)
    if len(sizes) >= 3:
        slopes = [
            (grown.peaks[many] - grown.peaks[few]) / (many - few) * 1e6
            for few, many in ((sizes[-2], sizes[-1]), (sizes[-3], sizes[-2]))
        ]
        labels = (f"from {sizes[-2]:,}", f"from {sizes[-3]:,}")
        title = f"memory of each further token to {sizes[-1]:,}"
        rows.append(compared(title, slopes[:1], slopes[1:], labels, "kB", LINEAR, "lower"))
    return rows


def _microseconds(seconds: Sequence[float]) -> list[float]:
    return [1e6 * time for time in seconds]


def start_rows(seconds: dict[int, tuple[float, float]]) -> list[Row]:
    """Return the cost of each further record, and the time of a start with a cache."""
    few, some, many = list(seconds)[-3:]
    slopes = [1e6 * (seconds[b][0] - seconds[a][0]) / (b - a) for a, b in ((some, many), (few, some))]
    labels = (f"from {some:,}", f"from {few:,}")
    cached = 1e6 * (seconds[many][1] - seconds[some][1]) / (many - some)
    return [
        compared(f"start, each further record to {many:,}", slopes[:1], slopes[1:], labels, "µs", LINEAR, "lower"),
        compared(f"start, each further record to {many:,}, again over at first", [cached], slopes[:1],
                 ("again", "at first"), "µs", CACHED, "lower"),
    ]  # fmt: skip


def draw_lines(grown: GrowthMeasurements | None, start: dict[int, tuple[float, float]] | None, path: Path) -> None:
    """Plot time and memory by tokens, and time to the first step by records."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    time, memory, first = figure.subplots(1, 3)
    if grown is not None:
        tokens = list(grown.seconds)
        time.plot(tokens, [statistics.median(grown.seconds[number]) * number for number in tokens], marker="o")
        memory.plot(tokens, [grown.peaks[number] for number in tokens], marker="o")
    for turn, label in enumerate(("first time", "from the cache")):
        if start is not None:
            first.plot(list(start), [times[turn] for times in start.values()], marker="o", label=label)
    for axes, x_label, y_label in (
        (time, "tokens of a step", "seconds a step"),
        (memory, "tokens of a step", "peak memory, GB"),
        (first, "records", "seconds to the end of the first step"),
    ):
        axes.set_xscale("log", base=2 if x_label != "records" else 10)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if axes is not memory:
            axes.set_yscale("log")
    if start is not None:
        first.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and report; with `--measure`, run as the measured process."""
    parser = make_parser(__doc__)
    parser.add_argument("--part", choices=("steps", "start"), default=None, help="one of the two; both")
    for name in ("tokens", "records"):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=None)
    parser.add_argument("--different", type=int, default=None, help="different texts among the records of the start")
    isolated.add_arguments(parser)
    args = parser.parse_args()
    if args.records is not None and len(args.records) < 3:
        parser.error(f"--records {' '.join(map(str, args.records))}: at least three numbers are needed")
    silence_libraries()
    if args.measure:
        size = Size(**{**args.size, "tokens": tuple(args.size["tokens"]), "records": tuple(args.size["records"])})
        print(json.dumps(measure_steps(size, int(args.measure), args.folder)))
        return
    size = make_size(args, Size(), GPU)
    with tempfile.TemporaryDirectory() as name:
        grown = grow_steps(size, Path(name)) if args.part != "start" else None
        start = grow_start(size, Path(name)) if args.part != "steps" else None
    rows = [*(step_rows(grown) if grown else []), *(start_rows(start) if start else [])]
    notes = {
        "peak memory in GB by tokens": grown.peaks if grown else {},
        "left out": grown.left_out if grown else [],
        "size": asdict(size),
        "seconds to the end of the first step by records, first and second time": start or {},
    }
    title = "growth" + ("-gpu" if args.gpu else "") + (f"-{args.part}" if args.part else "")
    report(title, rows, notes)
    draw_lines(grown, start, RESULTS / f"{title}_lines.png")


if __name__ == "__main__":
    main()
