"""A finetune step, encoder frozen: ours against transformers' LLaVA and Trainer, padded, and grouped by length.

    python -m benchmarks.finetune [--gpu] [--steps N] [--repeats N]

SmolLM2-135M's and ViT-B/16's shapes with random weights, lengths of LLaVA-665k (`benchmarks.lengths`), one set of
samples for each optimiser step in all variants: that of our run's packs. A padded micro-batch takes its samples as they
were drawn, a grouped one those of like length among the step's. First weights, precision, attention kernel (sdpa),
threads, optimiser and learning rate are the same, so the first gradients and the losses of every step have to agree:
that is checked, and drawn. The first step of each variant is left out of its speed.

On two CPU cores in float32, a padded micro-batch has at most six samples, nearly five on average. Larger ones would pad
more, and smaller ones less: where a sample has 2,000 tokens of text and an image, 24 GB of memory hold three (a padded
position takes about 2.6 MB); the longest of the default seed has 1,609. Few steps fit into the time, and some have
short samples only: the default seed is one of which counting predicts about what it predicts over the whole mixture at
as many samples, and that is told beside. About twelve minutes, and 20 GB.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import counting
from benchmarks.lengths import Record, draw_records, write_records
from benchmarks.report import RESULTS, Row, compared, report
from benchmarks.shapes import SHAPES, Shape, compose_model, make_llava, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import (
    SEED,
    Sample,
    Steps,
    count_padded_positions,
    make_micro_batches,
    release_memory,
    run_ours,
    silence_libraries,
    split_packed_batch,
    train_padded,
)
from vlm.data.batching.packing import pack_lengths
from vlm.train.monitor.flops import StepFlops


@dataclass(frozen=True)
class Tolerances:
    """How far variants may be apart, as a share of what is compared.

    Attributes:
        first: loss and gradient norm of the first step, before any update.
        later: losses of later steps: Adam's first updates are about as large where a gradient is rounding alone.
    """

    first: float
    later: float


TOLERANCES = {"float32": Tolerances(1e-4, 5e-3), "bfloat16": Tolerances(2e-2, 5e-2)}
"""By what matrix products run in."""


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        shape: of the model, a name of `SHAPES`.
        tokens: `trainer.max_tokens_per_batch`.
        accumulation: packs of an optimiser step.
        steps: optimiser steps; the first is not measured.
        samples: of a padded micro-batch at most.
        repeats: how often each variant trains.
        bf16: whether matrix products run in bfloat16.
        seed: of the records.
    """

    shape: str = "smol"
    tokens: int = 4096
    accumulation: int = 2
    steps: int = 3
    samples: int = 6
    repeats: int = 1
    bf16: bool = False
    seed: int = 35


GPU = Size(tokens=8192, accumulation=4, steps=10, samples=20, repeats=3, bf16=True)
"""For one large GPU."""


@dataclass
class VariantMeasurements:
    """What one variant did.

    Attributes:
        speeds: real tokens a second, of every step but the first of every repetition.
        rates: real tokens a second over all these steps, of every repetition.
        losses: of every step, of the first repetition.
        norm: of the first step's gradient.
        flops: operations of every step but the first, as they are counted.
    """

    speeds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0
    flops: list[float] = field(default_factory=list)

    def add(self, done: Steps, tokens: Sequence[int]) -> None:
        """One repetition."""
        self.speeds += [number / time for number, time in zip(tokens[1:], done.seconds[1:], strict=True)]
        self.rates.append(sum(tokens[1:]) / sum(done.seconds[1:]))
        self.losses, self.norm = self.losses or done.losses, self.norm or done.norms[0]


@dataclass
class Comparison:
    """All variants on the same samples.

    Attributes:
        tokens: real tokens of every step.
        samples: of a padded micro-batch, on average.
        variants: by their names.
        flops: of our model, by what they depend on.
        encoder: of all layers of the encoder, an image.
    """

    tokens: list[int]
    samples: float
    variants: dict[str, VariantMeasurements]
    flops: StepFlops
    encoder: float


def select_records(records: Sequence[Record], shape: Shape, capacity: int, packs: int) -> list[Record]:
    """The first records, as many as fill so many packs and do not need another."""
    lengths = [len(sample["input_ids"]) for sample in counting.make_blank_samples(records, shape)]
    number = int(np.searchsorted(np.cumsum(lengths), packs * capacity, side="right"))
    while len(pack_lengths(lengths[:number], capacity, SEED)) > packs:
        number -= 1
    return list(records[:number])


