"""What `vlm check` predicts against what runs do: peak memory, and the time of a step.

    python -m benchmarks.preflight [--steps N]

Small models of different parts train on the CPU. The memory of the probe's second step is counted on fake tensors
(predicted) and on the tensors of the step itself (measured): both see tensors, neither what a kernel takes for itself.
The time of a step is predicted from two steps of a probe, and compared with the mean of the steps of another run; both
in processor time, which other programs on the machine disturb less. Some minutes on two cores.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import PrinterCallback, TrainerCallback

from benchmarks.lengths import draw_records, write_records
from benchmarks.report import RESULTS
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.variants import silence_libraries
from tests.tiny_parts import Parts
from vlm.config.schema import RunConfig
from vlm.data.blank_images import dummy_image
from vlm.train.make_trainer import make_trainer
from vlm.train.model import compute_dtype
from vlm.train.objectives.table import make_objective
from vlm.train.preflight import duration, probe
from vlm.train.preflight.memory import predict_memory

SHAPE = "small"
NUM_RECORDS = 96
NUM_STEPS = 10
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.15
LORA = ("trainer/lora=language-model", "trainer/unfreeze=connector")
ALL = ("trainer/unfreeze=all", "trainer.learning_rate.visual_encoder_learning_rate=1e-4")
CASES: dict[str, tuple[str, ...]] = {
    "packed": (),
    "padded": ("trainer.packing=false",),
    "connector alone": ("trainer/unfreeze=connector",),
    "LoRA": LORA,
    "all parts": ALL,
    "checkpointed": ("trainer.activation_checkpointing=true",),
    "checkpointed, LoRA": (*LORA, "trainer.activation_checkpointing=true"),
    "bfloat16": ("trainer.bf16=true",),
    "accumulated, padded": ("trainer.packing=false", "trainer.per_device_train_batch_size=2",
                            "trainer.gradient_accumulation_steps=2"),
    "pixel shuffle": ("model/connector=pixel_shuffle",),
    "resampler": ("model/connector=resampler",),
    "Muon": ("trainer.optim=muon",),
    "SigLIP, Qwen3": ("siglip", "qwen3"),
    "DINOv2, Gemma 2": ("dinov2", "gemma2"),
}  # fmt: skip
"""Name -> overrides, or an encoder and a language model of `tests/tiny_parts.py`."""


@dataclass(frozen=True)
class Outcome:
    """Bytes and seconds that were predicted and measured."""

    memory: tuple[float, float]
    seconds: tuple[float, float]


class StepClock(TrainerCallback):
    """Notes the processor time at the end of each step."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object):
        """Note the time."""
        self.ends.append(time.process_time())


def words_of(case: Sequence[str], folder: Path) -> list[str]:
    """Return the overrides of a case."""
    parts = Parts(folder / "tiny")
    is_tiny = len(case) == 2 and "=" not in case[0]
    encoder = parts.encoder(case[0]) if is_tiny else folder / "parts" / "visual_encoder"
    language_model = parts.language_model(case[1]) if is_tiny else folder / "parts" / "language_model"
    data = folder / "data"
    return [
        f"model.visual_encoder.hf_name={encoder}", f"model.language_model.hf_name={language_model}",
        f"dataset.path={data / 'records.json'}", f"dataset.image_folder={data / 'images'}",
        f"dataset.cache_dir={data / 'cache'}", "dataset.template=chatml", "dataset.max_length=512",
        "trainer.use_cpu=true", "trainer.per_device_train_batch_size=4", "trainer.train_sampling_strategy=random",
        *(() if is_tiny else case),
    ]  # fmt: skip


def prepare(config: RunConfig, folder: Path) -> tuple[Any, Any]:
    """Return the objective and the prepared run of a configuration."""
    from vlm.assembly.resolve import resolve_model

    objective = make_objective(config)
    resolved = resolve_model(config)
    args = probe.probe_arguments(config, list(objective.training_keys()))
    data = objective.load_data(*resolved, args)
    return objective, probe.prepare_run(objective, folder, resolved, args, data)


def measure(config: RunConfig, folder: Path, num_steps: int) -> Outcome:
    """Predict a run from a probe, then make its steps."""
    probing = probe.quiet_config(config, folder / "probe")
    objective, run = prepare(probing, folder / "probe")
    clock = SimpleNamespace(perf_counter=time.process_time)
    with patch.object(probe, "time", clock):
        found = probe.run_probe(objective, run, (num_steps, 1.0))
    image = dummy_image(run.processor)[1]
    predicted = predict_memory(run.model, probing, run.args, image, found.shapes, compute_dtype(run.args)).peak
    strategy = str(config.trainer.train_sampling_strategy)
    step = duration._mean_step(found, run.data.records["train"], strategy)[0]
    probing = probe.quiet_config(config, folder / "run")
    probing.trainer.max_steps = num_steps
    objective, run = prepare(probing, folder / "run")
    objective.before_training(run)
    trainer, watch = make_trainer(objective, run), StepClock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    measured = (watch.ends[-1] - watch.ends[0]) / (num_steps - 1)
    return Outcome((predicted, found.peak), (step, measured))


def main() -> None:
    """Measure every case, print the table and write `results/preflight.json`."""
    from tests.fixtures import compose_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    args = parser.parse_args()
    silence_libraries()
    logging.disable(logging.WARNING)
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "parts", SHAPES[SHAPE])
        write_records(folder / "data", draw_records(NUM_RECORDS), SHAPES[SHAPE].side)
        for number, (case, words) in enumerate(CASES.items()):
            config = compose_config("finetune-smol", words_of(words, folder))
            outcomes[case] = measure(config, folder / str(number), args.steps)
            (mib, real), (step, took) = outcomes[case].memory, outcomes[case].seconds
            print(f"{case:<24}{mib / 2**20:>9.1f}{real / 2**20:>9.1f} MiB{mib / real - 1:>+8.1%}"
                  f"{step:>9.3f}{took:>9.3f} s{step / took - 1:>+8.1%}", flush=True)  # fmt: skip
    summarise(outcomes)


def summarise(outcomes: dict[str, Outcome]) -> None:
    """Print how far predictions are off, and write them."""
    off = {
        "memory": [abs(found.memory[0] / found.memory[1] - 1) for found in outcomes.values()],
        "time": [abs(found.seconds[0] / found.seconds[1] - 1) for found in outcomes.values()],
    }
    for what, within in (("memory", MEMORY_WITHIN), ("time", TIME_WITHIN)):
        hits = sum(value <= within for value in off[what])
        print(f"{what}: median {statistics.median(off[what]):.1%} off, most {max(off[what]):.1%}; "
              f"{hits} of {len(off[what])} within {within:.0%}")  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    content = {case: {"memory": found.memory, "seconds": found.seconds} for case, found in outcomes.items()}
    (RESULTS / "preflight.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
