"""What a start costs: processor time of a whole tiny run, of counting new records, and of a start with many of them.

    python -m benchmarks.start [--repeats N] [--records N] [--other SRC]

Each measurement is a process of its own; variants take turns, and processor time (user and system) is compared, which
other work on the machine changes little.

Records are counted by their words, by encoding each of them, and, with `--other`, as another checkout counts them; the
counts must be the same. The tiny run, of one step, is compared with a program that only imports PyTorch and
transformers' `Trainer`, which no run goes without, and with the same run of the other checkout. At last, many new
records, of a short question and answer each, are counted while a run trains, or before, as they are where
`dataset.over_length=skip`; the process of the run and those that have ended by the first step are added up. About a
quarter of an hour on two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.prose import llava_lengths, make_prose_tokenizer, short_lengths, write_prose_records
from benchmarks.report import Row, below, compared, report
from benchmarks.shapes import SHAPES, model_keys, write_parts
from benchmarks.variants import data_keys

BARE = "import torch; from transformers import Trainer; Trainer"
"""A program that imports what no run goes without."""
FIRST_STEP = """
import resource, sys, time
from transformers.trainer_callback import CallbackHandler
begun, call = time.perf_counter(), CallbackHandler.call_event

def call_event(self, event, *given, **named):
    result = call(self, event, *given, **named) if event != "on_step_end" else None
    if event == "on_step_end":
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print("measured", sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter() - begun, flush=True)
        result = call(self, event, *given, **named)
    return result

CallbackHandler.call_event = call_event
from vlm.cli.main import main
main(sys.argv[1:])
"""
"""A run that prints its processor time and the seconds at the end of its first step."""
COUNT = """
import sys, time
from transformers import AutoTokenizer, CLIPImageProcessor
from vlm.config.dataset_schema import DatasetConfig
from vlm.data import token_counts
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sources import make_sources
from vlm.models import VLMProcessor

folder, way, *paths = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = VLMProcessor(CLIPImageProcessor(), tokenizer, chat_template=tokenizer.chat_template)
encoder = SampleEncoder(processor, 4096, truncate=False)
token_counts._collect_seldom(0)
for path in paths:
    (source,) = make_sources(DatasetConfig(path=path, cache_dir=folder), encoder)
    counter, numbers = token_counts.TokenCounter(encoder), range(len(source))
    if way == "encode":
        counter._plain = None
    begun = time.process_time()
    rows = [token_counts.count_record(source, number, decode=False, counter=counter)[1:4] for number in numbers]
    print("measured", (time.process_time() - begun) / len(rows), *map(sum, zip(*rows)))
"""
"""A program that counts records as a worker does, and prints the processor time of each, and sums of counts."""
TINY_RECORDS = 64
COUNTED = {"short": (short_lengths, 20_000), "LLaVA": (llava_lengths, 4_000)}
"""Records that are counted: their lengths, and how many there are."""
BY_WORDS = 0.6
"""Largest allowed processor time of counting records by words, as a share of encoding them."""
SECONDS = 20.0
"""Largest allowed time up to the first step with a million new records, on two idle cores."""
OF_BARE = 2.0
"""Largest allowed processor time of a tiny run, as a multiple of that of its libraries' imports."""


def run_words(parts: Path, records: Path, folder: Path, *words: str) -> list[str]:
    """Return the command line of a run of one step that saves nothing before its end."""
    keys = [*model_keys(parts), *data_keys(records), f"trainer.output_dir={folder}", *words]
    still = ["starts_from=null", "max_steps=1", "save_strategy=no", "num_samples=0", "report_to=none",
             "disable_tqdm=true", "use_cpu=true", "dataloader_num_workers=0", "packing=false",
             "train_sampling_strategy=random"]  # fmt: skip
    return ["-cn", "finetune-smol", *keys, *(f"trainer.{word}" for word in still)]