def compare_variants(size: Size, folder: Path) -> Comparison:
    """Train every variant in turns, ours first: it says which samples a step has."""
    shape = SHAPES[size.shape]
    write_parts(folder / "parts", shape)
    packs = size.steps * size.accumulation
    records = select_records(draw_records(packs * size.tokens // 50, size.seed), shape, size.tokens, packs)
    path = write_records(folder / "data", records, shape.side)
    words = [
        f"trainer.max_tokens_per_batch={size.tokens}",
        f"trainer.gradient_accumulation_steps={size.accumulation}",
        f"trainer.bf16={str(size.bf16).lower()}",
    ]
    found: Comparison | None = None
    for turn in range(size.repeats):
        run = run_ours(folder / "parts", path, folder / f"ours-{turn}", *words, keeps=True)
        processor = run.trainer.processor
        steps = [[sample for batch in step for sample in split_packed_batch(batch, processor)] for step in run.batches]
        if found is None:
            flops, encoder = counting.count_operations(run.trainer.model, shape)
            tokens = [counting.facts(step).tokens for step in steps]
            variants = {name: VariantMeasurements() for name in ("ours", "padded", "grouped")}
            found = Comparison(
                tokens, len(records) / len(steps) / count_micro_batches(steps, size), variants, flops, encoder
            )
            found.variants["ours"].flops = [counting.ours(flops, step, size.accumulation) for step in steps[1:]]
            print(f"{len(records)} samples, {sum(tokens):,} tokens in {packs} packs", end=", ")
            print(f"{sum(tokens) / (packs * size.tokens):.1%} of their positions", flush=True)
        release_memory(run)
        found.variants["ours"].add(run, found.tokens)
        for name in ("padded", "grouped"):
            _train_transformers(found, name, steps, size, folder, processor)
    assert found is not None
    return found


def count_micro_batches(steps: Sequence[Sequence[Sample]], size: Size) -> int:
    """In how many a step is padded, so that none has more samples than it may."""
    return math.ceil(max(map(len, steps)) / size.samples)


def _train_transformers(
    found: Comparison, name: str, steps: Sequence[Sequence[Sample]], size: Size, folder: Path, processor: object
) -> None:
    """One repetition of transformers' own."""
    number = count_micro_batches(steps, size)
    laid = [make_micro_batches(step, number, grouped=name == "grouped") for step in steps]
    measured = found.variants[name]
    if not measured.flops:
        positions = [count_padded_positions(one) for step in laid for one in step]
        measured.flops = [counting.padded(found.flops, found.encoder, step) for step in laid[1:]]
        print(f"{name}: {number} micro-batches a step of {found.samples:.2f} samples on average and", end=" ")
        print(
            f"{max(len(one) for step in laid for one in step)} at most, {max(positions):,} positions at most", end=", "
        )
        print(f"{sum(found.tokens) / sum(positions):.1%} real tokens", flush=True)
    ours, _ = compose_model(folder / "parts", SEED)
    model = make_llava(ours, folder / "parts")
    del ours
    if size.bf16:
        model.model.vision_tower.to(torch.bfloat16)  # as a run of ours casts what is frozen
    done = train_padded(model, processor.tokenizer, laid, folder / name, bf16=size.bf16)  # pyright: ignore[reportAttributeAccessIssue]
    measured.add(done, found.tokens)


def check_agreement(variants: dict[str, VariantMeasurements], near: Tolerances) -> dict[str, float]:
    """How far the variants' losses of a step and the norms of their first gradients are apart, as a share of them.

    Raises:
        SystemExit: the variants do not do the same work.
    """
    steps = list(zip(*(one.losses for one in variants.values()), strict=True))
    apart = [_relative_range(losses) for losses in steps]
    norms = _relative_range([one.norm for one in variants.values()])
    if max(apart[0], norms) > near.first or max(apart) > near.later:
        shown = {name: (one.losses, one.norm) for name, one in variants.items()}
        raise SystemExit(f"the variants do not compute the same; losses and the first gradient's norm: {shown}")
    return {
        "norms of the first gradients are apart by": norms,
        "losses of the first step are apart by": apart[0],
        "losses of a step are apart at most by": max(apart),
    }


def _relative_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / min(values)


def make_rows(found: Comparison) -> list[Row]:
    """The claims. A rate is that of all steps but the first; its spread that of single steps, whose samples differ."""
    ours, rows = found.variants["ours"], []
    for name, target, title in (
        ("padded", 2.0, "real tokens/s over padded batches"),
        ("grouped", 1.25, "real tokens/s over batches grouped by length"),
    ):
        both = {"ours": ours, name: found.variants[name]}
        medians = {label: statistics.median(one.rates) for label, one in both.items()}
        spread = {label: (min(one.speeds), max(one.speeds)) for label, one in both.items()}
        measured = medians["ours"] / medians[name]
        predicted = sum(found.variants[name].flops) / sum(ours.flops)
        rows.append(Row(title, measured, target, "higher", medians, spread, "tokens/s"))
        rows.append(
            compared(f"{name}: measured over counted", [measured], [predicted], ("measured", "counted"), "×", 0.9)
        )
    return rows


def make_notes(found: Comparison, size: Size) -> dict[str, Any]:
    """Each step's ratio, measured and counted, and what counting predicts over the whole mixture at as many samples."""
    ours, notes = found.variants["ours"], {}
    for name in ("padded", "grouped"):
        theirs = found.variants[name]
        measured = [mine / other for mine, other in zip(ours.speeds, theirs.speeds, strict=True)]
        count_operations = [other / mine for mine, other in zip(ours.flops, theirs.flops, strict=True)] * size.repeats
        notes[f"{name}, step by step, measured and counted"] = list(zip(measured, count_operations, strict=True))
    samples = counting.make_blank_samples(draw_records(4000, 1), SHAPES[size.shape])
    for number in (math.floor(found.samples), math.ceil(found.samples)):
        notes[f"counted over the whole mixture, padded to {number} samples"] = counting.predict_ratio(
            found.flops, found.encoder, samples, number
        )
    return {"samples of a padded micro-batch, on average": found.samples, **notes, "size": asdict(size)}


def draw_losses(variants: dict[str, VariantMeasurements], path: Path) -> None:
    """The loss of every step, of each variant."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, one), style in zip(variants.items(), ("-", "--", ":"), strict=True):
        axes.plot(range(1, len(one.losses) + 1), one.losses, style, marker="o", label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, mean over supervised tokens")
    axes.legend()
    figure.savefig(path, dpi=110)


def print_predictions(found: Comparison, size: Size) -> None:
    """What counting says of other sizes, and of what would bring more."""
    shape = SHAPES[size.shape]
    samples = counting.make_blank_samples(draw_records(4000, 1), shape)
    print("\nOf the operations of our step: " + ", ".join(
        f"{name} {share:.1%}" for name, share in counting.operation_shares(found.flops, samples).items()
    ))  # fmt: skip
    print("What counting predicts over the whole mixture, padded over ours, by the samples of a micro-batch:")
    cached = replace(found.flops, encoded=0.0)
    for number in (3, 4, 5, 6, 8, 10, 16, 32):
        plain = counting.predict_ratio(found.flops, found.encoder, samples, number)
        few, many = (
            counting.predict_ratio(found.flops, found.encoder, samples, number, micro_batches=over) for over in (4, 50)
        )
        kept = counting.predict_ratio(cached, found.encoder, samples, number)
        print(f"{number:>4}: padded {plain:.2f}, grouped over 4 micro-batches {few:.2f}, over 50 {many:.2f}", end=", ")
        print(f"padded against ours with image features out of the cache {kept:.2f}")


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("tokens", "accumulation", "steps", "samples", "repeats", "seed")).parse_args()
    size = make_size(args, Size(), GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        found = compare_variants(size, Path(folder))
    for name, one in found.variants.items():
        losses = " ".join(f"{loss:.5f}" for loss in one.losses)
        print(f"losses, {name}: {losses}; norm of the first gradient {one.norm:.5f}")
    apart = check_agreement(found.variants, TOLERANCES["bfloat16" if size.bf16 else "float32"])
    notes = {**apart, **make_notes(found, size)}
    report("finetune-gpu" if args.gpu else "finetune", make_rows(found), notes)
    draw_losses(found.variants, RESULTS / ("finetune-gpu_loss.png" if args.gpu else "finetune_loss.png"))
    print_predictions(found, size)


if __name__ == "__main__":
    main()
