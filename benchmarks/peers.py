"""The same finetuning with ms-swift, LLaMA-Factory and TRL, and with ours: whole commands, one after the other.

    python -m benchmarks.peers [--samples 4] [--accumulation N] [--steps N] [--folder DIR] [--only NAME …]

Every command trains the same checkpoint, a LLaVA of transformers with SmolLM2-135M's and ViT-B/16's shapes and random
weights, on the same records (lengths of LLaVA-665k, `benchmarks.lengths`), as many in each micro-batch, in float32 with
sdpa, AdamW at a constant rate, the encoder frozen, activations of the language model computed anew in the backward
pass, which is the default of all three. Each program draws the order of records itself, so that their steps hold
different ones; each sees every record once, and their mean losses over the epoch agree but for the templates. The
objective is a mean over the supervised tokens of a step. TRL supervises questions too: it masks them only in
conversations without images.

Each peer runs in an environment of its own with the version below, which the first call makes below `--folder`: that
needs a network. About 25 minutes on two cores for the default, and 20 GB.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.lengths import draw_records, write_records
from benchmarks.report import RESULTS, compared, report
from benchmarks.shapes import FEATURE_LAYER, SHAPES, Shape
from vlm.demo.tiny_models import make_word_tokenizer

LEARNING_RATE = 1e-4
SEED = 42
TARGETS = {4: 2.0, 8: 2.5}
"""Samples in a micro-batch -> how many times the speed of ms-swift and of LLaMA-Factory is aimed at."""
MAX_TOKENS = 2048
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %} ASSISTANT:{% else %}{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
"""The layout of LLaVA-1.5, as the peers have it built in."""


@dataclass(frozen=True)
class Job:
    """What every program is asked to do.

    Attributes:
        model: the folder of the checkpoint.
        records: LLaVA's records; the same in each peer's own form lie beside them.
        output: the folder of the program's results.
        samples: number of samples in a micro-batch.
        accumulation: number of micro-batches in a step.
        steps: number of optimiser steps: one epoch.
    """

    model: Path
    records: Path
    output: Path
    samples: int
    accumulation: int
    steps: int

    @property
    def num_records(self) -> int:
        """Number of records, each seen once."""
        return self.samples * self.accumulation * self.steps


@dataclass(frozen=True)
class Measured:
    """One command.

    Attributes:
        seconds: of the whole command.
        training: seconds of its training loop, as the program reports it.
        losses: the logged loss of each optimiser step.
    """

    seconds: float
    training: float
    losses: list[float]


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Write a LLaVA of transformers with random weights, with its processor."""
    tokenizer = make_word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<image>"]})
    start = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=shape.vision_config(), text_config=shape.text_config(**ids), vision_feature_layer=FEATURE_LAYER,
        image_token_index=tokenizer.get_vocab()["<image>"], image_seq_length=shape.tokens_per_image,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(SEED)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    square = {"height": shape.side, "width": shape.side}
    images = CLIPImageProcessor(size={"shortest_edge": shape.side}, crop_size=square)
    LlavaProcessor(
        images, tokenizer, patch_size=shape.patch, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def write_all_forms(folder: Path, number: int, shape: Shape) -> Path:
    """Write the records in LLaVA's form, which ours and LLaMA-Factory read, and as messages, which the others read."""
    records = [
        record for record in draw_records(3 * number, SEED) if record.tokens + shape.tokens_per_image < MAX_TOKENS
    ]
    path = write_records(folder, records[:number], shape.side)
    factory, messages = [], []
    for record in json.loads(path.read_text()):
        images = [str(folder / "images" / record["image"])] if "image" in record else []
        factory.append({"conversations": record["conversations"], "images": images})
        roles = {"human": "user", "gpt": "assistant"}
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        messages.append({"messages": turns, "images": images})
    (folder / "factory.json").write_text(json.dumps(factory))
    (folder / "messages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in messages))
    columns = {"messages": "conversations", "images": "images"}
    listing = {"records": {"file_name": "factory.json", "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(listing))
    return path


# --- the programs ----------------------------------------------------------------------------------------------------


def ours_command(job: Job, python: Path) -> list[str]:
    """Return our command; the checkpoint is one of the family LLaVA."""
    return [
        *(str(python), "-m", "vlm", "-cn", "finetune-llava-onevision", f"model.hf_name={job.model}"),
        *(f"dataset.path={job.records}", f"dataset.image_folder={job.records.parent / 'images'}"),
        *(f"dataset.cache_dir={job.output / 'cache'}", f"dataset.max_length={MAX_TOKENS}"),
        *("trainer/unfreeze=connector-language-model", "trainer/deepspeed=none"),
        f"trainer.learning_rate.connector_learning_rate={LEARNING_RATE}",
        f"trainer.learning_rate.language_model_learning_rate={LEARNING_RATE}",
        *("trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.train_sampling_strategy=random"),
        f"trainer.per_device_train_batch_size={job.samples}",
        f"trainer.gradient_accumulation_steps={job.accumulation}",
        *("trainer.bf16=false", "trainer.tf32=false", "trainer.activation_checkpointing=true"),
        *("trainer.save_strategy=no", "trainer.logging_steps=1", "trainer.num_samples=0", "trainer.report_to=none"),
        *("trainer.dataloader_num_workers=0", "trainer.use_cpu=true", f"trainer.output_dir={job.output}"),
    ]


def swift_command(job: Job, python: Path) -> list[str]:
    """Return the command of ms-swift."""
    options = common_options(job) | {
        "model": job.model, "model_type": "llava1_5_hf", "template": "llava1_5_hf", "tuner_type": "full",
        "freeze_vit": True, "freeze_aligner": False, "freeze_llm": False, "torch_dtype": "float32",
        "dataset": job.records.parent / "messages.jsonl", "max_length": MAX_TOKENS, "dataset_num_proc": 1,
        "split_dataset_ratio": 0, "attn_impl": "sdpa",
        "vit_gradient_checkpointing": False, "lazy_tokenize": True,
    }  # fmt: skip
    return [str(python.parent / "swift"), "sft", *as_options(options)]


def factory_command(job: Job, python: Path) -> list[str]:
    """Return the command of LLaMA-Factory, whose options are in a file."""
    options = common_options(job) | {
        "model_name_or_path": str(job.model), "stage": "sft", "do_train": True, "finetuning_type": "full",
        "freeze_vision_tower": True, "freeze_multi_modal_projector": False, "template": "llava",
        "dataset": "records", "dataset_dir": str(job.records.parent), "cutoff_len": MAX_TOKENS, "flash_attn": "sdpa",
        "preprocessing_num_workers": 1, "trust_remote_code": False,
    }  # fmt: skip
    job.output.mkdir(parents=True, exist_ok=True)
    path = job.output / "options.yaml"  # JSON is YAML too
    path.write_text(
        json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in options.items()})
    )
    return [str(python.parent / "llamafactory-cli"), "train", str(path)]


TRL_SCRIPT = """
import json, sys
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

job, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
model.model.vision_tower.requires_grad_(False)
records = [json.loads(line) for line in open(job["records"])]
for record in records:
    record["images"] = [Image.open(path).convert("RGB") for path in record["images"]]
    for message in record["messages"]:
        text = message["content"]
        parts = [{"type": "image"}] * text.count("<image>")
        message["content"] = [*parts, {"type": "text", "text": text.replace("<image>", "").lstrip()}]
processor = AutoProcessor.from_pretrained(job["model"])
config = SFTConfig(**options, max_length=None, bf16=False, packing=False)
trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(records), processing_class=processor)
trainer.train()
"""


def trl_command(job: Job, python: Path) -> list[str]:
    """Return the command of TRL, which is a script, as its documentation has it."""
    place = {"model": str(job.model), "records": str(job.records.parent / "messages.jsonl")}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in common_options(job).items()}
    return [str(python), "-c", TRL_SCRIPT, json.dumps(place), json.dumps(options)]


def common_options(job: Job) -> dict[str, Any]:
    """Return the options that all peers have from transformers' `TrainingArguments`."""
    return {
        "output_dir": job.output, "per_device_train_batch_size": job.samples,
        "gradient_accumulation_steps": job.accumulation, "num_train_epochs": 1, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "dataloader_num_workers": 0, "use_cpu": True, "seed": SEED,
        "max_grad_norm": 1.0,
    }  # fmt: skip


def as_options(options: dict[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


@dataclass(frozen=True)
class Program:
    """A program that trains.

    Attributes:
        package: what is installed into its environment; None: ours, which runs in this one.
        command: a job and the environment's Python -> the command.
        is_aim: whether the targets are about it.
    """

    package: str | None
    command: Callable[[Job, Path], list[str]]
    is_aim: bool = True


PROGRAMS = {
    "ours": Program(None, ours_command),
    "ms-swift": Program("ms-swift==4.6.0", swift_command),
    "LLaMA-Factory": Program("llamafactory==0.9.5", factory_command),
    "TRL": Program("trl==1.16.0", trl_command, is_aim=False),
}


def make_environment(folder: Path, package: str) -> Path:
    """Return the Python of an environment with a package, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        uv = shutil.which("uv") or str(Path(__file__).parents[1] / ".uv" / "bin" / "uv")
        print(f"making an environment with {package}", flush=True)
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        same_torch = f"torch=={torch.__version__.partition('+')[0]}"  # registries have no local versions
        words = ["pip", "install", "--quiet", "--python", str(python), package, same_torch]
        subprocess.run([uv, *words, "torchvision", "peft", "pillow"], check=True)
        (folder / "installed").touch()
    return python


def run_program(name: str, job: Job, python: Path) -> Measured:
    """Run a program's command to its end, without a network.

    Raises:
        RuntimeError: it fails, or does not train every record once.
    """
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = PROGRAMS[name].command(job, python)
    start = time.perf_counter()
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=os.environ | offline
    )
    seconds = time.perf_counter() - start
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", result.stdout)]
    training = re.findall(r"'train_runtime': '?([\d.]+)", result.stdout)
    if result.returncode != 0 or len(losses) != job.steps or not training:
        raise RuntimeError(f"{name} failed after {len(losses)} of {job.steps} steps:\n{result.stdout[-4000:]}")
    print(f"  {name}: {seconds:.0f} s, training {float(training[-1]):.0f} s, losses {losses}", flush=True)
    return Measured(seconds, float(training[-1]), losses)


def draw_losses(measured: dict[str, Measured], path: Path) -> None:
    """Plot the logged loss of every program."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in measured.items():
        axes.plot(range(1, len(values.losses) + 1), values.losses, marker="o", label=name)
    axes.set_xlabel("optimiser step (each program draws its own order)")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path, dpi=110)


def report_speeds(measured: dict[str, Measured], job: Job) -> None:
    """Print and write how many times as fast ours was as each peer, and the losses."""
    ours, rows = measured["ours"], []
    for name, values in measured.items():
        if name != "ours":
            target = TARGETS.get(job.samples, 1.0) if PROGRAMS[name].is_aim else 1.0
            label = f"records a second over {name}'s, whole commands"
            speeds, others = [job.num_records / ours.seconds], [job.num_records / values.seconds]
            rows.append(compared(label, speeds, others, ("ours", name), "records/s", target))
    notes: dict[str, Any] = {"samples in a micro-batch": job.samples, "micro-batches in a step": job.accumulation}
    for name, values in measured.items():
        notes[f"{name}, training loop alone, s"] = values.training
        notes[f"{name}, mean loss of the epoch"] = statistics.fmean(values.losses)
        notes[f"{name}, version"] = PROGRAMS[name].package or "this one"
    report(f"peers-{job.samples}", rows, notes)
    draw_losses(measured, RESULTS / f"peers-{job.samples}_loss.png")


def main() -> None:
    """Train with every program, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="samples in a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches in an optimiser step")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps: one epoch")
    parser.add_argument("--shape", choices=SHAPES, default="smol")
    parser.add_argument("--folder", type=Path, default=Path("outputs/peers"), help="environments, model, results")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="programs besides ours")
    args = parser.parse_args()
    folder = args.folder.resolve()
    names = ["ours", *(name for name in PROGRAMS if name in args.only and name != "ours")]
    pythons = {name: _python(folder, name) for name in names}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        shape = SHAPES[args.shape]
        write_checkpoint(Path(work, "model"), shape)
        number = args.samples * args.accumulation * args.steps
        records = write_all_forms(Path(work, "data"), number, shape)
        output = Path(work, "out")
        job = Job(Path(work, "model"), records, output, args.samples, args.accumulation, args.steps)
        measured = {}
        for name in names:
            measured[name] = run_program(name, job, pythons[name])
            shutil.rmtree(output)
    report_speeds(measured, job)


def _python(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    package = PROGRAMS[name].package
    return Path(sys.executable) if package is None else make_environment(folder / f"environment-{name}", package)


if __name__ == "__main__":
    main()
