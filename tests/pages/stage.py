"""A folder in which a page's commands really run: generated records and images, small parts, checkpoints, a Hub.

A command is run as it is typed, but for what needs another machine: launchers become one process on the CPU, parts of
the Hub become small untrained ones, and a run ends after two steps. `reason_to_skip` says what is not run, and why.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from tests.forked import CPU_ONLY, Ended, run_forked
from tests.hub.server import LocalHub
from tests.pages.blocks import ROOT, Command
from vlm.config.packaged import packaged_names

TOKEN = "hf_" + "w" * 30
SHAPES = ("circle", "square", "triangle")
SHORT = (
    "trainer.use_cpu=true", "trainer.bf16=false", "trainer.fp16=false", "trainer.tf32=null", "trainer.max_steps=2",
    "trainer.num_samples=1", "trainer.dataloader_num_workers=0", "trainer.gradient_accumulation_steps=1",
    "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=4", "trainer/deepspeed=none",
    "trainer/sharding=none", "inference.max_new_tokens=4", "dataset.max_length=1024", "trainer.warmup_steps=0",
)  # fmt: skip
"""What makes any run a short one on a CPU; these come after a page's own overrides."""
NARROW = ("model.head.loss_options.widths=[8,16,32]",)
"""What a run that makes vectors needs, since those of small parts are `WIDTH` numbers wide."""
WIDTH = 32
COLOURS = ("red", "green", "blue", "orange")
PARTS = {"visual_encoder": "parts/visual_encoder", "language_model": "parts/language_model"}
FAMILIES = packaged_names("vlm.config", "model", ".yaml")
RECORDS = re.compile(r"[\w./-]+\.(?:jsonl?|csv|tsv)")
INPUT_OPTIONS = ("--data", "--input")
WHERE_OUTPUT_IS = ("--output", "--out", "--json", "--markdown")
ELSEWHERE = {
    "git": "clones from a host", "cd": "no program", ".": "no program", "make": "installs or tests the clone",
    "pip": "installs packages", "hf": "asks for a password", "vllm": "not installed", "curl": "needs a server",
    "docker": "not installed",
    ".venv-eval/bin/accelerate": "needs the environment of lmms-eval",
}  # fmt: skip
"""Programs that are not run, and why not."""
ENDLESS = {
    "chat": "waits for questions", "web": "serves", "serve": "serves", "watch": "waits for a run",
    "verify": "needs another engine", "import": "reads checkpoints of the Hub", "launch": "starts a rank for each GPU",
    "completion": "writes for a shell", "submit": "writes a job file: tests/cli/test_submit.py",
    "export": "writes other formats: tests/hub",
}  # fmt: skip
"""Subcommands that are not run here, and why not."""


def split_program(command: Command) -> tuple[str, list[str]]:
    """Return what a command runs, `vlm` for every way to start it, and its words; a launcher's options are left out."""
    program, *words = command.words
    for start in (["-m", "vlm"], ["--module", "vlm"]):
        for index in range(len(words) - 1) if program in ("python", "deepspeed", "torchrun") else ():
            if words[index : index + 2] == start:
                return "vlm", words[index + 2 :]
    return ("vlm", ["push-to-hub", *words]) if program == "push-to-hub" else (program, words)


def reason_to_skip(command: Command) -> str | None:
    """Return why a command is not run; None: it is."""
    program, words = split_program(command)
    if program in ELSEWHERE:
        return ELSEWHERE[program]
    if program == "python":
        return "a benchmark or an example of minutes" if words[0] != "examples/make_photos.py" else None
    if words[0] in ENDLESS:
        return ENDLESS[words[0]]
    if words[:1] == ["models"]:
        return "tests/cli/test_model_listing.py"
    run = find_run(words)
    text = " ".join(words)
    if words[:2] == ["data", "download"] or "--from" in words:
        return "needs a network, or a corpus of others"
    if "--tasks" in words:
        return "needs the environment of lmms-eval"
    if "BASE" in words or "--dry-run" in words or "--load-4bit" in words or "--video" in words or "--base" in words:
        return "needs more than a small checkpoint"
    if words[0] == "push-to-hub" and "--repo" not in words:
        return "asks for the repository: tests/hub/test_publishing.py"
    if "://" in text or re.search(r"\bmodel=", text) or "…" in text.split():
        return "names a model or data of the Hub, or is not whole"
    if run and "trainer.from_pretrained=" not in text and is_of_hub(run):
        return "its model is one of the Hub's"
    if any(word.startswith(("model/visual_encoder=", "model/language_model=", "model/anyres=")) for word in words):
        return "its parts come from the Hub"
    if run and re.search("quantization|cache_features|streaming|native", text):
        return "needs other parts"
    return None


