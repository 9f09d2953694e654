"""Peak memory of training at 4,096 real tokens a step: packed rows against the same samples in a padded batch.

    python -m benchmarks.memory [--gpu] [--repeats N]

Each variant runs two optimiser steps in a separate process, so that the optimiser's states exist in the second; the
result is the peak memory of the process (on a GPU: the peak that PyTorch allocated). SmolLM2-135M's and ViT-B/16's
shapes, lengths of LLaVA-665k: of many drawn sets, the one whose number of padded positions is nearest to the mean,
while a real run needs memory for the worst. About five minutes on two cores, and up to 20 GB.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import counting, isolated
from benchmarks.lengths import Record, draw_records, write_records
from benchmarks.opening import read_kilobytes
from benchmarks.report import compared, report
from benchmarks.shapes import SHAPES, compose_model, make_llava, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import SEED, count_padded_positions, run_ours, silence_libraries, train_padded

NUM_STEPS = 2
NUM_DRAWN_SETS = 101
"""Number of sets of samples that are drawn to find one of average padding."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        tokens: approximate number of real tokens in a step.
        repeats: number of processes of each variant.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "smol"
    tokens: int = 4096
    repeats: int = 2
    bf16: bool = False


GPU = Size(tokens=16384, repeats=3, bf16=True)
"""The size for one large GPU."""


def draw_average_records(size: Size) -> tuple[list[Record], int]:
    """Return records that fill one pack, of average padding among many drawn sets; and their padded positions."""
    shape = SHAPES[size.shape]
    sets = []
    for seed in range(NUM_DRAWN_SETS):
        records = counting.select_records(draw_records(size.tokens // 50, seed), shape, size.tokens, 1)
        sets.append((count_padded_positions(counting.make_blank_samples(records, shape)), seed, records))
    mean = statistics.mean(positions for positions, _, _ in sets)
    positions, _, records = min(sets, key=lambda drawn: (abs(drawn[0] - mean), drawn[1]))
    return records, positions


def measure_ours(size: Size, folder: Path) -> None:
    """Run training as `vlm` does, on packed rows."""
    words = [
        f"trainer.max_tokens_per_batch={size.tokens}",
        f"trainer.num_train_epochs={NUM_STEPS}",
        f"trainer.bf16={str(size.bf16).lower()}",
    ]
    run_ours(folder / "parts", folder / "data" / "records.json", folder / "packed", *words)


def measure_padded(size: Size, folder: Path) -> None:
    """Train LLaVA with the Trainer of transformers, on one padded batch."""
    ours, processor = compose_model(folder / "parts", SEED)
    samples = encoded_samples(folder, processor)
    model = make_llava(ours, folder / "parts")
    del ours
    if size.bf16:
        model.model.vision_tower.to(torch.bfloat16)
    train_padded(model, processor.tokenizer, [[samples]] * NUM_STEPS, folder / "padded", bf16=size.bf16)


def encoded_samples(folder: Path, processor: Any) -> list[dict[str, Any]]:
    """Return the records, encoded as in a run, with normalised pixels."""
    from vlm.config.dataset_schema import DatasetConfig
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
    """Return the peak memory of this process so far, on its GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return read_kilobytes("status", "VmHWM") * 1024 / 1e9


MEASURES = {"packed": measure_ours, "padded": measure_padded}


def main() -> None:
    """Measure and report; with `--measure`, run as the measured process."""
    parser = make_parser(__doc__, ("tokens", "repeats"))
    isolated.add_arguments(parser)
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
        tokens = counting.sample_stats(counting.make_blank_samples(records, SHAPES[size.shape])).tokens
        print(f"{len(records)} samples of {tokens:,} tokens, padded {positions:,} positions", flush=True)
        peaks: dict[str, list[float]] = {name: [] for name in MEASURES}
        for _ in range(size.repeats):
            for variant, gigabytes in peaks.items():
                gigabytes.append(isolated.run_in_subprocess("memory", variant, size, folder))
                print(f"  {variant}: {gigabytes[-1]:.3f} GB", flush=True)
    title = f"peak memory at {size.tokens:,} tokens a step, packed over padded"
    notes = {"real tokens of a step": tokens, "positions once padded": positions}
    row = compared(title, peaks["packed"], peaks["padded"], ("packed", "padded"), "GB", 0.6, "lower")
    report("memory-gpu" if args.gpu else "memory", [row], notes)


if __name__ == "__main__":
    main()
