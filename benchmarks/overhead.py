"""Cost of a whole step of ours over a bare loop without Trainer, loader and logging, on prepared batches.

    python -m benchmarks.overhead [--gpu] [--steps N] [--repeats N]

The run is the one that `vlm` starts, with SmolLM2-135M's and ViT-B/16's shapes, packed batches and lengths of
LLaVA-665k. The bare loop then runs the same modules on the run's batches, with the same loss, clipping and optimiser.
The first step of each is not measured. About six minutes on two cores.
"""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.packed_steps import StepSize, prepare_run
from benchmarks.report import compared, report
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import LEARNING_RATE, Steps, release_memory, silence_libraries, synchronized_time
from vlm.assembly.packed_attention import use_packed_attention
from vlm.data.encoding.labels import IGNORE_INDEX

MATRIX_OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "conv", "gemm", "attention")
"""Endings of the names of operators that multiply matrices, after `aten::`."""


CPU = StepSize(tokens=4096, repeats=2)
"""The size for two cores; run and loop take turns."""
GPU = StepSize(tokens=16384, steps=30, repeats=3, bf16=True)
"""The size for one large GPU."""


class BareLoop:
    """Forward, backward, clipping and update over prepared batches.

    Args:
        model: the trained model of the run.
        batches: the model's inputs of each step.
        processor: normalises their pixels, once.
        bf16: whether matrix products run in bfloat16.
    """

    def __init__(self, model: Any, batches: Sequence[dict[str, Any]], processor: Any, *, bf16: bool):
        self.model, self.bf16 = model, bf16
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        device = next(model.parameters()).device
        self.batches = [_prepare_batch(batch, processor, device) for batch in batches]

    def step(self, number: int) -> None:
        """Run an optimiser step on one batch."""
        batch = self.batches[number]
        supervised = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        precision = torch.autocast(self.trained[0].device.type, torch.bfloat16, enabled=self.bf16)
        with use_packed_attention(self.model.config.get_text_config()):
            with precision:
                loss = self.model(**batch, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> list[float]:
        """Run all steps, and return their seconds."""
        stamps = [synchronized_time()]
        for number in range(len(self.batches)):
            self.step(number)
            stamps.append(synchronized_time())
            print(f"  bare loop: step {number + 1} took {stamps[-1] - stamps[-2]:.2f} s", flush=True)
        return [end - start for start, end in pairwise(stamps)]


def _prepare_batch(batch: dict[str, Any], processor: Any, device: torch.device) -> dict[str, Any]:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = processor.normalise(inputs["pixel_values"])
    return inputs


def product_share(loop: BareLoop) -> float:
    """Return the share of matrix products, convolutions and attention in a step's time; on a GPU, of kernels' time."""
    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        loop.step(min(1, len(loop.batches) - 1))
        synchronized_time()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::") or not on_gpu]
    times = {event.key: getattr(event, name) for event in events}
    print("\nOperators that a bare step spends most on:")
    for key, time in sorted(times.items(), key=lambda item: -item[1])[:12]:
        print(f"  {key:<60}{time / sum(times.values()):>7.1%}{'  matrix products' if _is_matrix_operator(key) else ''}")
    return sum(time for key, time in times.items() if _is_matrix_operator(key)) / sum(times.values())


def _is_matrix_operator(operator: str) -> bool:
    name = operator.removeprefix("aten::").removesuffix("_backward").removesuffix("_overrideable")
    return operator.startswith("aten::") and (name.endswith(MATRIX_OPERATORS) or "_attention" in name)


def measure(size: StepSize, folder: Path) -> tuple[list[float], list[float], float]:
    """Return seconds of steps of the run and of the bare loop, in turns, and the share of matrix products."""
    train = prepare_run(size, folder)
    whole: list[float] = []
    bare: list[float] = []
    share = 0.0
    for turn in range(size.repeats):
        run = train(f"ours-{turn}", keeps=True)
        whole += run.seconds[1:]
        loop = _make_bare_loop(run, bf16=size.bf16)
        bare += loop.seconds()[1:]
        if turn == size.repeats - 1:
            share = product_share(loop)
        del loop
        release_memory(run)
    return whole, bare, share


def _make_bare_loop(run: Steps, *, bf16: bool) -> BareLoop:
    """Return a bare loop over a run's model; the run's optimiser is freed, as memory may not hold both."""
    trainer = run.trainer
    model, processor = trainer.model, trainer.processor
    for holder in (trainer, trainer.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    trainer.accelerator.free_memory()
    return BareLoop(model, [batch for step in run.batches for batch in step], processor, bf16=bf16)


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("tokens", "steps", "repeats")).parse_args()
    size = make_size(args, CPU, GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        whole, bare, share = measure(size, Path(name))
    row = compared("a step of the run over a step of a bare loop", whole, bare, ("run", "bare"), "s", 1.10, "lower")
    notes = {"matrix products and attention, share of a bare step": share}
    report("overhead-gpu" if args.gpu else "overhead", [row], notes)


if __name__ == "__main__":
    main()
