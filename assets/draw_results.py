"""Draw `assets/results.png`, the figure of the README, from what `make demo` left: python assets/draw_results.py.

On the left are the training losses of both stages. On the right are held-out questions, the first and the middle one of
each kind, with the answers of the finetuned model.
"""

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from vlm.config.schema import InferenceConfig
from vlm.demo.main import get_answer, get_question
from vlm.inference.generate import VisionLanguageModel, user_turn

ROWS = 2
KINDS = ("colour", "shape", "count", "place")
"""The kinds of questions: a column each."""

RIGHT, WRONG, FAINT = "#1a7f37", "#b3261e", "#5b6b78"


def draw(demo: Path, path: Path) -> None:
    """Draw the figure of the demo in the folder `demo`, and write it to `path`."""
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4, 8.5))
    draw_losses(left.subplots(2, 1), demo)
    draw_answers(right, demo)
    figure.savefig(path, dpi=100)


def draw_losses(axes: list[Axes], demo: Path) -> None:
    """Draw the training loss of each stage."""
    stages = (("pretrain", "1: captions"), ("finetune", "2: questions"))
    for axis, (stage, title) in zip(axes, stages, strict=True):
        lines = [json.loads(line) for line in (demo / stage / "metrics.jsonl").read_text().splitlines()]
        points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        axis.plot(*zip(*points, strict=True), color="#3b6fd4")
        axis.set_title(f"Stage {title}", fontsize=10, loc="left")
        axis.set(ylabel="loss", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")


def draw_answers(figure: SubFigure, demo: Path) -> None:
    """Ask the finetuned model about held-out images, and draw these with its answers; wrong ones are red."""
    records = json.loads((demo / "data" / "heldout.json").read_text())
    by_kind = [[record for record in records if record["kind"] == kind] for kind in KINDS]
    chosen = [group[len(group) * row // ROWS] for row in range(ROWS) for group in by_kind]
    images = [Image.open(demo / "data" / "images" / record["image"]) for record in chosen]
    model = VisionLanguageModel.load(demo / "finetune" / "final", device="cpu")
    turns = [[user_turn(get_question(record), 1)] for record in chosen]
    answers = model.answer(turns, [[image] for image in images], InferenceConfig(max_new_tokens=8))
    axes = figure.subplots(ROWS, len(KINDS)).ravel()
    for axis, record, image, answer in zip(axes, chosen, images, answers, strict=True):
        truth, said = get_answer(record), answer.strip()
        axis.imshow(image, interpolation="nearest")
        axis.set_title(get_question(record).replace("<image>", "").strip(), fontsize=8.5, color=FAINT, wrap=True)
        note = said if said == truth else f"{said} (correct: {truth})"
        axis.set_xlabel(note, fontsize=12, weight="bold", color=RIGHT if said == truth else WRONG)
        axis.set(xticks=[], yticks=[])


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")
    draw(folder, Path(__file__).with_name("results.png"))