def run_python(words: Sequence[str], source: Path | None = None) -> tuple[float, str]:
    """Run Python to its end; return its processor time in seconds, that of its children included, and its output.

    `source` is the folder of another version of the package.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    before = os.times()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{words[:2]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return sum(after[2:4]) - sum(before[2:4]), done.stdout


def compare_tiny_runs(folder: Path, repeats: int, other: Path | None) -> list[Row]:
    """Return the processor time of a tiny run against that of its libraries, and of another version."""
    records = write_prose_records(folder / "tiny records", short_lengths(TINY_RECORDS))
    words = ["-m", "vlm", *run_words(folder / "tiny", records, folder / "run")]
    variants: dict[str, tuple[list[str], Path | None]] = {"run": (words, None), "imports": (["-c", BARE], None)}
    if other is not None:
        variants["other"] = (words, other)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):  # the first one fills caches
        for name, (command, source) in variants.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            measured, _ = run_python(command, source)
            if turn:
                seconds[name].append(measured)
                print(f"{name}: {measured:.2f} s", flush=True)
    rows = [compared("a tiny run over its libraries' imports", seconds["run"], seconds["imports"], ("run", "imports"),
                     "s", OF_BARE, "lower")]  # fmt: skip
    if other is not None:
        rows.append(compared("a tiny run over that of another version", seconds["run"], seconds["other"],
                             ("run", "other"), "s", 1.0, "lower"))  # fmt: skip
    return rows


def compare_counting(folder: Path, repeats: int, other: Path | None) -> list[Row]:
    """Return the processor time of counting records by words against that of encoding them, and of another version.

    Raises:
        RuntimeError: the counts differ.
    """
    make_prose_tokenizer().save_pretrained(folder / "tokenizer")
    paths = [str(write_prose_records(folder / name, lengths(number))) for name, (lengths, number) in COUNTED.items()]
    variants: dict[str, Path | None] = {"words": None, "encode": None, **({} if other is None else {"other": other})}
    seconds: dict[tuple[str, str], list[float]] = {(name, way): [] for name in COUNTED for way in variants}
    sums: set[tuple[str, ...]] = set()
    for turn in range(repeats + 1):  # the first one fills caches
        for way, source in variants.items():
            _, output = run_python(["-c", COUNT, str(folder / "tokenizer"), way, *paths], source)
            lines = [line.split()[1:] for line in output.splitlines() if line.startswith("measured")]
            sums.add(tuple(number for _, *counted in lines for number in counted))
            for name, (measured, *_) in zip(COUNTED, lines, strict=True):
                if turn:
                    seconds[name, way].append(1e6 * float(measured))
                    print(f"{name}, {way}: {seconds[name, way][-1]:.1f} µs a record", flush=True)
    if len(sums) > 1:
        raise RuntimeError(f"the counts of records differ: {sums}")
    return [
        compared(f"counting {name} records, by words over {way}", seconds[name, "words"], seconds[name, way],
                 ("words", way), "µs", BY_WORDS, "lower")
        for name in COUNTED for way in list(variants)[1:]
    ]  # fmt: skip


def compare_new_records(folder: Path, number: int, repeats: int) -> list[Row]:
    """Return the processor time up to the first step with many new records, counted while it trains and before."""
    records = write_prose_records(folder / "many records", short_lengths(number))
    processor: dict[str, list[float]] = {"error": [], "skip": []}
    seconds: dict[str, list[float]] = {"error": [], "skip": []}
    for _ in range(repeats):
        for policy in processor:
            shutil.rmtree(folder / "run", ignore_errors=True)
            shutil.rmtree(records.parent / "cache", ignore_errors=True)
            words = run_words(folder / "tiny", records, folder / "run", f"dataset.over_length={policy}")
            _, output = run_python(["-c", FIRST_STEP, *words])
            used, took = next(line for line in output.splitlines() if line.startswith("measured")).split()[1:]
            processor[policy].append(float(used))
            seconds[policy].append(float(took))
            print(f"{policy}: {used} s of processor time, {took} s", flush=True)
    return [
        compared(f"first step with {number:,} new records", processor["error"], processor["skip"],
                 ("counted meanwhile", "counted first"), "s", 0.5, "lower"),
        below(f"seconds to the first step with {number:,} new records", seconds["error"], "seconds", "s", SECONDS),
    ]  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--other", type=Path, default=None, metavar="SRC", help="`src` of another checkout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "tiny", SHAPES["tiny"])
        rows = compare_counting(folder, args.repeats, args.other)
        rows += compare_tiny_runs(folder, args.repeats, args.other)
        if args.records:
            rows += compare_new_records(folder, args.records, max(args.repeats // 2, 1))
    report("start", rows, json.loads(json.dumps({"repeats": args.repeats, "records": args.records})))


if __name__ == "__main__":
    main()
