"""Images of the probe: shapes at places, and rendered words. Imports Pillow only; nothing here is drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 336
"""Width and height of an image, in pixels."""
BACKGROUND = (245, 245, 245)
OUTLINE = (40, 40, 40)
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 150, 60),
    "blue": (40, 75, 215),
    "yellow": (245, 210, 30),
    "orange": (240, 130, 20),
    "purple": (130, 50, 160),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True)
class Shape:
    """A shape of one colour; `x`, `y` and `radius` are shares of the image's side."""

    name: str
    colour: str
    x: float
    y: float
    radius: float = 0.12


def draw_shapes(shapes: Sequence[Shape]) -> Image.Image:
    """Return an image of shapes on a light ground, each with a dark outline."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x, y, r = (value * SIDE for value in (shape.x, shape.y, shape.radius))
        fill = COLOURS[shape.colour]
        if shape.name == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill, OUTLINE, 3)
        elif shape.name == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill, OUTLINE, 3)
        elif shape.name == "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill, OUTLINE, 3)
        else:
            pen.polygon([(x + r * dx, y + r * dy) for dx, dy in STAR], fill, OUTLINE, 3)
    return image


def draw_text(text: str, size: int = 64) -> Image.Image:
    """Return an image with a word in the middle, `size` pixels high, in Pillow's own font."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), text, OUTLINE, font, anchor="mm")
    return image


STAR = (
    (0.0, -1.0),
    (0.26, -0.36),
    (0.95, -0.31),
    (0.43, 0.14),
    (0.59, 0.81),
    (0.0, 0.45),
    (-0.59, 0.81),
    (-0.43, 0.14),
    (-0.95, -0.31),
    (-0.26, -0.36),
)
"""The corners of a star with five points, in units of its radius."""
