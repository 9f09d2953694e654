"""Draw `assets/architecture.png`: python assets/draw_architecture.py."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, FAINT = "#22303c", "#66788a"
BLUE, ORANGE, GREEN, GREY = "#dbe8fb", "#fde3c4", "#d9f0dc", "#eef1f4"
IMAGE_TOKEN, REPLY_TOKEN = "#fbd3a2", "#aee0b5"
FROZEN, TRAINED = "#ffffff", "#ffd65c"
SIZE = (13.2, 6.5)
ROW = 3.0
"""Height at which the tokens stand."""

TOKENS = (
    ("USER:", GREY, 0.95), ("img", IMAGE_TOKEN, 0.62), ("img", IMAGE_TOKEN, 0.62), ("…", IMAGE_TOKEN, 0.62),
    ("img", IMAGE_TOKEN, 0.62), ("What is this?", GREY, 1.6), ("ASSISTANT:", GREY, 1.32),
    ("A red boat", REPLY_TOKEN, 1.3), ("</s>", REPLY_TOKEN, 0.72),
)  # fmt: skip
"""Text, colour and width of each."""

SCENE = ("sssssssy", "skksrsss", "ssssrrss", "ssssrrrs", "ssssrsss", "wddddddw", "wwddddww", "wwwwwwww")
COLOURS = {"s": "#a9d6f5", "k": "#e6f2fb", "y": "#ffd65c", "r": "#e4572e", "w": "#3f88c5", "d": "#7a4a2b"}
"""A boat, in 8 x 8 pixels."""


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, corner: float = 0.1) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style = f"round,pad=0,rounding_size={corner}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, lw=1.1))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from start to end."""
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", end, start, arrowprops=style)


def words(axes: Axes, x: float, y: float, text: str, size: float = 10, **style: str) -> None:
    """Text, centred unless `ha` says otherwise."""
    axes.text(x, y, text, fontsize=size, **{"ha": "center", "va": "center", "color": INK, **style})


def part(axes: Axes, x: float, y: float, width: float, name: str, choices: str, colour: str, rates: str) -> None:
    """A part of the model: its name, what it can be, and its learning rate in each of the two stages."""
    box(axes, x, y, width, 1.55, colour)
    middle = x + width / 2
    words(axes, middle, y + 1.24, name, 13, weight="bold")
    words(axes, middle, y + 0.84, choices, 9.5)
    for number, (stage, rate) in enumerate(zip(("pretrain", "finetune"), rates.split(), strict=True)):
        left = middle + (number - 1) * 1.22 + 0.04
        box(axes, left, y + 0.14, 1.14, 0.42, FROZEN if rate == "frozen" else TRAINED, 0.08)
        words(axes, left + 0.57, y + 0.45, stage, 7, color=FAINT)
        words(axes, left + 0.57, y + 0.27, rate, 8.5)


def scene(axes: Axes, x: float, y: float, size: float) -> None:
    """Draw the small scene that stands for an image."""
    step = size / len(SCENE)
    for row, line in enumerate(SCENE):
        for column, letter in enumerate(line):
            corner = (x + column * step, y + size - (row + 1) * step)
            axes.add_patch(Rectangle(corner, step, step, facecolor=COLOURS[letter], edgecolor="white", lw=0.4))


def tokens(axes: Axes, x: float) -> list[float]:
    """The row of tokens, from x on; returns their middles."""
    middles = []
    for text, colour, width in TOKENS:
        box(axes, x, ROW, width, 0.46, colour, 0.06)
        words(axes, x + width / 2, ROW + 0.22, text, 9.5, family="monospace")
        middles.append(x + width / 2)
        x += width + 0.085
    return middles


def draw(path: Path) -> None:
    """Draw the figure and write it to `path`."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, SIZE[0])
    axes.set_ylim(0, SIZE[1])
    axes.axis("off")

    scene(axes, 0.35, 0.62, 1.3)
    words(axes, 1.0, 0.38, "image")
    part(axes, 2.15, 0.5, 2.75, "visual_encoder", "CLIP, SigLIP, DINOv2, timm", BLUE, "frozen frozen")
    part(axes, 5.55, 0.5, 2.75, "connector", "mlp, linear, or a class of yours", ORANGE, "1e-3 2e-5")
    box(axes, 9.0, 0.5, 3.83, 1.55, "white")
    words(axes, 10.92, 1.74, "processor", 13, weight="bold")
    words(axes, 10.92, 1.34, "renders the chat template", 9.5)
    words(axes, 10.92, 0.8, "the same in training and generation,\nand saved with the model", 9, color=FAINT)
    arrow(axes, (1.75, 1.27), (2.1, 1.27))
    arrow(axes, (4.95, 1.27), (5.5, 1.27))
    words(axes, 5.22, 1.45, "features", 8)

    middles = tokens(axes, 3.75)
    first, last = middles[1] - 0.31, middles[4] + 0.31
    axes.plot([first, first, last, last], [ROW - 0.08, ROW - 0.2, ROW - 0.2, ROW - 0.08], color=INK, lw=1.2)
    arrow(axes, (6.2, 2.1), (6.2, ROW - 0.22))
    words(axes, 6.32, 2.42, "features take the placeholders' place", 8.5, ha="left")
    arrow(axes, (middles[7], 2.1), (middles[7], ROW - 0.06))
    words(axes, middles[7] + 0.12, 2.42, "writes every token", 8.5, ha="left")

    part(axes, 3.75, 4.0, 9.08, "language_model", "any causal language model of transformers", GREEN, "frozen 2e-5")
    for middle in middles:
        arrow(axes, (middle, ROW + 0.5), (middle, 3.96))
    for source, target in ((6, 7), (7, 8)):
        text, colour, width = TOKENS[target]
        arrow(axes, (middles[source], 5.58), (middles[source], 5.86))
        box(axes, middles[source] - width / 2, 5.88, width, 0.4, colour, 0.06)
        words(axes, middles[source], 6.08, text, 9.5, family="monospace")
    words(axes, 8.85, 6.08, "the loss is on exactly the replies", 10, ha="right", color="#2a7d3b")

    words(axes, 0.35, 5.95, "Three parts, each with its own", 10.5, ha="left")
    words(axes, 0.35, 5.66, "learning rate, weight decay and freezing.", 10.5, ha="left")
    words(axes, 0.35, 5.1, "A stage is a YAML file;", 10.5, ha="left")
    words(axes, 0.35, 4.81, "here LLaVA-1.5's two:", 10.5, ha="left")
    for y, colour, text in ((4.3, TRAINED, "trains, at this rate"), (3.85, FROZEN, "does not train")):
        box(axes, 0.37, y, 0.45, 0.28, colour, 0.06)
        words(axes, 0.97, y + 0.14, text, 9.5, ha="left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.png"))
