"""Peak memory of training at 4,096 real tokens a step: packed rows against the same samples in a padded batch.

    python -m benchmarks.memory [--gpu] [--repeats N]

Each variant runs two optimiser steps in a process of its own, so that the optimiser's states are there in the second;
what is told is the most memory that the process ever had (on a GPU: that PyTorch ever allocated there). SmolLM2-135M's
and ViT-B/16's shapes, lengths of LLaVA-665k: of many drawn sets, the one that is padded to about as many positions
as they are on average; memory has to be there for the worst. About five minutes on two cores, and up to 20 GB.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import apart, counting
from benchmarks.finetune import select_records
from benchmarks.lengths import Record, draw_records, write_records
from benchmarks.opening import read_kilobytes
from benchmarks.report import compared, report
from benchmarks.shapes import SHAPES, compose_model, make_llava, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import SEED, count_padded_positions, run_ours, silence_libraries, train_padded

NUM_STEPS = 2
NUM_DRAWN_SETS = 101
"""So many sets of samples are drawn to find the one of average padding."""


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        shape: of the model, a name of `SHAPES`.
        tokens: real tokens of a step, about.
        repeats: processes of each variant.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "smol"
    tokens: int = 4096
    repeats: int = 2
    bf16: bool = False


GPU = Size(tokens=16384, repeats=3, bf16=True)
"""For one large GPU."""


def draw_average_records(size: Size) -> tuple[list[Record], int]:
    """Records that fill one pack, of average padding among sets that were drawn alike; and their padded positions."""
    shape = SHAPES[size.shape]
    sets = []
    for seed in range(NUM_DRAWN_SETS):
        records = select_records(draw_records(size.tokens // 50, seed), shape, size.tokens, 1)
        sets.append((count_padded_positions(counting.make_blank_samples(records, shape)), seed, records))
    mean = statistics.mean(positions for positions, _, _ in sets)
    positions, _, records = min(sets, key=lambda one: (abs(one[0] - mean), one[1]))
    return records, positions


def measure_ours(size: Size, folder: Path) -> None:
    """The run that `vlm` starts, on packed rows."""
    words = [
        f"trainer.max_tokens_per_batch={size.tokens}",
        f"trainer.num_train_epochs={NUM_STEPS}",
        f"trainer.bf16={str(size.bf16).lower()}",
    ]
    run_ours(folder / "parts", folder / "data" / "records.json", folder / "packed", *words)


def measure_padded(size: Size, folder: Path) -> None:
    """LLaVA and Trainer of transformers, on one padded batch."""
    ours, processor = compose_model(folder / "parts", SEED)
    samples = encoded_samples(folder, processor)
    model = make_llava(ours, folder / "parts")
    del ours
    if size.bf16:
        model.model.vision_tower.to(torch.bfloat16)
    train_padded(model, processor.tokenizer, [[samples]] * NUM_STEPS, folder / "padded", bf16=size.bf16)


def encoded_samples(folder: Path, processor: Any) -> list[dict[str, Any]]:
    """The records, encoded as a run does it, with normalised pixels."""
    from vlm.config.schema import DatasetConfig
    from vlm.data.dataset import load_dataset
    from vlm.data.encoding.sample_encoder import SampleEncoder

    data = folder / "data"
    config = DatasetConfig(
        path=str(data / "records.json"), image_folder=str(data / "images"), cache_dir=str(data / "cache")
    )
    dataset = load_dataset(config, SampleEncoder(processor, 2048, truncate=False))
    items: list[Any] = [dataset[index] for index in range(len(dataset))]
    for item in items:
        if item.get("pixel_values") is not None:
            item["pixel_values"] = processor.normalise(item["pixel_values"])
    return [{name: value for name, value in item.items() if value is not None} for item in items]


def peak_gigabytes() -> float:
    """The most memory that this process had so far, on its GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return read_kilobytes("status", "VmHWM") * 1024 / 1e9


MEASURES = {"packed": measure_ours, "padded": measure_padded}


def main() -> None:
    """Measure and report, or, with `--measure`, be the process that is measured."""
    parser = make_parser(__doc__, ("tokens", "repeats"))
    apart.add_arguments(parser)
    args = parser.parse_args()
    silence_libraries()
    if args.measure:
        MEASURES[args.measure](Size(**args.size), args.folder)
        print(json.dumps(peak_gigabytes()))
        return
    size = make_size(args, Size(), GPU)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "parts", SHAPES[size.shape])
        records, positions = draw_average_records(size)
        write_records(folder / "data", records, SHAPES[size.shape].side)
        tokens = counting.facts(counting.make_blank_samples(records, SHAPES[size.shape])).tokens
        print(f"{len(records)} samples of {tokens:,} tokens, padded {positions:,} positions", flush=True)
        found: dict[str, list[float]] = {name: [] for name in MEASURES}
        for _ in range(size.repeats):
            for variant, peaks in found.items():
                peaks.append(apart.run_in_subprocess("memory", variant, size, folder))
                print(f"  {variant}: {peaks[-1]:.3f} GB", flush=True)
    title = f"peak memory at {size.tokens:,} tokens a step, packed over padded"
    notes = {"real tokens of a step": tokens, "positions once padded": positions}
    row = compared(title, found["packed"], found["padded"], ("packed", "padded"), "GB", 0.6, "lower")
    report("memory-gpu" if args.gpu else "memory", [row], notes)


if __name__ == "__main__":
    main()
