"""A few steps of a run, made and thrown away: their memory, their time, and their first batch.

The probe trains a model of its own in a folder that is deleted. It saves, evaluates and logs nothing, and the run
itself loads its weights anew and seeds its random numbers after them, so that nothing of the probe is left in it.
"""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vlm.assembly.resolve import load_weights
from vlm.config.schema import RunConfig
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.batching.stats import BatchStats, ModelInputs, num_images
from vlm.data.batching.step_layout import get_rows
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor
from vlm.train.arguments import training_arguments
from vlm.train.batches import NumItems
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.guards.memory import find_held, measure_held
from vlm.train.make_trainer import make_trainer
from vlm.train.model import compute_dtype, prepare
from vlm.train.monitor.flops import StepFlops
from vlm.train.monitor.peak_flops import synchronize
from vlm.train.objectives.base import Inputs, Objective, PreparedRun, RunData
from vlm.train.preflight.answering import time_answer, time_drawing
from vlm.train.preflight.fake_step import BatchShape
from vlm.train.preflight.live_bytes import LiveBytes
from vlm.train.random_state import seed_everything
from vlm.train.trainer import VLMTrainer

NUM_COUNTED, NUM_SETTLING = 2, 1
"""Steps whose memory is counted, and a step after which caches are warm again."""
NUM_UNTIMED = NUM_COUNTED + NUM_SETTLING
MIN_TIMED, MAX_TIMED = 4, 12
"""Steps that are timed: the fewest, and the most."""
NUM_FORWARD = 2
"""Forward passes of a batch, of which the quicker one is taken: the first finds no memory that fits."""
TIMED_SECONDS = 10.0
"""Where steps are slow, no more are timed than take this long, once there are `MIN_TIMED`."""

QUIET = {
    "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "report_to": "none", "num_samples": 0,
    "before_after": False, "keep_best": None, "profile": False, "logging_strategy": "no", "disable_tqdm": True,
    "async_save": False, "stuck_after": None, "spike_action": None, "dataloader_num_workers": 0, "eval_metrics": [],
    "resume_from_checkpoint": "never", "preflight": False,
}  # fmt: skip
"""What a probe sets in `trainer`: it leaves nothing behind, and reads its batches itself."""


@dataclass
class Probe:
    """What a few steps showed.

    Attributes:
        peak: bytes that were alive at most in the second step, weights and states included.
        shapes: the batches of that step.
        seconds: of each timed step, reading its data included.
        cpu_seconds: of this process's processor time in each timed step, all threads together.
        timed_shapes: the batches of each timed step.
        forward_seconds: of a forward pass of the last micro-batch, without gradients.
        answer_seconds: of an answer of the model to a sample.
        drawing_seconds: of the plots that are drawn anew at each evaluation.
        loading_seconds: from the start of the preflight to the first step; 0: not known.
        held: bytes that this rank held behind the second step: parameters, gradients, states of the optimiser.
        stats: of each timed step: what its batches hold, images encoded and connected, and their number.
        flops: of the model; None: they cannot be counted.
        max_steps: number of steps of the whole run.
        batch_samples: number of samples of a step, on all ranks.
    """

    peak: int = 0
    shapes: list[BatchShape] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    timed_shapes: list[list[BatchShape]] = field(default_factory=list)
    forward_seconds: float = 0.0
    answer_seconds: float = 0.0
    drawing_seconds: float = 0.0
    loading_seconds: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    stats: list[tuple[BatchStats, int, int, int]] = field(default_factory=list)
    flops: StepFlops | None = None
    max_steps: int = 0
    batch_samples: int = 0


def quiet_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration of a probe of a run."""
    probing = copy.deepcopy(config)
    for name, value in {**QUIET, "output_dir": str(folder), "max_steps": NUM_UNTIMED + MAX_TIMED}.items():
        setattr(probing.trainer, name, value)
    return probing


class ProbeCallback(TrainerCallback):
    """Counts the memory of the first steps, and times those behind them."""

    def __init__(self, probe: Probe, trainer: VLMTrainer, loading_began: float | None = None):
        self.probe, self.trainer, self.loading_began = probe, trainer, loading_began
        self.live: LiveBytes | None = None
        self.begun = self.cpu_begun = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Begin to count with the first step, and anew with the second, in which the optimiser has its states."""
        self.probe.shapes.clear()
        device = self.trainer.args.device
        if state.global_step == 0 and self.loading_began is not None:
            self.probe.loading_seconds = time.perf_counter() - self.loading_began
        if state.global_step == 0 and device.type == "cpu" and not args.torch_compile:
            self.live = LiveBytes(tensor for held in find_held(self.trainer).values() for tensor in held)
            self.live.now = self.live.peak = sum(measure_held(self.trainer).values())
            self.live.__enter__()
        elif self.live is not None:
            self.live.peak = self.live.now
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """End counting behind the second step; time the steps behind it."""
        device = self.trainer.args.device
        synchronize(device)
        now = time.perf_counter()
        if state.global_step == NUM_COUNTED:
            self.probe.peak = self._end_counting(device)
            self.probe.held = measure_held(self.trainer)
            self.counted_shapes = list(self.probe.shapes)
        elif state.global_step > NUM_UNTIMED:
            self.probe.seconds.append(now - self.begun)
            self.probe.cpu_seconds.append(time.process_time() - self.cpu_begun)
            self.probe.timed_shapes.append(list(self.probe.shapes))
            if broadcast_from_rank0(self._is_enough()):
                control.should_training_stop = True
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()

    def _is_enough(self) -> bool:
        """Return whether enough steps have been timed."""
        return len(self.probe.seconds) >= MIN_TIMED and sum(self.probe.seconds) >= TIMED_SECONDS

    def _end_counting(self, device: torch.device) -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        if self.live is None:
            return 0
        live, self.live = self.live, None
        live.__exit__(None, None, None)
        return live.peak

    def close(self) -> None:
        """Stop counting where a step failed."""
        if self.live is not None:
            self.live.__exit__(None, None, None)
            self.live = None


