"""A finetune step, encoder frozen: ours against transformers' LLaVA and Trainer, padded, and grouped by length.

    python -m benchmarks.finetune [--samples 5|8] [--gpu] [--steps N] [--repeats N]

SmolLM2-135M's and ViT-B/16's shapes with random weights, and lengths of LLaVA-665k (`benchmarks.lengths`). Every
variant has the same samples in each optimiser step: our run packs its steps, and the padded variant has the
micro-batches that our run would have without packing. A grouped micro-batch takes samples of similar length of the
step. Initial weights, precision, attention kernel (sdpa), threads, optimiser and learning rate are the same, so the
first gradients and the losses of every step have to agree: that is checked, and plotted. The first step of each
variant is not measured.

Larger micro-batches pad more, and two CPU cores with 24 GB of memory allow few samples in float32: a padded position
takes about 2.6 MB, so three samples fit where one of them has 2,000 tokens of text and an image. With five samples,
the longest of the default seed has 1,498 tokens. With eight, every variant recomputes activations in the backward
pass (activation checkpointing), or padded micro-batches would not fit: with the seed of that size they have 11,800
positions at most, of which the logits alone take 2.3 GB, several times over. Few steps fit into the time, and some
have only short samples: the seeds are ones for which counting predicts about the same ratio as over the whole
mixture, which is printed too. About twelve minutes, and 20 GB.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import counting
from benchmarks.lengths import draw_records, write_records
from benchmarks.report import RESULTS, Row, compared, report
from benchmarks.shapes import SHAPES, compose_model, make_llava, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import (
    SEED,
    Sample,
    Steps,
    count_padded_positions,
    group_by_length,
    read_micro_batches,
    release_memory,
    run_ours,
    silence_libraries,
    train_padded,
)
from vlm.train.monitor.flops import StepFlops


@dataclass(frozen=True)
class Tolerances:
    """Largest relative differences of variants.

    Attributes:
        first: of loss and gradient norm of the first step, before any update.
        later: of losses of later steps: Adam's first updates are about as large where a gradient is only rounding.
    """

    first: float
    later: float


TOLERANCES = {"float32": Tolerances(1e-4, 5e-3), "bfloat16": Tolerances(2e-2, 5e-2)}
"""Precision of matrix products -> tolerances."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        samples: number of samples in a micro-batch, `trainer.per_device_train_batch_size`.
        accumulation: number of micro-batches in an optimiser step.
        steps: number of optimiser steps; the first is not measured.
        repeats: how often each variant trains.
        bf16: whether matrix products run in bfloat16.
        checkpointing: whether activations are recomputed in the backward pass, in every variant.
        seed: seeds the records.
        target: the least ratio to padded batches.
    """

    shape: str = "smol"
    samples: int = 5
    accumulation: int = 6
    steps: int = 3
    repeats: int = 1
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 184
    target: float = 2.0


EIGHT_SAMPLES = Size(samples=8, accumulation=2, steps=4, checkpointing=True, seed=131, target=2.5)
"""The size with eight samples in a micro-batch."""

GPU = Size(samples=16, accumulation=4, steps=10, repeats=3, bf16=True)
"""The size for one large GPU."""


@dataclass
class VariantMeasurements:
    """Measurements of one variant.

    Attributes:
        speeds: real tokens a second of every measured step of every repetition.
        rates: real tokens a second over all measured steps, for every repetition.
        losses: loss of every step of the first repetition.
        norm: norm of the first step's gradient.
        flops: counted operations of every measured step.
    """

    speeds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0
    flops: list[float] = field(default_factory=list)

    def add(self, run: Steps, tokens: Sequence[int]) -> None:
        """Add a repetition."""
        self.speeds += [number / time for number, time in zip(tokens[1:], run.seconds[1:], strict=True)]
        self.rates.append(sum(tokens[1:]) / sum(run.seconds[1:]))
        self.losses, self.norm = self.losses or run.losses, self.norm or run.norms[0]


@dataclass
class Comparison:
    """All variants on the same samples.

    Attributes:
        tokens: number of real tokens of every step.
        variants: name -> measurements.
        flops: operations of our model.
        encoder: operations of all layers of the encoder for an image.
    """

    tokens: list[int]
    variants: dict[str, VariantMeasurements]
    flops: StepFlops
    encoder: float


def compare_variants(size: Size, folder: Path) -> Comparison:
    """Train every variant in turns, ours first: its sampler determines the samples of a step."""
    shape = SHAPES[size.shape]
    write_parts(folder / "parts", shape)
    records = draw_records(size.steps * size.accumulation * size.samples, size.seed)
    path = write_records(folder / "data", records, shape.side)
    words = [
        "trainer.packing_strategy=step",
        f"trainer.per_device_train_batch_size={size.samples}",
        f"trainer.gradient_accumulation_steps={size.accumulation}",
        f"trainer.activation_checkpointing={str(size.checkpointing).lower()}",
        f"trainer.bf16={str(size.bf16).lower()}",
    ]
    result: Comparison | None = None
    for turn in range(size.repeats):
        run = run_ours(folder / "parts", path, folder / f"ours-{turn}", *words)
        processor = run.trainer.processor
        steps = read_micro_batches(run)
        if result is None:
            flops, encoder = counting.count_operations(run.trainer.model, shape)
            samples = [[sample for batch in step for sample in batch] for step in steps]
            tokens = [counting.sample_stats(step).tokens for step in samples]
            variants = {name: VariantMeasurements() for name in ("ours", "padded", "grouped")}
            result = Comparison(tokens, variants, flops, encoder)
            result.variants["ours"].flops = [counting.ours(flops, step, size.accumulation) for step in samples[1:]]
            print(f"{len(records)} samples, {sum(tokens):,} tokens in {len(steps)} steps", flush=True)
        release_memory(run)
        result.variants["ours"].add(run, result.tokens)
        for name in ("padded", "grouped"):
            _train_transformers(result, name, steps, size, folder, processor)
    assert result is not None
    return result


def _train_transformers(
    result: Comparison, name: str, steps: list[list[list[Sample]]], size: Size, folder: Path, processor: object
) -> None:
    """Run one repetition of a variant of transformers."""
    batches = [group_by_length(step) for step in steps] if name == "grouped" else steps
    measured = result.variants[name]
    if not measured.flops:
        positions = [count_padded_positions(batch) for step in batches for batch in step]
        measured.flops = [counting.padded(result.flops, result.encoder, step) for step in batches[1:]]
        print(f"{name}: micro-batches of {size.samples} samples, {max(positions):,} positions at most", end=", ")
        print(f"{sum(result.tokens) / sum(positions):.1%} real tokens", flush=True)
    ours, _ = compose_model(folder / "parts", SEED)
    model = make_llava(ours, folder / "parts")
    del ours
    if size.bf16:
        model.model.vision_tower.to(torch.bfloat16)  # as our runs cast frozen parts
    settings = {"bf16": size.bf16, "activation_checkpointing": size.checkpointing}
    run = train_padded(model, processor.tokenizer, batches, folder / name, **settings)  # pyright: ignore[reportAttributeAccessIssue]
    measured.add(run, result.tokens)


def check_agreement(variants: dict[str, VariantMeasurements], tolerances: Tolerances) -> dict[str, float]:
    """Return the relative differences of the variants' losses, and of the norms of their first gradients.

    Raises:
        SystemExit: the variants do not do the same work.
    """
    steps = list(zip(*(variant.losses for variant in variants.values()), strict=True))
    differences = [_relative_range(losses) for losses in steps]
    norms = _relative_range([variant.norm for variant in variants.values()])
    if max(differences[0], norms) > tolerances.first or max(differences) > tolerances.later:
        shown = {name: (variant.losses, variant.norm) for name, variant in variants.items()}
        raise SystemExit(f"the variants do not compute the same; losses and the first gradient's norm: {shown}")
    return {
        "norms of the first gradients are apart by": norms,
        "losses of the first step are apart by": differences[0],
        "losses of a step are apart at most by": max(differences),
    }


def _relative_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / min(values)


def make_rows(result: Comparison, size: Size) -> list[Row]:
    """Return the claims: rates over all measured steps; spreads are those of single steps, whose samples differ."""
    ours, rows = result.variants["ours"], []
    for name, target, title in (
        ("padded", size.target, f"real tokens/s over padded batches of {size.samples}"),
        ("grouped", 1.25, f"real tokens/s over batches of {size.samples} grouped by length"),
    ):
        both = {"ours": ours, name: result.variants[name]}
        medians = {label: statistics.median(variant.rates) for label, variant in both.items()}
        spread = {label: (min(variant.speeds), max(variant.speeds)) for label, variant in both.items()}
        measured = medians["ours"] / medians[name]
        predicted = sum(result.variants[name].flops) / sum(ours.flops)
        rows.append(Row(title, measured, target, "higher", medians, spread, "tokens/s"))
        rows.append(
            compared(f"{name}: measured over counted", [measured], [predicted], ("measured", "counted"), "×", 0.9)
        )
    return rows


def make_notes(result: Comparison, size: Size) -> dict[str, Any]:
    """Return each step's ratio, measured and counted, and the predicted ratio over the whole mixture."""
    ours, notes = result.variants["ours"], {}
    for name in ("padded", "grouped"):
        theirs = result.variants[name]
        measured = [mine / other for mine, other in zip(ours.speeds, theirs.speeds, strict=True)]
        counted = [other / mine for mine, other in zip(ours.flops, theirs.flops, strict=True)] * size.repeats
        notes[f"{name}, step by step, measured and counted"] = list(zip(measured, counted, strict=True))
    samples = counting.make_blank_samples(draw_records(4000, 1), SHAPES[size.shape])
    notes["counted over the whole mixture"] = counting.predict_ratio(
        result.flops, result.encoder, samples, size.samples
    )
    return {**notes, "size": asdict(size)}


