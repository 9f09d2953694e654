"""Draw `assets/paths.png`, the figure of docs/architecture.md: python assets/draw_paths.py."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, FAINT = "#22303c", "#5b6b78"
ROWS = (
    ("A record becomes a loss", "#d9f0dc", (
        ("record", "JSON, Parquet,\ntar, Hub", "data/records/open.py"),
        ("Sample", "a reader of its\nformat", "data/records/formats.py"),
        ("ids and labels", "the replies are\nsupervised", "data/encoding/labels.py"),
        ("images", "decoded, cut\ninto views", "data/vision/images.py"),
        ("batch", "padded or\npacked", "data/batching/collator.py"),
        ("logits", "features take the\nplaceholders' place", "models/modeling_vlm.py"),
        ("loss", "at supervised\npositions", "train/objectives/generation.py"),
    )),
    ("A configuration becomes an optimiser", "#dbe8fb", (
        ("command line", "YAML and\noverrides", "cli/train.py"),
        ("RunConfig", "composed, keys\nchecked", "checks/compose.py"),
        ("refusals", "fields against\neach other", "checks/run.py"),
        ("model config,\nprocessor", "without weights", "assembly/resolve.py"),
        ("model", "weights loaded,\nheads attached", "assembly/compose.py"),
        ("parts", "what trains, at\nwhich rate", "train/parts.py"),
        ("optimiser", "a group for each\npart and decay", "train/optimizers.py"),
    )),
    ("A checkpoint becomes an answer", "#fde3c4", (
        ("folder or\nHub name", "final/ of a run", "cli/generate.py"),
        ("Checkpoint", "its kind, config,\nprocessor", "assembly/checkpoint.py"),
        ("model", "on its base where\nit is an adapter", "assembly/adapter_folder.py"),
        ("prompt", "the template of\ntraining", "data/encoding/prompts.py"),
        ("inputs", "as in training,\npadded on the left", "inference/batch.py"),
        ("ids", "greedy, sampled\nor beams", "inference/generate.py"),
        ("answer", "file, chat, page,\nendpoint, metrics", "evaluation/records.py"),
    )),
)  # fmt: skip
"""Title, colour and steps of each row; a step has its name, what happens, and the file where it happens."""

WIDTH, HEIGHT, GAP = 1.78, 1.35, 0.3
"""Of a box, and between two boxes, in inches."""


def draw_step(axes: Axes, x: float, y: float, colour: str, step: tuple[str, str, str]) -> None:
    """Draw one step as a box with its lower left corner at (x, y)."""
    name, action, path = step
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=style, facecolor=colour, edgecolor=INK, lw=1.1))
    middle = x + WIDTH / 2
    axes.text(middle, y + 1.02, name, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    axes.text(middle, y + 0.5, action, ha="center", va="center", fontsize=9, color=INK)
    axes.text(middle, y - 0.17, path, ha="center", va="center", fontsize=7.2, family="monospace", color=FAINT)


def draw(path: Path) -> None:
    """Draw the figure and write it to `path`."""
    width = 0.6 + len(ROWS[0][2]) * (WIDTH + GAP)
    figure = Figure(figsize=(width, 7.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, 7.2))
    axes.axis("off")
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    for row, (title, colour, steps) in enumerate(ROWS):
        y = 5.05 - row * 2.35
        axes.text(0.4, y + HEIGHT + 0.28, title, fontsize=13, weight="bold", color=INK, va="center")
        for column, step in enumerate(steps):
            x = 0.4 + column * (WIDTH + GAP)
            draw_step(axes, x, y, colour, step)
            if column:
                axes.annotate("", (x, y + HEIGHT / 2), (x - GAP, y + HEIGHT / 2), arrowprops=arrow)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("paths.png"))
