"""Epochs of a head on a frozen body: with cached features, against running the body each time.

    python -m benchmarks.features [--records N] [--repeats N]

The body has the shapes of SmolLM2-135M (text) and ViT-B/16 at 224 pixels (images), with random weights. Both variants
are runs of `head-classification` on the same records in the same order of batches; an epoch's seconds are those that
`Trainer` logs, without the pass that fills the cache. The trained heads are compared first: after equally many epochs
they must be the same.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.report import Row, below, compared, report
from benchmarks.shapes import SHAPES, model_keys, write_parts
from benchmarks.variants import compose_config, data_keys, silence_libraries
from vlm.demo.scenes import write_scenes
from vlm.train.run import run

EPOCHS = {"reading anew": 1, "cached": 20}
"""Variant -> the number of epochs that a measurement is the mean of."""
POOLINGS = ("last", "attention")
"""Poolings that read one state of a record, and the states of all tokens."""


def train(folder: Path, name: str, epochs: int, cached: bool, pooling: str) -> tuple[float, float, Path]:
    """Run a variant; return seconds an epoch, seconds of everything else, and the run directory."""
    words = [
        "model=composed",
        *model_keys(folder / "parts"),
        *data_keys(folder / "data" / "labelled.json"),
        f"model.head.pooling={pooling}",
        f"dataset.cache_features={str(cached).lower()}",
        f"trainer.num_train_epochs={epochs}",
        f"trainer.output_dir={folder / name}",
        "trainer.eval_strategy=no",
        "trainer.report_to=none",
        "trainer.use_cpu=true",
        "trainer.dataloader_num_workers=0",
        "trainer.per_device_train_batch_size=8",
    ]
    config = compose_config("head-classification", words)
    start = time.perf_counter()
    run(config, name, [word.split("=")[0] for word in words])
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    training = next(line["train_runtime"] for line in lines if "train_runtime" in line)
    return training / epochs, seconds - training, folder / name


def heads(folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights of a run's heads."""
    weights = load_file(folder / "final" / "model.safetensors")
    return {name: value for name, value in weights.items() if "heads." in name}


def measure(folder: Path, pooling: str, repeats: int) -> list[Row]:
    """Measure both variants in turns, after a check that they train the same heads."""
    _, whole, first = train(folder, f"{pooling}-cached-check", 2, True, pooling)
    anew = heads(train(folder, f"{pooling}-anew-check", 2, False, pooling)[2])
    for name, value in heads(first).items():
        torch.testing.assert_close(value, anew[name], rtol=1e-4, atol=1e-5)
    epoch_seconds: dict[str, list[float]] = {name: [] for name in EPOCHS}
    other_seconds: list[float] = []
    for number in range(repeats):
        for name, epochs in EPOCHS.items():
            seconds, others, _ = train(folder, f"{pooling}-{name}-{number}", epochs, name == "cached", pooling)
            epoch_seconds[name].append(seconds)
            other_seconds += [others] if name == "cached" else []
    title = f"epochs/s, pooling={pooling}"
    speeds = {name: [1 / seconds for seconds in values] for name, values in epoch_seconds.items()}
    labels = ("cached", "reading anew")
    return [
        compared(title, speeds[labels[0]], speeds[labels[1]], labels, "epochs/s", 20.0),
        below(f"a whole run that finds its cache, pooling={pooling}", other_seconds, "without its epochs", "s", whole),
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("benchmarks.features", description=__doc__)
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "parts", SHAPES["smol"])
        write_scenes(folder / "data", num_train=args.records, num_val=1, num_heldout=1, num_labelled=args.records)
        report("features", [row for pooling in POOLINGS for row in measure(folder, pooling, args.repeats)])


if __name__ == "__main__":
    main()