def batch_shape(row: ModelInputs) -> BatchShape:
    """Return what the memory of a batch of a model depends on."""
    ids, starts = row["input_ids"], row.get(SEQUENCE_STARTS)
    pixels = row.get("pixel_values")
    images = num_images(row) if pixels is None or pixels.ndim != 4 else len(pixels)
    supervised = int((row["labels"][:, 1:] != IGNORE_INDEX).sum()) if "labels" in row else 0
    lengths = () if starts is None else tuple(starts.diff().tolist())
    return BatchShape(ids.shape[0], ids.shape[1], images, supervised, lengths)


def watch(trainer: VLMTrainer, probe: Probe) -> Callable[[], float]:
    """Note the shapes and the statistics of what a trainer trains on; return what times a forward pass of the last."""
    train, add = trainer.training_step, trainer.meter.add
    last: list[tuple[nn.Module, Inputs, NumItems]] = []

    def training_step(model: nn.Module, inputs: Inputs, num_items_in_batch: NumItems = None) -> torch.Tensor:
        """Note the shapes of a batch, and train on it."""
        probe.shapes += [batch_shape(row) for row in get_rows(inputs) if "input_ids" in row]
        last[:] = [(model, dict(inputs), num_items_in_batch)]
        return train(model, inputs, num_items_in_batch)

    def count(batches: Sequence[tuple[BatchStats, int, int]]) -> None:
        """Note what the batches of a step hold."""
        stats, encoded, connected = zip(*batches, strict=True)
        probe.stats.append((sum(stats, BatchStats()), sum(encoded), sum(connected), len(batches)))
        add(batches)

    def forward() -> float:
        """Return the seconds of a forward pass of the last micro-batch without gradients."""
        model, inputs, number = last[0]
        rows = [trainer._prepare_inputs(row) for row in get_rows(inputs)]
        seconds = []
        for _ in range(NUM_FORWARD):
            begun = time.perf_counter()
            with torch.no_grad(), trainer.compute_loss_context_manager():
                for row in rows:
                    trainer.objective.compute_loss(trainer, model, row, number)
            synchronize(trainer.args.device)
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    trainer.training_step, trainer.meter.add = training_step, count
    return forward


def run_probe(objective: Objective, run: PreparedRun, config: RunConfig, loading_began: float | None = None) -> Probe:
    """Train a few steps on a prepared run that is thrown away afterwards; its arguments are those of a probe.

    `config` is that of the run itself; `loading_began` is the time, as `time.perf_counter` tells it, at which the
    preflight began.
    """
    probe = Probe()
    objective.before_training(run)
    trainer = make_trainer(objective, run)
    trainer.remove_callback(PrinterCallback)
    forward, callback = watch(trainer, probe), ProbeCallback(probe, trainer, loading_began)
    trainer.add_callback(callback)
    try:
        trainer.train()
    finally:
        callback.close()
    with suppress(Exception):  # an objective's own batches may need what only a step has
        probe.forward_seconds = forward()
    probe.answer_seconds = time_answer(run, trainer, config)
    probe.drawing_seconds = time_drawing(run.folder)
    args, loader = copy.copy(run.args), trainer.callback_handler.train_dataloader
    assert loader is not None
    args.max_steps, args.num_train_epochs = config.trainer.max_steps, config.trainer.num_train_epochs
    probe.max_steps = trainer.set_initial_training_values(args, loader)[-1]
    probe.shapes = getattr(callback, "counted_shapes", probe.shapes)
    probe.stats, probe.flops = probe.stats[NUM_UNTIMED:], trainer.meter.flops
    probe.batch_samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return probe


def throwaway_folder() -> Path:
    """Return a new folder for a probe."""
    return Path(tempfile.mkdtemp(prefix="vlm-preflight-"))


def remove(folder: Path) -> None:
    """Delete a probe's folder."""
    shutil.rmtree(folder, ignore_errors=True)


def prepare_run(
    objective: Objective,
    folder: Path,
    resolved: tuple[PreTrainedConfig, Processor],
    args: TrainingArguments,
    data: RunData,
    unused: Sequence[str] = (),
) -> PreparedRun:
    """Load and prepare the model of a run as the run does; see `vlm.train.run`."""
    config, (model_config, processor) = objective.config, resolved
    seed_everything(args)
    model = load_weights(config, model_config, processor, compute_dtype(args), args.seed)
    model = objective.wrap_model(model, args)
    parts = prepare(model, config, args, processor, unused)
    return PreparedRun(folder, args, processor, model, parts, data, objective.make_collator(processor, data, args))


def probe_arguments(config: RunConfig, extra: Sequence[str]) -> TrainingArguments:
    """Return the arguments of a probe."""
    args = training_arguments(config.trainer, extra)
    args.output_dir = config.trainer.output_dir
    return args
