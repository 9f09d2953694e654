"""Utilisation of a large GPU in training: Vicuna-7B's and CLIP-L/14-336's shapes, both stages of LLaVA-1.5.

    python -m benchmarks.gpu --gpu [--stage pretrain|finetune] [--steps N] [--tokens N] [KEY=VALUE …]
    python -m benchmarks.gpu --tiny     the same on a CPU with a model of almost no size, as a check

Random weights, bfloat16 products, packed rows. The pretrain stage trains the connector on captions; the finetune stage
trains connector and language model on the lengths of LLaVA-665k. Utilisation is the model's counted operations a second
over the peak of the GPU's data sheet; operations that activation checkpointing repeats are not counted. The rate of a
large matrix product on this GPU is reported too. The finetune stage holds float32 weights, gradients and AdamW's states
of 6.7 billion parameters: about 125 GB. Further words are overrides of the run, such as trainer.optim=adafactor.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import counting
from benchmarks.lengths import Record, Source, draw_records, write_records
from benchmarks.report import Row, compared, report
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import release_memory, run_ours, silence_libraries, split_packed_batch
from vlm.train.monitor.peak_flops import Peak, get_peak_tflops, measure_tflops

CAPTION = Source("caption", 558, (1, 1), (8, 0.2), (14, 0.4))
"""Records of LLaVA's first stage: an image and a line of text. Its template drops the question."""


@dataclass(frozen=True)
class TrainingStage:
    """A measured stage.

    Attributes:
        run: the name of the run's configuration.
        target: the target of its utilisation.
        words: overrides of the configuration.
    """

    run: str
    target: float
    words: tuple[str, ...]


STAGES = {
    "pretrain": TrainingStage(
        "pretrain-llava", 0.55, ("dataset.template=plain", "trainer.activation_checkpointing=true")
    ),
    "finetune": TrainingStage("finetune-llava", 0.45, ("trainer.activation_checkpointing=true",)),
}


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        tokens: `trainer.max_tokens_per_batch`.
        steps: number of steps of each stage; the first two are not measured.
        bf16: whether matrix products run in bfloat16.
    """

    shape: str = "vicuna"
    tokens: int = 8192
    steps: int = 12
    bf16: bool = True


TINY = Size("tiny", 1024, 4, bf16=False)
"""The size for a check on a CPU."""


def draw_stage_records(stage: str, size: Size) -> list[Record]:
    """Return enough records for all steps of a stage."""
    per_step = size.tokens // (SHAPES[size.shape].tokens_per_image + 10) + 1
    number = (size.steps + 1) * per_step
    if stage == "pretrain":
        draw = random.Random(0)
        return [Record(CAPTION, ((8, draw.randint(5, 25)),)) for _ in range(number)]
    longest = size.tokens - SHAPES[size.shape].tokens_per_image - counting.NEWLINE
    return [record for record in draw_records(number) if record.tokens <= longest]


def measure_utilisation(
    stage: str, size: Size, peak: Peak, folder: Path, words: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Return model TFLOP/s and real tokens a second of every measured step of a stage."""
    shape = SHAPES[size.shape]
    path = write_records(folder / stage / "data", draw_stage_records(stage, size), shape.side)
    training_stage = STAGES[stage]
    run = run_ours(
        folder / "parts", path, folder / stage / "run", *training_stage.words, "trainer/deepspeed=none",
        f"trainer.max_tokens_per_batch={size.tokens}", "trainer.gradient_accumulation_steps=1",
        f"trainer.max_steps={size.steps}", f"trainer.bf16={str(size.bf16).lower()}",
        f"trainer.peak_tflops={peak.tflops}", *words, name=training_stage.run, keeps=True,
    )  # fmt: skip
    flops, _ = counting.count_operations(run.trainer.model, shape)
    rates, speeds = [], []
    for seconds, step in list(zip(run.seconds, run.batches, strict=False))[2:]:
        samples = [sample for batch in step for sample in split_packed_batch(batch, run.trainer.processor)]
        rates.append(counting.ours(flops, samples) / seconds / 1e12)
        speeds.append(counting.sample_stats(samples).tokens / seconds)
    release_memory(run)
    return rates, speeds


def main() -> None:
    """Measure and report."""
    parser = make_parser(__doc__, ("tokens", "steps"))
    parser.add_argument("--tiny", action="store_true", help="check the benchmark on a CPU")
    parser.add_argument("--stage", choices=STAGES, default=None, help="one of the two; both")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="further overrides of the runs")
    args = parser.parse_args()
    if args.gpu == args.tiny:
        parser.error("it takes one of --gpu, which measures a GPU, and --tiny, which checks the benchmark on a CPU")
    size = make_size(args, TINY, Size())
    silence_libraries()
    rows, notes = measure(size, [args.stage] if args.stage else list(STAGES), args.words)
    report("gpu-tiny" if args.tiny else "gpu", rows, notes)


def measure(size: Size, stages: Sequence[str], words: Sequence[str]) -> tuple[list[Row], dict[str, object]]:
    """Return the stages' utilisation, and the rates that it is compared with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if size.bf16 else torch.float32
    ceiling = measure_tflops(device, dtype)
    peak = get_peak_tflops(device, dtype, None)
    notes: dict[str, object] = {
        "peak, TFLOP/s": peak.tflops, "peak from": peak.source, "a large matrix product attains, TFLOP/s": ceiling,
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "parts", SHAPES[size.shape], dtype, str(device))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # frees the memory of the drawn weights
        for stage in stages:
            rates, speeds = measure_utilisation(stage, size, peak, folder, words)
            title = f"{stage}: model FLOPs utilisation"
            rows.append(compared(title, rates, [peak.tflops], ("model", "peak"), "TFLOP/s", STAGES[stage].target))
            middle = sorted(rates)[len(rates) // 2]
            notes[f"{stage}: share of what a large matrix product attains"] = middle / ceiling
            notes[f"{stage}: real tokens/s"] = sorted(speeds)[len(speeds) // 2]
            if torch.cuda.is_available():
                notes[f"{stage}: peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
    return rows, notes


if __name__ == "__main__":
    main()
