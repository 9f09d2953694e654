"""Draws objects onto images: boxes, points and labels, true ones in green and those of an answer in red."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vlm.data.objects import BOX, POINT, SPAN, MarkedObject
from vlm.models.pixels import as_rgb

TRUE_COLOUR, ANSWER_COLOUR = (0, 140, 60), (215, 30, 30)
SHORTEST_SIDE, LONGEST_SIDE = 320, 768
"""Minimum length of the longer side of a drawn image in pixels; smaller images are enlarged."""


def draw_objects(
    image: Image.Image, true: Sequence[MarkedObject] = (), answered: Sequence[MarkedObject] = ()
) -> Image.Image:
    """Return a copy of an image in RGB, upright, with objects drawn onto it; time spans are left out.

    Args:
        image: an image as it was opened, or a frame.
        true: true objects of this image, in pixels of the image turned upright.
        answered: those of an answer.
    """
    drawn = as_rgb(image)
    longer = max(drawn.size)
    scale = min(max(longer, SHORTEST_SIDE), LONGEST_SIDE) / longer
    size = max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))
    drawn = drawn.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(drawn)
    for colour, objects in ((TRUE_COLOUR, true), (ANSWER_COLOUR, answered)):
        for marked in objects:
            _draw(canvas, marked, scale, colour)
    return drawn


def objects_of_image(objects: Sequence[MarkedObject], image: int) -> list[MarkedObject]:
    """Return the boxes and points of an image, by its number."""
    return [marked for marked in objects if marked.kind in (BOX, POINT) and marked.medium == image]


def describe_objects(objects: Sequence[MarkedObject]) -> list[str]:
    """Return each object as text, such as `cat [10, 20, 30, 40]`."""
    return [
        " ".join(
            filter(None, [marked.label, f"[{', '.join(f'{value:.4g}' for value in marked.values)}]", _unit(marked)])
        )
        for marked in objects
        if marked.values
    ]


def _unit(marked: MarkedObject) -> str:
    return "seconds" if marked.kind == SPAN else ""


def _draw(canvas: ImageDraw.ImageDraw, marked: MarkedObject, scale: float, colour: tuple[int, int, int]) -> None:
    values = [value * scale for value in marked.values]
    if marked.kind == BOX:
        canvas.rectangle(values, outline=colour, width=2)
        corner = values[0], values[1]
    elif marked.kind == POINT:
        x, y = values
        canvas.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline=(255, 255, 255))
        corner = x + 5, y - 5
    else:
        return
    if marked.label:
        font = ImageFont.load_default(12)
        left, top, right, bottom = canvas.textbbox(corner, marked.label, font=font)
        canvas.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colour)
        canvas.text(corner, marked.label, fill=(255, 255, 255), font=font)
