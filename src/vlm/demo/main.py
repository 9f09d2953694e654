"""`make demo`: trains a small model from scratch, on a CPU and without a network, in a few minutes.

Generates scenes and small untrained parts, pretrains and finetunes through `python -m vlm`, measures how well a model
answers questions about combinations of colour and shape that never occur in training, and trains a head on it that
predicts the shape.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from vlm.clusters.processes import ProcessGroup
from vlm.config.schema import InferenceConfig
from vlm.config.shown import PresentableParser
from vlm.demo.scenes import Record, write_scenes
from vlm.demo.tiny_models import build_tiny_parts
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn

BATCH_SIZE = 100
NUM_GRID_IMAGES = 16
"""Number of questions shown in the grid."""

Summary = dict[str, Any]
"""The content of `summary.json`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Generate data, train, evaluate, and print a report."""
    parser = PresentableParser("vlm.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("overrides", nargs="*", help="for all stages, such as trainer.max_steps=2")
    args = parser.parse_args(argv)
    started = time.monotonic()
    folder: Path = args.output
    for stage in ("pretrain", "finetune", "head"):  # remove results of an earlier demo
        shutil.rmtree(folder / stage, ignore_errors=True)
    print(f"1/5  Drawing scenes and building small untrained parts in {folder}", flush=True)
    write_scenes(folder / "data")
    build_tiny_parts(folder / "parts")
    print("2/5  Pretraining on captions", flush=True)
    pretrained = train("demo-pretrain", folder, "pretrain.json", args.overrides)
    print("3/5  Finetuning on questions", flush=True)
    final = train("demo-finetune", folder, "finetune.json", [f"trainer.from_pretrained={pretrained}", *args.overrides])
    print("4/5  Asking about pairs of colour and shape that training never showed together", flush=True)
    records: list[Record] = json.loads((folder / "data" / "heldout.json").read_text(encoding="utf-8"))
    summary = evaluate_model(final, records, folder)
    print("5/5  Training a prediction head that tells the shape", flush=True)
    heldout = f"dataset.test_path={folder / 'data' / 'labelled-heldout.json'}"
    head = train("demo-head", folder, "labelled.json", [f"trainer.from_pretrained={final}", heldout, *args.overrides])
    results = json.loads((head.parent / "scores.json").read_text(encoding="utf-8"))["test"]["label"]
    summary["head"] = {
        "accuracy": results["scores"]["accuracy"],
        "majority_accuracy": results["baseline"]["accuracy"],
        "records": results["records"],
    }
    summary["seconds"] = round(time.monotonic() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(format_report(summary, records[0], final, head, folder))


def train(stage: str, folder: Path, records: str, overrides: Iterable[str]) -> Path:
    """Run a stage through `python -m vlm`; return the folder of its complete model."""
    output = folder / stage.removeprefix("demo-")
    keys = {
        "model.visual_encoder.hf_name": folder / "parts" / "visual_encoder",
        "model.language_model.hf_name": folder / "parts" / "language_model",
        "dataset.path": folder / "data" / records,
        "dataset.image_folder": folder / "data" / "images",
        "trainer.output_dir": output,
    }
    settings = [f"{key}={value}" for key, value in keys.items()]
    code = ProcessGroup().run([sys.executable, "-m", "vlm", "-cn", stage, *settings, *overrides], [os.environ])
    if code:
        sys.exit(code)  # the run has said why
    return output / "final"


def evaluate_model(checkpoint: Path, records: list[Record], folder: Path) -> Summary:
    """Return accuracies on the held-out questions, with and without images, and draw the grid of images."""
    model = VisionLanguageModel.load(checkpoint, device="cpu")
    images: list[Image.Image] = [Image.open(folder / "data" / "images" / record["image"]) for record in records]
    colour = tuple(int(mean * 255) for mean in model.processor.image_processor.image_mean)
    blanks = [Image.new("RGB", image.size, colour) for image in images]
    answers = answer_questions(model, records, images, "answering")
    blank_answers = answer_questions(model, records, blanks, "answering about blank images")
    draw_grid(records, images, answers, folder / "heldout.png")
    by_kind, blank = accuracy(records, answers), accuracy(records, blank_answers)
    constant = constant_answer_accuracy(records)
    text_only = {kind: max(blank[kind], constant[kind]) for kind in by_kind}
    return {
        "accuracy": by_kind.pop("all"),
        "accuracy_by_kind": by_kind,
        "text_only_accuracy": text_only.pop("all"),
        "text_only_accuracy_by_kind": text_only,
        "blank_picture_accuracy": blank["all"],
        "constant_answer_accuracy": constant["all"],
        "questions": len(records),
    }


def answer_questions(
    model: VisionLanguageModel, records: list[Record], images: list[Image.Image], progress_label: str
) -> list[str]:
    """Return the model's answers to all questions."""
    settings = InferenceConfig(max_new_tokens=8)
    answers = []
    for start in tqdm(range(0, len(records), BATCH_SIZE), progress_label):
        part = slice(start, start + BATCH_SIZE)
        turns = [[user_turn(get_question(record), 1)] for record in records[part]]
        answers += model.answer(turns, [[image] for image in images[part]], settings)
    return answers


