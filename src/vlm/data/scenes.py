"""A generated set of scenes with captions and questions: small enough to learn in minutes, with a test inside.

A scene is a picture of 4 x 4 cells; up to four coloured shapes lie in the cells of one of its corners. No two things of
a scene share a colour or a shape, so that either names the thing. Some pairs of colour and shape (`HELD_OUT_PAIRS`)
never occur in training, and every scene of `heldout.json` has one of them.

Captions are dense. Half of them go through all cells, first for colours and then for shapes, which teaches to see each
on its own. The others answer questions, one about each thing: what stands in the text already would be copied from
there instead of being seen.

Imports the standard library and Pillow only.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

CELLS = 4
CELL = 12
"""Cells in a row, and pixels in a cell's side; a patch of the tiny encoder is one cell."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "pink": (250, 130, 200),
    "white": (250, 250, 250),
}
SHAPES = ("square", "triangle", "cross", "circle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "place")
HELD_OUT_PAIRS = frozenset(zip(COLOURS, SHAPES, strict=False))
"""Red squares, green triangles, blue crosses and yellow circles."""
BACKGROUND = (128, 128, 128)
CAPTION_PROMPT = "<image>\nDescribe the picture."
ASKED_ABOUT_HELD_OUT = 0.25
"""Share of the held-out questions about a thing that ask about the held-out pair itself, the others about what stands
beside it; with more, always giving the held-out colour would be right too often."""


@dataclass(frozen=True)
class Thing:
    """One shape in one cell."""

    colour: str
    shape: str
    row: int
    column: int

    @property
    def place(self) -> str:
        """The corner of the picture that it lies in."""
        return PLACES[2 * (self.row >= CELLS // 2) + (self.column >= CELLS // 2)]

    @property
    def held_out(self) -> bool:
        """Whether its pair of colour and shape never occurs in training."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


def random_scene(rng: random.Random, number: int, *, held_out: bool) -> list[Thing]:
    """So many things in one corner, in reading order; one of them is a held-out pair, or none."""
    half = CELLS // 2
    top, left = rng.choice((0, half)), rng.choice((0, half))
    cells = [(top + cell // half, left + cell % half) for cell in rng.sample(range(half * half), number)]
    while True:
        pairs = list(zip(rng.sample(list(COLOURS), number), rng.sample(SHAPES, number), strict=True))
        if sum(pair in HELD_OUT_PAIRS for pair in pairs) == held_out:
            things = [Thing(*pair, *cell) for pair, cell in zip(pairs, cells, strict=True)]
            return sorted(things, key=lambda thing: (thing.row, thing.column))


def draw(things: list[Thing], rng: random.Random) -> Image.Image:
    """The picture: every shape a little off its cell's centre, a little lighter or darker."""
    fine = 4  # drawn so many times larger and averaged, for smooth edges
    image = Image.new("RGB", (CELLS * CELL * fine, CELLS * CELL * fine), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y = ((index + 0.5) * CELL + rng.uniform(-0.5, 0.5) for index in (thing.column, thing.row))
        shade = rng.uniform(0.85, 1.0)
        draw_shape(pen, thing.shape, x * fine, y * fine, 5 * fine, tuple(int(c * shade) for c in COLOURS[thing.colour]))
    return image.reduce(fine)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
    """A shape of radius `r` around (x, y) with a black outline, which is the same whatever its colour."""
    style: dict[str, Any] = {"fill": colour, "outline": (0, 0, 0), "width": int(r * 0.3)}
    third = r / 3
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), **style)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), **style)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], **style)
    else:
        quarter = [(third, -r), (third, -third), (r, -third)]
        corners = [(sx * a, sy * b) for sx, sy in ((1, 1), (1, -1), (-1, -1), (-1, 1)) for a, b in quarter]
        right, below, left, above = corners[:3], corners[3:6][::-1], corners[6:9], corners[9:][::-1]
        pen.polygon([(x + a, y + b) for a, b in [*right, *below, *left, *above]], **style)


def caption(things: list[Thing], rng: random.Random) -> str:
    """What a picture shows: the content of all its cells, or answers about all of it and each thing."""
    if rng.random() < 0.5:
        return cells_caption(things)
    of_all = [(question, answer) for _, thing, question, answer in questions(things) if thing is None]
    return " ".join(f"{question} {answer}." for question, answer in [*of_all, *once_each(things, rng)])