def find_run(words: Sequence[str]) -> str | None:
    """Return the name behind `-cn`."""
    return next((after for word, after in pairwise(words) if word == "-cn"), None)


def is_of_hub(run: str) -> bool:
    """Return whether a packaged run names a whole model."""
    path = ROOT / "src" / "vlm" / "config" / f"{run}.yaml"
    return path.is_file() and any(f"override model: {name}" in path.read_text(encoding="utf-8") for name in FAMILIES)


class Stage:
    """The folder; `base` has a small checkpoint, and an adapter on it, for those which a page takes for given."""

    def __init__(self, folder: Path, base: Path, hub: LocalHub):
        self.folder, self.base, self.hub = folder, base, hub
        self._num_pushed = 0
        (folder / "parts").symlink_to(base / "parts")
        (folder / "examples").symlink_to(ROOT / "examples")
        self._write_images(folder / "images")
        for image in (folder / "images").iterdir():  # for records without an image folder
            (folder / image.name).symlink_to(image)
        for name in ("cat.png", "a.png", "b.png", "picture.png", "image.png"):
            shutil.copy(folder / "images" / "0.png", folder / name)

    def run(self, command: Command) -> Ended:
        """Run a command, after making what it names and is not there."""
        program, words = split_program(command)
        if program == "python":
            return self.run_alone(words)
        words = [self._provide(word, words) for word in words]
        for option, value in pairwise(words):
            if option in INPUT_OPTIONS:
                self._write_records(value, words)
        if words[0] in ("data", "average", "merge-lora", "runs", "compare", "report", "compare-models"):
            for word in words[1:]:
                if RECORDS.fullmatch(word) and words[words.index(word) - 1] not in WHERE_OUTPUT_IS:
                    self._write_records(word, words)
                    break
        if words[0] == "compare":
            self._copy_runs([self.folder / word for word in words[1:] if word.startswith("outputs/")])
        if words[0] == "push-to-hub":
            self._num_pushed += 1  # a page's examples are no sequence: each has a repository of its own
            names = (re.sub(r"^OWNER/NAME$", f"ann/new-{self._num_pushed}", word) for word in words)
            words = [re.sub(r"^me/", "ann/", name) for name in names]
            return self.run_alone(["-m", "vlm", *words, *([] if "--yes" in words else ["--yes"])])
        if words[0] == "compare-models":
            words += ["--max-samples", "8", "--probe", "1", "--max-new-tokens", "4"]
        run = find_run(words)
        if run is not None and (words[0].startswith("-") or words[0] in ("check", "data")):
            words += self._short(words)
        return run_forked(["-m", "vlm", *words], environments=[{"HF_HUB_OFFLINE": "1"}], cwd=self.folder)[0]

    def run_alone(self, words: Sequence[str]) -> Ended:
        """Run Python in an interpreter of its own, whose Hub is the local one."""
        environment = {
            **os.environ, **CPU_ONLY, "HF_ENDPOINT": self.hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "HF_HOME": str(self.folder / "hub-cache"),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def _short(self, words: Sequence[str]) -> list[str]:
        text = " ".join(words)
        narrow = NARROW if find_run(words) == "embed-smol" else ()
        parts = () if "trainer.from_pretrained=" in text or "--config-dir" in words else PARTS.items()
        wanted = [f"model.{part}.hf_name={folder}" for part, folder in parts if f"model.{part}.hf_name" not in text]
        own = {word.partition("=")[0] for word in words}
        return [
            *wanted,
            *narrow,
            *(word for word in SHORT if word.partition("=")[0] not in own - {"trainer/deepspeed"}),
        ]

    def _provide(self, word: str, words: Sequence[str]) -> str:
        """Return a word as it is typed here, after making the records, images or checkpoint that it names."""
        if words[words.index(word) - 1] == "--width":
            return str(WIDTH // 2)
        key, _, value = word.partition("=")
        if key.startswith("dataset.") and key.endswith("path"):
            self._write_records(value, words)
        elif key.endswith("image_folder") and not (self.folder / value).exists():
            (self.folder / value).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / value).symlink_to(self.folder / "images")
        elif key in ("trainer.from_pretrained", "trainer.distillation.teacher"):
            self._link_checkpoint(value)
        elif re.fullmatch(r"outputs/\S+/final", word) and words[words.index(word) - 1] not in WHERE_OUTPUT_IS:
            self._link_checkpoint(word)
        return word

    def _link_checkpoint(self, name: str) -> None:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.base / ("adapter" if "lora" in name else "final"), path)

    def _copy_runs(self, runs: Sequence[Path]) -> None:
        """Make the runs of a comparison that are not there, as copies of one that is."""
        trained = next(run for run in runs if run.is_dir())
        for run in runs:
            if not run.exists():
                shutil.copytree(trained, run)

    def _write_images(self, folder: Path) -> None:
        sys.path.insert(0, str(ROOT / "examples"))
        try:
            from make_data import COLOURS, draw_image  # pyright: ignore[reportMissingImports]
        finally:
            sys.path.pop(0)
        folder.mkdir()
        for number in range(24):
            draw_image(COLOURS[number % 4], SHAPES[number % 3]).save(folder / f"{number}.png")

    def _write_records(self, name: str, words: Sequence[str]) -> None:
        """Write a file of records in every form that a run or command may take, unless it is there."""
        path = self.folder / name
        if path.exists() or not RECORDS.fullmatch(name):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "preference" if any("preference" in word for word in words) else (find_run(words) or "")
        kind = "pair" if kind == "embed-smol" or "pair" in words else kind
        records = [make_record(number, kind) for number in range(24)]
        if path.suffix in (".csv", ".tsv"):
            flat = [{key: value for key, value in record.items() if isinstance(value, str)} for record in records]
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(flat[0]), delimiter="," if path.suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(flat)
        elif path.suffix == ".jsonl":
            path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        else:
            path.write_text(json.dumps(records), encoding="utf-8")


