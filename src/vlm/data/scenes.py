"""A generated set of scenes with captions and questions: small enough to learn in minutes, with a test inside.

A scene is a picture of 4 x 4 cells, a few of which hold a coloured shape; no two things of a scene share a colour or a
shape, so that either names the thing. Some pairs of colour and shape (`HELD_OUT_PAIRS`) never occur in training, and
every scene of `heldout.json` has one of them. Captions say of each thing what the questions ask later, so that the
first stage learns to look and the second to answer.

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
ASKED_ABOUT_HELD_OUT = 0.3
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
        """The quarter of the picture that it lies in."""
        return PLACES[2 * (self.row >= CELLS // 2) + (self.column >= CELLS // 2)]

    @property
    def held_out(self) -> bool:
        """Whether its pair of colour and shape never occurs in training."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


def random_scene(rng: random.Random, number: int, *, held_out: bool) -> list[Thing]:
    """So many things in reading order, the first of them drawn a held-out pair or none at all."""
    cells = rng.sample(range(CELLS * CELLS), number)
    while True:
        pairs = list(zip(rng.sample(list(COLOURS), number), rng.sample(SHAPES, number), strict=True))
        if sum(pair in HELD_OUT_PAIRS for pair in pairs) == held_out:
            things = [Thing(*pair, *divmod(cell, CELLS)) for pair, cell in zip(pairs, cells, strict=True)]
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


def caption(things: list[Thing], rng: random.Random, facts: int = 8) -> str:
    """How many things there are, each in its place, and some facts in the words in which questions ask for them."""
    number = f"{NUMBERS[len(things) - 1]} thing{'s' if len(things) > 1 else ''}."
    listed = [f"{thing.place}: {thing.colour} {thing.shape}." for thing in things]
    found = [f"{question} {answer}." for _, _, question, answer in questions(things)]
    return " ".join([number, *listed, *rng.sample(found, min(facts, len(found)))])


def questions(things: list[Thing]) -> list[tuple[str, Thing | None, str, str]]:
    """All that can be asked about a scene: (kind, the thing it is about, question, answer)."""
    found: list[tuple[str, Thing | None, str, str]] = [
        ("count", None, "How many things are there?", NUMBERS[len(things) - 1])
    ]
    for thing in things:
        found.append(("colour", thing, f"What colour is the {thing.shape}?", thing.colour))
        found.append(("shape", thing, f"What shape is {thing.colour}?", thing.shape))
        found.append(("place", thing, f"Where is the {thing.shape}?", thing.place))
        found.append(("place", thing, f"Where is {thing.colour}?", thing.place))
    return found


def held_out_question(kind: str, rng: random.Random) -> tuple[list[Thing], str, str, bool]:
    """A scene with one held-out pair, a question of a kind, its answer, and whether it is about that pair."""
    about = kind != "count" and rng.random() < ASKED_ABOUT_HELD_OUT
    things = random_scene(rng, rng.randint(1 if about or kind == "count" else 2, len(NUMBERS)), held_out=True)
    fitting = [
        (question, answer)
        for one, thing, question, answer in questions(things)
        if one == kind and (thing is None or thing.held_out == about)
    ]
    return things, *rng.choice(fitting), about


def write_scenes(
    folder: Path, *, num_train: int = 6000, num_val: int = 200, num_heldout: int = 1200, asked: int = 8, seed: int = 0
) -> None:
    """Write `images/*.png`, and in LLaVA's format `pretrain.json`, `finetune.json`, `val.json` and `heldout.json`.

    Args:
        folder: where to.
        num_train: scenes for training, each with a caption (`pretrain.json`) and questions (`finetune.json`).
        num_val: scenes for the evaluation loss, drawn as those for training.
        num_heldout: scenes with a held-out pair, one question each, with its `kind` and whether it is about the pair.
        asked: most questions about one training scene.
        seed: decides everything.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"pretrain": [], "finetune": [], "val": [], "heldout": []}
    for index in tqdm(range(num_train + num_val + num_heldout), "scenes"):
        name = f"{index:05d}.png"
        if index >= num_train + num_val:
            kind = KINDS[index % len(KINDS)]
            things, question, answer, about = held_out_question(kind, rng)
            files["heldout"].append({**record(name, [(question, answer)]), "kind": kind, "about_held_out": about})
        else:
            things = random_scene(rng, rng.randint(1, len(NUMBERS)), held_out=False)
            found = [(question, answer) for _, _, question, answer in questions(things)]
            talk = record(name, rng.sample(found, min(asked, len(found))))
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