def draw_losses(variants: dict[str, VariantMeasurements], path: Path) -> None:
    """Plot the loss of every step of each variant."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, variant), style in zip(variants.items(), ("-", "--", ":"), strict=True):
        axes.plot(range(1, len(variant.losses) + 1), variant.losses, style, marker="o", label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, mean over supervised tokens")
    axes.legend()
    figure.savefig(path, dpi=110)


def print_predictions(result: Comparison, size: Size) -> None:
    """Print predicted ratios for other sizes, and with cached image features."""
    shape = SHAPES[size.shape]
    samples = counting.make_blank_samples(draw_records(4000, 1), shape)
    print("\nOf the operations of our step: " + ", ".join(
        f"{name} {share:.1%}" for name, share in counting.operation_shares(result.flops, samples).items()
    ))  # fmt: skip
    print("What counting predicts over the whole mixture, padded over ours, by the samples of a micro-batch:")
    cached = replace(result.flops, encoded=0.0)
    for number in (3, 4, 5, 6, 8, 10, 16, 32):
        plain = counting.predict_ratio(result.flops, result.encoder, samples, number)
        few, many = (
            counting.predict_ratio(result.flops, result.encoder, samples, number, micro_batches=count)
            for count in (4, 50)
        )
        with_cache = counting.predict_ratio(cached, result.encoder, samples, number)
        print(f"{number:>4}: padded {plain:.2f}, grouped over 4 micro-batches {few:.2f}, over 50 {many:.2f}", end=", ")
        print(f"padded against ours with image features out of the cache {with_cache:.2f}")


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("samples", "accumulation", "steps", "repeats", "seed")).parse_args()
    eight = args.samples == EIGHT_SAMPLES.samples and not args.gpu
    size = make_size(args, EIGHT_SAMPLES if eight else Size(), GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        result = compare_variants(size, Path(folder))
    for name, variant in result.variants.items():
        losses = " ".join(f"{loss:.5f}" for loss in variant.losses)
        print(f"losses, {name}: {losses}; norm of the first gradient {variant.norm:.5f}")
    differences = check_agreement(result.variants, TOLERANCES["bfloat16" if size.bf16 else "float32"])
    notes = {**differences, **make_notes(result, size)}
    name = "finetune-gpu" if args.gpu else "finetune-8" if eight else "finetune"
    report(name, make_rows(result, size), notes)
    draw_losses(result.variants, RESULTS / f"{name}_loss.png")
    print_predictions(result, size)


if __name__ == "__main__":
    main()
