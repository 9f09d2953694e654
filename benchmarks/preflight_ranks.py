"""What two ranks hold under each way of sharding, against what `vlm check` predicts for each of them.

    python -m benchmarks.preflight_ranks [--shape small]

Two processes on the CPU train a few steps with data parallelism, ZeRO-1, 2, 3, FSDP2 and offloaded states. Parameters
and states of the optimiser are the tensors that a rank holds behind the second step; the peak is the most bytes of
tensors that were alive at once within it, gradients and DeepSpeed's buffers included. Where states or weights are
offloaded, the CPU is both device and host: the peak is compared with the sum of both, and states with the host's.
PyTorch's count has weights that FSDP2 gathered once even where it has freed them since.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lengths import draw_records, write_records
from benchmarks.report import RESULTS
from benchmarks.shapes import SHAPES, write_parts
from tests.forked import rank_environments
from vlm.checks.compose import strip_launcher_arguments

RANKS = 2
BUCKET = 200_000
"""Elements of DeepSpeed's buffers: by default they are larger than these models."""
WITHIN = 0.10
PLAIN = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"},
}  # fmt: skip
CPU = {"device": "cpu"}
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1}, "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero2 + offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3 + offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU,
                        "stage3_gather_16bit_weights_on_model_save": True},
}  # fmt: skip
WAYS = ("none", *ZERO, "fsdp2")


@dataclass(frozen=True)
class Held:
    """Bytes of the first rank: predicted, and counted."""

    parameters: tuple[int, int]
    states: tuple[int, int]
    peak: tuple[int, int]

    def off(self) -> dict[str, float]:
        """Return how far each prediction is off, as a share."""
        return {name: predicted / counted - 1 for name, (predicted, counted) in asdict(self).items()}


def words_of_way(way: str, folder: Path, bucket: int = BUCKET) -> list[str]:
    """Return the overrides that choose a way of sharding; `bucket` is in elements, of DeepSpeed's buffers."""
    if way == "none":
        return ["trainer.deepspeed=null"]
    if way == "fsdp2":
        return ["trainer.deepspeed=null", "trainer.sharding=fsdp2"]
    file = folder / f"{way.replace(' ', '')}.json"
    file.write_text(json.dumps({**PLAIN, "zero_optimization": {**ZERO[way], "reduce_bucket_size": bucket}}))
    return [f"trainer.deepspeed={file}"]


def inspect_on_rank(folder: Path, ways: Sequence[str], words: Sequence[str]) -> None:
    """Inspect a run on this rank under each way of sharding, and write what was found of its memory."""
    from tests.fixtures import compose_config
    from vlm.train.preflight import probe
    from vlm.train.preflight.inspect import inspect_run

    logging.disable(logging.WARNING)
    probe.MIN_TIMED = probe.MAX_TIMED = 1  # time is not asked for
    for way in ways:
        config = compose_config("finetune-smol", [*words, *words_of_way(way, folder)])
        memory = inspect_run(config, "finetune-smol").memory
        assert memory is not None
        row = memory.expected
        assert row is not None, memory.note
        parameters, states = memory.held["parameters"], memory.held["optimiser states"]
        held = Held(
            (row.weights, parameters),
            (row.states + (row.host if "offload" in way else 0), states),
            (memory.expected_bytes, memory.measured),
        )
        if os.environ["RANK"] == "0":
            file_of(way, folder).write_text(json.dumps(asdict(held)))


def file_of(way: str, folder: Path) -> Path:
    """Return where a way's figures are written."""
    return folder / f"held-{way.replace(' ', '')}.json"


def measure(ways: Sequence[str], words: Sequence[str], folder: Path) -> dict[str, Held]:
    """Return what a rank holds under each way of sharding."""
    command = [sys.executable, "-m", "benchmarks.preflight_ranks", "--inspect", str(folder), ",".join(ways), *words]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(command, env={**environment, **own}) for own in rank_environments(RANKS)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        print(f"ranks ended with {codes}", file=sys.stderr)
    files = {way: file_of(way, folder) for way in ways}
    return {way: Held(**json.loads(file.read_text())) for way, file in files.items() if file.is_file()}


def main() -> None:
    """Measure every way, print the table and put it into `results/preflight_ranks.json`."""
    given = strip_launcher_arguments(sys.argv[1:])
    if given[:1] == ["--inspect"]:
        inspect_on_rank(Path(given[1]), given[2].split(","), given[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--bf16", action="store_true", help="matrix products in half precision")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "parts", SHAPES[args.shape])
        write_records(folder / "data", draw_records(32), SHAPES[args.shape].side)
        words = [
            f"model.visual_encoder.hf_name={folder / 'parts' / 'visual_encoder'}",
            f"model.language_model.hf_name={folder / 'parts' / 'language_model'}",
            f"dataset.path={folder / 'data' / 'records.json'}", f"dataset.image_folder={folder / 'data' / 'images'}",
            f"dataset.cache_dir={folder / 'cache'}", "dataset.template=chatml", "dataset.max_length=256",
            "trainer.use_cpu=true", "trainer.per_device_train_batch_size=1", "trainer.starts_from=null",
            "trainer.train_sampling_strategy=random", f"trainer.bf16={str(args.bf16).lower()}",
        ]  # fmt: skip
        held = measure(args.ways, words, folder)
    for way, found in held.items():
        cells = (f"  {name} {predicted / 2**20:.1f} {counted / 2**20:.1f} MiB {found.off()[name]:+.1%}"
                 for name, (predicted, counted) in asdict(found).items())  # fmt: skip
        print(f"{way:<16}{''.join(cells)}", flush=True)
    hits = sum(abs(found.off()["peak"]) <= WITHIN for found in held.values())
    print(f"peak: {hits} of {len(held)} within {WITHIN:.0%}")
    file = RESULTS / "preflight_ranks.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = content.setdefault("bfloat16" if args.bf16 else "float32", {})
    rows |= {way: asdict(found) for way, found in held.items()}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