def make_record(number: int, kind: str) -> dict[str, Any]:
    """Return a record about image `number`, in the forms of conversations, captions, questions, labels and pairs."""
    shape, image = SHAPES[number % 3], f"{number}.png"
    reply = f"A {COLOURS[number % 4]} {shape}."  # twelve, so that ten can be ranked against each other
    if kind == "preference":
        wrong = SHAPES[(number + 1) % 3]
        return {"image": image, "question": "Which shape?", "chosen": reply, "rejected": f"A {wrong}."}
    if kind == "pair":
        return {"id": str(number), "query": {"text": reply}, "positive": {"image": image}}
    label = {"head-binary": ["no", "yes"][number % 2], "head-regression": number / 10}.get(kind, shape)
    turns = [{"from": "human", "value": "<image>\nWhich shape?"}, {"from": "gpt", "value": reply}]
    return {
        "id": str(number), "image": image, "file": image, "conversations": turns, "caption": reply,
        "question": "Which shape?", "answer": shape, "prompt": "Which shape?", "text": "Which shape?", "label": label,
    }  # fmt: skip


def write_base(folder: Path) -> None:
    """Write small parts, a checkpoint that has seen a few records, and an adapter on it, into a folder."""
    from vlm.demo.tiny_models import build_tiny_parts

    build_tiny_parts(folder / "parts", width=WIDTH)
    image = Image.new("RGB", (48, 48), "red")
    (folder / "images").mkdir()
    for number in range(24):
        image.save(folder / "images" / f"{number}.png")
    records = [make_record(number, "") for number in range(24)]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    data = ("dataset.path=train.json", "dataset.image_folder=images", *SHORT)
    parts = (f"model.{part}.hf_name={place}" for part, place in PARTS.items())
    _train(folder, "final", "-cn", "pretrain-smol", "dataset.template=tokenizer", *data, *parts)
    adapter = ("trainer/unfreeze=connector", "trainer/lora=language-model")
    rate = "trainer.learning_rate.language_model_learning_rate=2e-4"
    _train(folder, "adapter", "-cn", "finetune-smol", "trainer.from_pretrained=final", *adapter, rate, *data)


def _train(folder: Path, name: str, *words: str) -> None:
    """Train in a folder, and move what it ends with to `name`."""
    (done,) = run_forked(["-m", "vlm", *words, "trainer.output_dir=run"], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.move(folder / "run" / "final", folder / name)
    shutil.rmtree(folder / "run")