def get_question(record: Record) -> str:
    """Return a record's question, with its placeholder."""
    return record["conversations"][0]["value"]


def get_answer(record: Record) -> str:
    """Return a record's correct answer."""
    return record["conversations"][1]["value"]


def accuracy(records: list[Record], answers: list[str]) -> dict[str, float]:
    """Return the share of correct answers, by kind of question and over `all`."""
    correct: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        for key in (record["kind"], "all"):
            correct[key].append(answer.strip() == get_answer(record))
    return {key: round(sum(values) / len(values), 4) for key, values in correct.items()}


def constant_answer_accuracy(records: list[Record]) -> dict[str, float]:
    """Return the accuracy of always giving the most common answer to each question: all that text alone allows."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        answers[get_question(record)][get_answer(record)] += 1
    return accuracy(records, [answers[get_question(record)].most_common(1)[0][0] for record in records])


def draw_grid(records: list[Record], images: list[Image.Image], answers: list[str], path: Path) -> None:
    """Draw held-out images of all kinds with their questions and answers; wrong answers are red."""
    step = max(len(records) // NUM_GRID_IMAGES, 1)
    figure = Figure(figsize=(11, 12), layout="constrained")
    axes = figure.subplots(4, NUM_GRID_IMAGES // 4).ravel()
    for axis, index in zip(axes, range(0, len(records), step), strict=False):
        correct = answers[index].strip() == get_answer(records[index])
        text = get_question(records[index]).replace("<image>", "").strip()
        axis.imshow(images[index], interpolation="nearest")
        axis.set_title(text, fontsize=9, wrap=True)
        note = answers[index] if correct else f"{answers[index]} (it is {get_answer(records[index])})"
        axis.set_xlabel(note, color="green" if correct else "red", fontsize=11)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def format_report(summary: Summary, example: Record, checkpoint: Path, head: Path, folder: Path) -> str:
    """Return the text that the demo prints at its end."""
    lines = [f"\nHeld-out accuracy {summary['accuracy']:.1%}, from the text alone {summary['text_only_accuracy']:.1%}"]
    for kind, value in summary["accuracy_by_kind"].items():
        lines.append(f"  {kind:<10} {value:7.1%}   text alone {summary['text_only_accuracy_by_kind'][kind]:7.1%}")
    shape = summary["head"]
    low, value, high = (shape["accuracy"][name] for name in ("low", "value", "high"))
    lines.append(
        f"\nThe head tells the shape of {value:.1%} [{low:.1%}, {high:.1%}] of held-out pairs, the most common "
        f"shape would be right for {shape['majority_accuracy']['value']:.1%}; plots: {head.parent / 'scores'}"
    )
    image, text = folder / "data" / "images" / example["image"], get_question(example).replace("<image>", "").strip()
    lines += [
        f"\n{summary['seconds']:.0f} seconds. Figures: {folder / 'summary.json'}; images: {folder / 'heldout.png'}",
        f"Ask it yourself:\n  vlm generate {checkpoint} --image {image} --prompt '{text}'",
        f"  vlm predict {head} --image {image} --prompt 'What shape are they?'",
    ]
    return "\n".join(lines)
