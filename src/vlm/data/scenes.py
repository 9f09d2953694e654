"""A generated set of scenes with captions and questions: small enough to learn in minutes, and with a test inside.

A scene is a 48 x 48 picture of 4 x 4 cells of 12 pixels, each empty or with one coloured shape. Half of the pairs of a
colour and a shape (`HELD_OUT_PAIRS`) never occur in training; every question of `heldout.json` asks about one of them,
so that a model answers well only if it reads colour and shape apart from each other. Answers are spread evenly over
every exact question text, so that a question alone says little about its answer.

Imports the standard library, numpy and Pillow only. A kind of question is a line of `KINDS`, a case of `_question` and one
of `_answer`.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 48
CELLS = 3
"""Cells in a row and in a column."""
CELL_SIZE = IMAGE_SIZE // CELLS

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 40),
    "purple": (160, 50, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
"""Quarters of the picture, by (lower half, right half)."""
NUMBERS = ("one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "place")

BACKGROUND = (128, 128, 128)
OUTLINE = (20, 20, 20)
CAPTION_PROMPT = "Describe the picture."

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
import os

HOLD = eval(os.environ.get("HOLD", "(2,)"))
HELD_OUT_PAIRS = tuple(
    (colour, shape)
    for row, colour in enumerate(COLOURS)
    for column, shape in enumerate(SHAPES)
    if (column - row) % len(SHAPES) in HOLD
)
"""Three shapes of every colour and three colours of every shape: naming the commonest one is right a third of the time."""
TRAINED_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

Pair = tuple[str, str]


@dataclass(frozen=True)
class Thing:
    """One shape in one cell."""

    colour: str
    shape: str
    row: int
    column: int

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def place(self) -> str:
        return PLACES[CELLS * self.row + self.column]


Scene = tuple[Thing, ...]
"""Its things in reading order."""


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture: every shape a little off its cell's centre, a little larger or smaller, lighter or darker."""
    fine = 4  # drawn so many times larger, then averaged: smooth edges
    picture = Image.new("RGB", (IMAGE_SIZE * fine, IMAGE_SIZE * fine), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for thing in scene:
        x = (thing.column + 0.5) * CELL_SIZE + rng.uniform(-1, 1)
        y = (thing.row + 0.5) * CELL_SIZE + rng.uniform(-1, 1)
        radius = rng.uniform(5.5, 7.0)
        shade = rng.uniform(0.85, 1.0)
        fill = tuple(round(shade * value) for value in COLOURS[thing.colour])
        _draw_shape(draw, thing.shape, x * fine, y * fine, radius * fine, fill)
    return picture.reduce(fine)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    style = {"fill": fill, "outline": OUTLINE, "width": 3}
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), **style)
    elif shape == "bar":
        draw.rectangle((x - r, y - 0.4 * r, x + r, y + 0.4 * r), **style)
    else:
        s, t = 0.85 * r, 0.33 * r
        corners = {
            "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
            "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)],
            "triangle": [(0, -r), (r, s), (-r, s)],
            "cross": [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t)]
            + [(t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)],
        }[shape]
        draw.polygon([(x + dx, y + dy) for dx, dy in corners], **style)


def caption(scene: Scene, rng) -> str:
    raster = [f"{thing.place} {thing.colour} {thing.shape}" for thing in scene]
    mode = os.environ.get("MODE")
    if mode:
        P = float(os.environ.get("P", "0.5"))
        out = [f"{t.colour} {t.shape} {t.place}" if rng.random() < P else f"{t.place} {t.colour} {t.shape}" for t in scene]
        if mode == "once": rng.shuffle(out)
        if mode == "sorted": out.sort()
        if os.environ.get("CNT"):
            cnt = [f"{c} {NUMBERS[min(n, 4)-1]}" for c in COLOURS if (n := sum(t.colour == c for t in scene))]
            rng.shuffle(cnt); out = cnt + out
        return ", ".join(out)
    K = int(os.environ.get("K", "4"))
    KC = int(os.environ.get("KC", "1"))
    clauses = list(raster) * int(os.environ.get("KR", "1"))
    for i, name in enumerate(("colour", "shape")[:int(os.environ.get("KK", "2"))]):
        for v in sorted({getattr(t, name) for t in scene}):
            same = [t for t in scene if getattr(t, name) == v]
            noun = v + " thing" if name == "colour" else v
            if len(same) == 1:
                clauses.append(f"{noun} {same[0].place}")
            if len(same) <= 4 and KC:
                clauses.append(f"{noun}s {NUMBERS[len(same) - 1]}")
    rng.shuffle(clauses)
    return ", ".join(clauses[:K] + (raster if int(os.environ.get("R", "1")) else []))


def questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one answer in this scene."""
    found = [question_about(scene, thing, kind) for thing in scene for kind in KINDS for _ in (0,)]
    extra = [question_about(scene, thing, kind, by_shape=True) for thing in scene for kind in ("count", "place")]
    return list(dict.fromkeys(q for q in found + extra if q))


def question_about(scene: Scene, thing: Thing, kind: str, by_shape: bool = False) -> Question | None:
    """The question of this kind about this thing, or None where it would be ambiguous."""
    if kind in ("colour", "shape"):
        if sum(t.place == thing.place for t in scene) > 1:
            return None
        return Question(kind, f"What {kind} is in the {thing.place}?", getattr(thing, kind))
    name = f"{thing.shape}" if by_shape else f"{thing.colour} thing"
    same = sum(t.shape == thing.shape for t in scene) if by_shape else sum(t.colour == thing.colour for t in scene)
    if kind == "count":
        return Question(kind, f"How many {name}s are there?", NUMBERS[same - 1]) if same <= len(NUMBERS) else None
    return Question(kind, f"Where is the {name}?", thing.place) if same == 1 else None


def make_scene(rng: random.Random, kind: str, pair: Pair, answer: int, by_shape: bool = False):
    """(scene, thing): a scene in which a question of `kind` about `thing` of `pair` has one answer.

    `answer` spreads the answers evenly: the number of such things for `count`, the quarter for the other kinds.
    """
    number = 1 + answer % len(NUMBERS) if kind == "count" else 1
    cells = rng.sample([(row, column) for row in range(CELLS) for column in range(CELLS)], CELLS * CELLS)
    if kind != "count":
        wanted = PLACES[answer % len(PLACES)]
        cells.sort(key=lambda cell: Thing(*pair, *cell).place != wanted)
    asked = [Thing(*pair, *cells.pop(0)) for _ in range(number)]
    others = [other for other in TRAINED_PAIRS if other != pair]
    if kind in ("count", "place"):
        others = [other for other in others if other[by_shape] != pair[by_shape]]
    else:
        cells = [cell for cell in cells if Thing(*pair, *cell).place != wanted]
    rng.shuffle(cells)
    things = list(asked)
    total = rng.randint(4, 7)
    while len(things) < total and cells:
        things.append(Thing(*rng.choice(others), *cells.pop()))
    return tuple(sorted(things, key=lambda thing: (thing.row, thing.column))), asked[0]
