"""Distil a small model: python examples/distil.py [FOLDER] [--steps N] [--wrong SHARE] [--seed N].

Trains a teacher on the demo's generated scenes, then trains the same smaller model (a quarter of the size) twice for
the same number of steps: once on the labels alone, once on the teacher's probabilities. Some of the students' labels
are wrong, as in data that many people label. `summary.json` says how far each student is from the teacher on held-out
scenes. This takes a few minutes on two cores, without a network.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import load_dataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.demo.scenes import write_scenes
from vlm.demo.tiny_models import build_tiny_parts
from vlm.inference.generate import VisionLanguageModel, on_device

NUM_SCENES = 4000
STUDENT_WIDTH = 64
"""Hidden size of the students; the teacher's is 128."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train a teacher and two students, and write how far the students are from the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/distil"))
    parser.add_argument("--steps", type=int, default=400, help="steps of each student's second stage (%(default)s)")
    parser.add_argument(
        "--wrong", type=float, default=0.3, help="share of the students' labels that are wrong (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the students' second stages (%(default)s)")
    args = parser.parse_args(argv)
    folder: Path = args.folder
    write_scenes(folder / "data", num_train=NUM_SCENES, num_val=200, num_heldout=400)
    build_tiny_parts(folder / "parts-teacher")
    build_tiny_parts(folder / "parts-student", width=STUDENT_WIDTH)
    teacher = train(folder, "teacher", "finetune", [f"trainer.from_pretrained={train(folder, 'teacher', 'pretrain')}"])
    start = f"trainer.from_pretrained={train(folder, 'student', 'pretrain')}"
    records = write_wrong_answers(folder / "data", args.wrong)
    steps = [start, f"trainer.max_steps={args.steps}", f"trainer.seed={args.seed}", f"dataset.path={records}"]
    by_labels = train(folder, "student", "finetune", steps, "by-labels")
    distillation = [
        "trainer.objective=distillation", f"trainer.distillation.teacher={teacher}",
        "trainer.distillation.label_weight=0",
    ]  # fmt: skip
    by_teacher = train(folder, "student", "finetune", [*steps, *distillation], "by-teacher")
    summary = summarise(teacher, {"by_labels": by_labels, "by_teacher": by_teacher}, folder / "data")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


def write_wrong_answers(data: Path, share: float) -> Path:
    """Write the finetuning records with some answers replaced by other answers to the same question.

    `share` is the probability that an answer is replaced.
    """
    records = json.loads((data / "finetune.json").read_text(encoding="utf-8"))
    draw = random.Random(0)
    answers: dict[str, list[dict[str, str]]] = {}
    for record in records:
        turns = record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            answers.setdefault(question["value"].removeprefix("<image>\n"), []).append(answer)
    for same in answers.values():
        words = sorted({answer["value"] for answer in same})
        for answer in same:
            if draw.random() < share and len(words) > 1:
                answer["value"] = draw.choice([word for word in words if word != answer["value"]])
    (data / "finetune-wrong.json").write_text(json.dumps(records), encoding="utf-8")
    return data / "finetune-wrong.json"


def train(folder: Path, size: str, stage: str, overrides: Sequence[str] = (), name: str | None = None) -> Path:
    """Run a stage of the demo on the parts of one size; return the finished model."""
    output = folder / (name or f"{size}-{stage}")
    parts, data = folder / f"parts-{size}", folder / "data"
    words = [
        f"model.visual_encoder.hf_name={parts / 'visual_encoder'}",
        f"model.language_model.hf_name={parts / 'language_model'}", f"dataset.path={data / f'{stage}.json'}",
        f"dataset.image_folder={data / 'images'}", f"trainer.output_dir={output}", *overrides,
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "vlm", "-cn", f"demo-{stage}", *words], check=True, env=os.environ)
    return output / "final"


def summarise(teacher: Path, students: dict[str, Path], data: Path) -> dict[str, dict[str, float]]:
    """Return the size, loss and distance from the teacher of each model, measured on held-out scenes."""
    reference, labels = supervised_logits(teacher, data)
    summary = {"teacher": describe(teacher, reference, labels, reference)}
    for name, student in students.items():
        summary[name] = describe(student, supervised_logits(student, data)[0], labels, reference)
    return summary


def describe(checkpoint: Path, logits: Tensor, labels: Tensor, reference: Tensor) -> dict[str, float]:
    """Return a model's size, loss, KL(teacher | model), and how often its likeliest token is the teacher's."""
    own, teachers = logits.log_softmax(-1), reference.log_softmax(-1)
    return {
        "parameters": sum(p.numel() for p in VisionLanguageModel.load(checkpoint, device="cpu").model.parameters()),
        "loss": -own.gather(1, labels[:, None]).mean().item(),
        "divergence": (teachers.exp() * (teachers - own)).sum(-1).mean().item(),
        "agreement": (own.argmax(-1) == teachers.argmax(-1)).float().mean().item(),
        "accuracy": (own.argmax(-1) == labels).float().mean().item(),
    }


@torch.no_grad()
def supervised_logits(checkpoint: Path, data: Path) -> tuple[Tensor, Tensor]:
    """Return a model's logits at the answer tokens of held-out scenes, `(S, vocabulary)`, and the token ids, `(S,)`."""
    asked = VisionLanguageModel.load(checkpoint, device="cpu")
    config = DatasetConfig(path=str(data / "heldout.json"), image_folder=str(data / "images"))
    dataset = load_dataset(config, SampleEncoder(asked.processor, NO_LIMIT, truncate=False))
    collate, logits, ids = Collator.of(asked.processor), [], []
    for start in range(0, len(dataset), 50):
        batch = collate([dataset[index] for index in range(start, min(start + 50, len(dataset)))])
        labels = batch["labels"][:, 1:]
        is_supervised = labels != IGNORE_INDEX
        logits.append(
            asked.model(**on_device(batch, asked.processor, torch.device("cpu"))).logits[:, :-1][is_supervised]
        )
        ids.append(labels[is_supervised])
    return torch.cat(logits), torch.cat(ids)


if __name__ == "__main__":
    main()
