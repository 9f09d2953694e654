"""Draw `assets/architecture.png`: python assets/draw_architecture.py."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK = "#1f2933"
PARTS = {
    "visual_encoder": ("#d6e6ff", "visual_encoder", "CLIP, SigLIP, DINOv2,\nany timm model"),
    "connector": ("#ffe3c2", "connector", "identity, linear, mlp,\nor your own class"),
    "language_model": ("#d5f2dc", "language_model", "any causal language model\nof transformers"),
}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc=colour, ec=INK, lw=1.2)
    axes.add_patch(style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkA": 0, "shrinkB": 0})


def part(axes: Axes, name: str, x: float, y: float, width: float, height: float) -> None:
    """A part of the model with its name and what it can be."""
    colour, title, choices = PARTS[name]
    box(axes, x, y, width, height, colour)
    axes.text(x + width / 2, y + height * 0.68, title, ha="center", va="center", fontsize=12, weight="bold", color=INK)
    axes.text(x + width / 2, y + height * 0.3, choices, ha="center", va="center", fontsize=9.5, color=INK)


def picture(axes: Axes, x: float, y: float, size: float) -> None:
    """A picture cut into patches."""
    step = size / 4
    colours = ["#8ecae6", "#8ecae6", "#ffd166", "#8ecae6", "#8ecae6", "#219ebc", "#8ecae6", "#8ecae6",
               "#90be6d", "#577590", "#577590", "#90be6d", "#90be6d", "#90be6d", "#43aa8b", "#90be6d"]  # fmt: skip
    for index, colour in enumerate(colours):
        row, column = divmod(index, 4)
        axes.add_patch(
            FancyBboxPatch((x + column * step, y + size - (row + 1) * step), step, step, boxstyle="square,pad=0",
                           fc=colour, ec="white", lw=1)
        )  # fmt: skip


def tokens(axes: Axes, x: float, y: float, row: list[tuple[str, str]]) -> None:
    """A row of tokens: (text, colour)."""
    for text, colour in row:
        width = 0.28 + 0.098 * len(text)
        box(axes, x, y, width, 0.44, colour)
        axes.text(x + width / 2, y + 0.22, text, ha="center", va="center", fontsize=9.5, family="monospace", color=INK)
        x += width + 0.1


def draw(path: Path) -> None:
    """The whole picture."""
    figure = Figure(figsize=(11, 5.4))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 5.4)
    axes.axis("off")
    picture(axes, 0.35, 0.55, 1.3)
    axes.text(1.0, 0.3, "a picture", ha="center", fontsize=10, color=INK)
    part(axes, "visual_encoder", 2.3, 0.55, 2.5, 1.3)
    part(axes, "connector", 5.5, 0.55, 2.3, 1.3)
    arrow(axes, (1.7, 1.2), (2.26, 1.2))
    arrow(axes, (4.84, 1.2), (5.46, 1.2))
    axes.text(5.15, 1.3, "features", ha="center", fontsize=8.5, color=INK)
    image, text, reply = PARTS["connector"][0], "#eef1f4", "#b7ebc0"
    tokens(axes, 2.0, 2.45, [("USER:", text), ("<image>", image), ("<image>", image), ("…", image),
                             ("What is this?", text), ("ASSISTANT:", text), ("A boat", reply), ("</s>", reply)])  # fmt: skip
    arrow(axes, (6.65, 1.9), (3.3, 2.4))
    axes.text(6.9, 2.1, "one masked scatter at the placeholders\nthat the processor wrote", fontsize=8.5, va="center", color=INK)
    axes.text(0.35, 2.67, "processor", fontsize=12, weight="bold", va="center", color=INK)
    part(axes, "language_model", 2.0, 3.3, 8.3, 0.95)
    for x in (3.5, 6.1, 8.8):
        arrow(axes, (x, 2.93), (x, 3.26))
    arrow(axes, (9.45, 4.29), (9.45, 4.66))
    axes.text(9.45, 4.85, "A boat</s>", ha="center", fontsize=11, family="monospace", color=INK)
    axes.text(9.45, 5.12, "loss: exactly the replies", ha="center", fontsize=9.5, color="#1a7f37")
    axes.text(0.35, 4.95, "Each part has its own learning rate, weight decay and freezing;\na stage is a YAML file that says which parts train, on what.",
              fontsize=10, va="center", color=INK)  # fmt: skip
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.png"))
