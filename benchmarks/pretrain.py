"""Further epochs of pretraining: with cached features of images, against running the frozen encoder each time.

    python -m benchmarks.pretrain [--gpu] [--shape NAME] [--epochs N]

The connector trains; encoder and language model have the shapes of well-known models, and random weights. Both variants
are runs of `pretrain-smol` on the same records in the same packs; the first epoch, before which the cache is filled, is
not measured. Counted operations predict that only the encoder's share is saved: the target is nine tenths of that. The
losses of both variants are compared first: they must be the same.
"""

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.counting import count_operations
from benchmarks.report import Row, compared, report
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.sizes import make_parser, require_gpu
from benchmarks.variants import Steps, run_ours, silence_libraries
from vlm.data.batching.stats import compute_batch_stats
from vlm.demo.scenes import write_scenes

EPOCHS = 4
"""Number of epochs of each variant; the first is not measured."""
TARGET_SHARE = 0.9
"""The target, as a share of the predicted ratio."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement of a shape.

    Attributes:
        records: number of captions with an image each.
        batch: mean number of samples in a batch.
        words: further overrides.
    """

    records: int
    batch: int
    words: tuple[str, ...] = ()


CPU = {"smol": Size(16, 4), "smol+clip-l": Size(6, 3)}
GPU = {"smol+clip-l": Size(1024, 64, ("trainer.bf16=true",)), "vicuna": Size(512, 32, ("trainer.bf16=true",))}
NAMES = {
    "smol": "ViT-B/16 and SmolLM2-135M",
    "smol+clip-l": "CLIP-L/14-336 and SmolLM2-135M",
    "vicuna": "CLIP-L/14-336 and Vicuna-7B",
    "tiny": "a model of almost no size",
}
"""Shape -> the names of its models."""


def train(folder: Path, shape: str, size: Size, epochs: int, *, keeps: bool) -> Steps:
    """Run a variant, with cached features or without."""
    steps = run_ours(
        folder / "parts", folder / "data" / "pretrain.json", folder / ("kept" if keeps else "anew"),
        f"dataset.cache_features={str(keeps).lower()}", f"trainer.num_train_epochs={epochs}",
        f"trainer.per_device_train_batch_size={size.batch}", *size.words, name="pretrain-smol",
    )  # fmt: skip
    gc.collect()
    return steps


def epoch_rates(steps: Steps, epochs: int, records: int) -> list[float]:
    """Return samples a second of each epoch but the first."""
    number = len(steps.seconds) // epochs
    seconds = [sum(steps.seconds[start : start + number]) for start in range(0, number * epochs, number)]
    return [records / epoch for epoch in seconds[1:]]


def predict_ratio_without_encoder(steps: Steps, shape: str, epochs: int) -> float:
    """Return the operations of an epoch over those of an epoch without the encoder."""
    data = steps.trainer.train_dataset
    stats = compute_batch_stats([data[index] for index in range(len(data))], 0)
    flops, _ = count_operations(steps.trainer.model, SHAPES[shape])
    batches = len(steps.seconds) // epochs
    return flops.total(stats, stats.images, stats.images, batches) / flops.total(stats, 0, stats.images, batches)


def measure(shape: str, size: Size, epochs: int) -> tuple[Row, float]:
    """Measure both variants of a shape; return the row and the predicted ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        write_parts(folder / "parts", SHAPES[shape], dtype, "cuda" if torch.cuda.is_available() else "cpu")
        write_scenes(folder / "data", num_train=size.records, num_val=1, num_heldout=1, num_labelled=1)
        anew = train(folder, shape, size, epochs, keeps=False)
        expected = predict_ratio_without_encoder(anew, shape, epochs)
        anew.trainer = None
        kept = train(folder, shape, size, epochs, keeps=True)
        kept.trainer = None
    tolerance = 2e-2 if torch.cuda.is_available() else 1e-3
    torch.testing.assert_close(torch.tensor(kept.losses), torch.tensor(anew.losses), rtol=tolerance, atol=tolerance)
    labels = ("kept features", "images seen anew")
    speeds = [epoch_rates(steps, epochs, size.records) for steps in (kept, anew)]
    title = f"further epochs, {NAMES[shape]}"
    return compared(title, speeds[0], speeds[1], labels, "samples/s", TARGET_SHARE * expected), expected


def main() -> None:
    """Measure and report."""
    parser = make_parser(__doc__, ("epochs",))
    parser.set_defaults(epochs=EPOCHS)
    args = parser.parse_args()
    require_gpu(args)
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}: at least 2 are needed, since the first is not measured")
    sizes = GPU if args.gpu else CPU
    if args.shape not in (None, *sizes):
        parser.error(f"--shape {args.shape}: measured are {', '.join(sizes)}")
    silence_libraries()
    results = {shape: measure(shape, sizes[shape], args.epochs) for shape in ([args.shape] if args.shape else sizes)}
    notes = {
        "predicted by counting operations": {NAMES[shape]: round(ratio, 3) for shape, (_, ratio) in results.items()}
    }
    report("pretrain-gpu" if args.gpu else "pretrain", [row for row, _ in results.values()], notes)


if __name__ == "__main__":
    main()