def cells_caption(things: list[Thing]) -> str:
    """The colour of every cell in reading order, then the shape of every cell."""
    at = {(thing.row, thing.column): thing for thing in things}
    cells = [at.get(divmod(cell, CELLS)) for cell in range(CELLS * CELLS)]
    colours = " ".join(thing.colour if thing else "none" for thing in cells)
    shapes = " ".join(thing.shape if thing else "none" for thing in cells)
    return f"colours {colours}. shapes {shapes}."


def once_each(things: list[Thing], rng: random.Random) -> list[tuple[str, str]]:
    """One question about each thing, for its colour or for its shape: neither is told by another answer."""
    return [(question, answer) for thing in rng.sample(things, len(things))
            for _, _, question, answer in [rng.choice(about(thing))]]  # fmt: skip


def questions(things: list[Thing]) -> list[tuple[str, Thing | None, str, str]]:
    """All that can be asked about a scene: (kind, the thing it is about, question, answer)."""
    return [
        ("count", None, "How many things are there?", NUMBERS[len(things) - 1]),
        ("place", None, "In which corner?", things[0].place),
        *(asked for thing in things for asked in about(thing)),
    ]


def about(thing: Thing) -> list[tuple[str, Thing | None, str, str]]:
    """What can be asked about one thing."""
    return [
        ("colour", thing, f"What colour is the {thing.shape}?", thing.colour),
        ("shape", thing, f"What shape is the {thing.colour} thing?", thing.shape),
    ]


def held_out_question(kind: str, rng: random.Random) -> tuple[list[Thing], str, str, bool]:
    """A scene with one held-out pair, a question of a kind, its answer, and whether it is about that pair."""
    of_all = kind in ("count", "place")
    about_it = not of_all and rng.random() < ASKED_ABOUT_HELD_OUT
    things = random_scene(rng, rng.randint(1 if of_all or about_it else 2, len(NUMBERS)), held_out=True)
    fitting = [
        (question, answer)
        for one, thing, question, answer in questions(things)
        if one == kind and (thing is None or thing.held_out == about_it)
    ]
    return things, *rng.choice(fitting), about_it


def write_scenes(
    folder: Path, *, num_train: int = 6000, num_val: int = 200, num_heldout: int = 1200, seed: int = 0
) -> None:
    """Write `images/*.png`, and in LLaVA's format `pretrain.json`, `finetune.json`, `val.json` and `heldout.json`.

    Args:
        folder: where to.
        num_train: scenes for training, each with a caption (`pretrain.json`) and questions (`finetune.json`).
        num_val: scenes for the evaluation loss, drawn as those for training.
        num_heldout: scenes with a held-out pair, one question each, with its `kind` and whether it is about the pair.
        seed: decides everything.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"pretrain": [], "finetune": [], "val": [], "heldout": []}
    for index in tqdm(range(num_train + num_val + num_heldout), "scenes"):
        name = f"{index:05d}.png"
        if index >= num_train + num_val:
            kind = KINDS[index % len(KINDS)]
            things, question, answer, about_it = held_out_question(kind, rng)
            files["heldout"].append({**record(name, [(question, answer)]), "kind": kind, "about_held_out": about_it})
        else:
            things = random_scene(rng, rng.randint(1, len(NUMBERS)), held_out=False)
            of_all = [(question, answer) for _, thing, question, answer in questions(things) if thing is None]
            talk = record(name, rng.sample(of_all, rng.randint(0, 1)) + once_each(things, rng))
            files["val" if index >= num_train else "finetune"].append(talk)
            if index < num_train:
                files["pretrain"].append(record(name, [(CAPTION_PROMPT, caption(things, rng))]))
        draw(things, rng).save(folder / "images" / name, compress_level=1)
    for split, records in files.items():
        (folder / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")


def record(name: str, talk: list[tuple[str, str]]) -> dict[str, Any]:
    """A record of questions and answers about one picture."""
    turns = []
    for number, (question, answer) in enumerate(talk):
        lead = "" if number or question.startswith("<image>") else "<image>\n"
        turns += [{"from": "human", "value": lead + question}, {"from": "gpt", "value": answer}]
    return {"id": Path(name).stem, "image": name, "conversations": turns}
