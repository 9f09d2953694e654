"""A preference step with its prompts shared: against padded halves, against counting, and against TRL's `DPOTrainer`.

    python -m benchmarks.preference [--pairs N] [--steps N] [--repeats N] [--shape NAME] [--folder DIR] [--without-trl]

Every variant trains the same LLaVA of transformers, random weights, with DPO on the same pairs in the same order and in
the same micro-batches: in float32 with sdpa and AdamW, the encoder frozen, activations kept. A pair has an image, a
question, and two replies, both as long as those of LLaVA's detailed descriptions and reasoning (`benchmarks.lengths`).

- `shared`: `trainer.packing=true`: both replies behind one prompt, whose image is encoded once.
- `padded`: the same without packing; equal images of a batch are encoded once here too.
- `TRL`: version 1.16.0 in an environment of its own, which the first call makes below `--folder`: that needs a network.
  It pads both halves, and encodes each image twice.

These three run a frozen copy of the model in every step for the reference. `cached` is `shared` with log-probabilities
of the reference computed before the first step, ours by default, which TRL refuses with images; `finetune` learns the
chosen replies alone, in packed rows. From the operations and the time of its steps, counting predicts the time of those
of `cached`. The first losses and gradients of `shared`, `padded` and TRL have to agree.

Time is that of all cores together, on which other processes of the machine do not count (with `OMP_NUM_THREADS=1`,
threads that wait for each other do not either); the first step of each run is
not measured. Variants take turns, `--repeats` times. About eight minutes on a free core, and 4 GB.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.lengths import SOURCES, Record, draw_records, find_single_token_words
from benchmarks.peers import PROGRAMS, make_environment, write_checkpoint
from benchmarks.report import Row, paired, report
from benchmarks.shapes import SHAPES, Shape
from benchmarks.variants import LEARNING_RATE, SEED, Steps, release_memory, run_ours, silence_libraries

REPLIES = ("LLaVA detail", "LLaVA reasoning")
"""The sources of lengths: those with one question and a reply of several sentences."""
TOLERANCE = 1e-4
"""The largest relative difference of losses and norms of the first gradients."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        pairs: number of pairs in a step, which is one micro-batch.
        steps: number of optimiser steps; the first is not measured.
        repeats: how often each variant trains.
    """

    shape: str = "pairs"
    pairs: int = 4
    steps: int = 4
    repeats: int = 2


@dataclass
class Measured:
    """What was measured of a variant.

    Attributes:
        seconds: core seconds of each measured step of every repetition.
        flops: counted operations of these steps; empty where they are not counted.
        losses: loss of each step of the first repetition.
        norm: norm of the first gradient.
    """

    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0

    def add(self, run: Steps) -> None:
        """Add a repetition."""
        self.seconds += run.core_seconds[1:]
        self.flops += run.flops[1:]
        self.losses, self.norm = self.losses or run.losses, self.norm or run.norms[0]


# --- records ---------------------------------------------------------------------------------------------------------


def write_pairs(folder: Path, number: int, shape: Shape) -> Path:
    """Write `pairs.json`, `chosen.json` with the chosen replies alone, and the images; return the first path."""
    (folder / "images").mkdir(parents=True)
    records = _draw_long_replies(2 * number)
    draw, pixels = random.Random(SEED), np.random.default_rng(SEED)
    pairs, chosen = [], []
    for index, (record, other) in enumerate(zip(records[::2], records[1::2], strict=True)):
        coarse = Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        side = (shape.side, shape.side)
        coarse.resize(side, Image.Resampling.BICUBIC).save(folder / "images" / f"{index}.png")
        question, reply = record.turns[0]
        texts = [_draw_text(draw, words) for words in (question, reply, other.turns[0][1])]
        place = {"id": str(index), "image": f"{index}.png"}
        pairs.append(place | dict(zip(("question", "chosen", "rejected"), texts, strict=True)))
        turns = [{"from": "human", "value": f"<image>\n{texts[0]}"}, {"from": "gpt", "value": texts[1]}]
        chosen.append(place | {"conversations": turns})
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "chosen.json").write_text(json.dumps(chosen))
    return folder / "pairs.json"


def _draw_long_replies(number: int) -> list[Record]:
    """Return records of `REPLIES`."""
    share = sum(source.thousands for source in SOURCES if source.name in REPLIES)
    total = sum(source.thousands for source in SOURCES)
    records = [
        record for record in draw_records(int(2 * number * total / share), SEED) if record.source.name in REPLIES
    ]
    return records[:number]


def _draw_text(draw: random.Random, words: int) -> str:
    vocabulary = find_single_token_words()
    return " ".join(vocabulary[int(len(vocabulary) * draw.random() ** 3)] for _ in range(words))


# --- variants --------------------------------------------------------------------------------------------------------


def train_ours(name: str, folder: Path, records: Path, size: Size) -> Steps:
    """Run one of our variants."""
    reference = "cached" if name == "cached" else "copy"
    learns = {
        "finetune": ["trainer.objective=generation", f"dataset.path={records.parent / 'chosen.json'}"],
    }.get(name, [f"trainer.preference.reference={reference}", "dataset.format=preference"])
    words = [
        *learns,
        *("dataset.template=tokenizer", "trainer/lora=none", "trainer/unfreeze=connector-language-model"),
        *(f"trainer.packing={str(name != 'padded').lower()}", "trainer.packing_strategy=step"),
        *("trainer.train_sampling_strategy=sequential", "trainer.gradient_accumulation_steps=1"),
        *(f"trainer.per_device_train_batch_size={size.pairs}", "trainer.eval_strategy=no"),
        *("trainer.optim=adamw_torch_fused", "trainer.max_grad_norm=1.0", "trainer.bf16=false"),
    ]
    model = [f"model.hf_name={folder / 'model'}", "model.attn_implementation=sdpa"]
    config = "finetune-llava-onevision" if name == "finetune" else "preference-smol"
    extra = ["trainer/deepspeed=none", "trainer.activation_checkpointing=false"] if name == "finetune" else []
    with tempfile.TemporaryDirectory(dir=folder) as output:
        run = run_ours(folder, records, Path(output, name), *words, *extra, name=config, model=model)
    return release_memory(run)


TRL_SCRIPT = """
import copy, json, sys, time
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import DPOConfig, DPOTrainer

job, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
model.model.vision_tower.requires_grad_(False)
records = []
for record in json.load(open(job["records"])):
    image = Image.open(f"{job['images']}/{record['image']}").convert("RGB")
    turns = {"prompt": ("user", "\\n" + record["question"])}
    turns |= {side: ("assistant", record[side]) for side in ("chosen", "rejected")}
    rows = {side: [{"role": role, "content": text}] for side, (role, text) in turns.items()}
    records.append(rows | {"images": [image]})

class Timer(TrainerCallback):
    seconds, losses, norms = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        last, self.last = self.last, time.process_time()
        self.seconds.append(self.last - last)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))

timer = Timer()
trainer = DPOTrainer(
    model=model, args=DPOConfig(**options), train_dataset=Dataset.from_list(records),
    processing_class=AutoProcessor.from_pretrained(job["model"]), callbacks=[timer],
)
trainer.train()
print("measured:" + json.dumps({"core_seconds": timer.seconds, "losses": timer.losses, "norms": timer.norms}))
"""


def train_trl(python: Path, folder: Path, records: Path, size: Size) -> Steps:
    """Run TRL in its own environment, without a network.

    Raises:
        RuntimeError: it fails.
    """
    place = {"model": folder / "model", "records": records, "images": records.parent / "images"}
    options = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": size.pairs, "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "bf16": False, "beta": 0.1,
        "max_length": None, "optim": "adamw_torch_fused", "disable_tqdm": True,
    }  # fmt: skip
    job = {name: str(value) for name, value in place.items()}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    command = [str(python), "-c", TRL_SCRIPT, json.dumps(job), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("measured:")]
    if result.returncode != 0 or not lines:
        raise RuntimeError(f"TRL failed:\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}")
    measured = json.loads(lines[0].removeprefix("measured:"))
    print(
        "  TRL: steps took", ", ".join(f"{step:.2f}" for step in measured["core_seconds"]), "s of all cores", flush=True
    )
    return Steps("TRL", **measured)


def measure(size: Size, python: Path | None) -> dict[str, Measured]:
    """Train every variant in turns."""
    names = ["shared", "padded", *(["TRL"] if python else []), "cached", "finetune"]
    measured = {name: Measured() for name in names}
    with tempfile.TemporaryDirectory() as work:
        folder, shape = Path(work), SHAPES[size.shape]
        write_checkpoint(folder / "model", shape)
        records = write_pairs(folder / "data", size.pairs * size.steps, shape)
        for turn in range(size.repeats):
            for name in names if turn % 2 == 0 else reversed(names):
                if name == "TRL":
                    assert python is not None
                    measured[name].add(train_trl(python, folder, records, size))
                else:
                    measured[name].add(train_ours(name, folder, records, size))
    return measured


def check_agreement(measured: dict[str, Measured], names: Sequence[str]) -> dict[str, float]:
    """Return by how much first losses and gradients of variants differ, relatively.

    Raises:
        SystemExit: they do not do the same work.
    """
    differences = {}
    for label, values in (
        ("losses of all steps are apart at most by", [measured[name].losses for name in names]),
        ("norms of the first gradients are apart by", [[measured[name].norm] for name in names]),
    ):
        steps = list(zip(*values, strict=True))
        differences[label] = max((max(step) - min(step)) / min(step) for step in steps)
        first = (max(steps[0]) - min(steps[0])) / min(steps[0])
        if first > TOLERANCE:
            raise SystemExit(f"{', '.join(names)} do not compute the same: {label} {first:.2g}: {values}")
    return differences


def make_rows(measured: dict[str, Measured], size: Size) -> list[Row]:
    """Return the claims, of pairs a core second; steps of the same pairs are compared one by one."""
    rows = [compare_speeds(measured, "TRL", size)] if "TRL" in measured else []
    plain, cached = measured["finetune"], measured["cached"]
    pace = statistics.median(step / flops for step, flops in zip(plain.seconds, plain.flops, strict=True))
    predicted = [pace * flops for flops in cached.flops]
    name, labels = "step over what a finetune step predicts", ("measured", "counted")
    return [*rows, paired(name, cached.seconds, predicted, labels, "s", 1.15, "lower")]


def compare_speeds(measured: dict[str, Measured], other: str, size: Size) -> Row:
    """Return how many times as many pairs a core second as another variant the one with shared prompts trains on."""
    ours, theirs = ([size.pairs / step for step in measured[name].seconds] for name in ("shared", other))
    return paired(f"pairs/s, prompts shared over {other}", ours, theirs, ("shared", other), "pairs/s", 1.6)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pairs", "steps", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size(), name))
    parser.add_argument("--shape", choices=SHAPES, default=Size().shape)
    parser.add_argument("--folder", type=Path, default=Path("outputs/peers"), help="where TRL's environment is")
    parser.add_argument("--without-trl", action="store_true", help="ours alone")
    args = parser.parse_args()
    size = Size(args.shape, args.pairs, args.steps, args.repeats)
    silence_libraries()
    package = PROGRAMS["TRL"].package
    assert package is not None
    python = None if args.without_trl else make_environment(args.folder.resolve() / "environment-TRL", package)
    measured = measure(size, python)
    names = [name for name in ("shared", "padded", "TRL") if name in measured]
    notes: dict[str, Any] = check_agreement(measured, names)
    for name, values in measured.items():
        notes[f"{name}, core seconds of a step"] = statistics.median(values.seconds)
        print(f"{name}: losses {' '.join(f'{loss:.5f}' for loss in values.losses)}; first norm {values.norm:.5f}")
    padded = compare_speeds(measured, "padded", size)
    notes[padded.name] = padded.ratio
    notes |= {"pairs in a step": size.pairs, "shape": size.shape, "TRL": package, "python": sys.version.split()[0]}
    report("preference", make_rows(measured, size), notes)


if __name__ == "__main__":
    main()
