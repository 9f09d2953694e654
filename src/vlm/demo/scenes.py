"""A generated set of scenes with captions and questions: small enough to learn in minutes, with a test inside.

A scene is an image of 4 x 4 cells; in one of its corners lie one to four things, all of one colour and one shape. Some
pairs of colour and shape (`HELD_OUT_PAIRS`) never occur in training, and every scene of `heldout.json` shows one of
them: whoever answers has to have learnt colours and shapes apart from each other.

For the same reason no text of training tells both of an image: a language model that reads "red" before it says the
shape learns from the text alone that red things are no squares.

Imports the standard library, Pillow and the in-memory form only.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from vlm.data.sample import PLACEHOLDER

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
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBER_WORDS = ("one", "two", "three", "four")
QUESTION_KINDS = ("colour", "shape", "count", "place")
HELD_OUT_PAIRS = frozenset(zip(COLOURS, SHAPES, strict=False))
"""Red squares, green triangles, blue crosses and yellow circles."""
BACKGROUND = (128, 128, 128)
CAPTION_PROMPT = f"{PLACEHOLDER}\nDescribe the picture."


@dataclass(frozen=True)
class Scene:
    """Like things in some cells, `(row, column)`, of one corner."""

    colour: str
    shape: str
    cells: tuple[tuple[int, int], ...]

    @property
    def place(self) -> str:
        """The corner of the image."""
        row, column = self.cells[0]
        return CORNERS[2 * (row >= CELLS // 2) + (column >= CELLS // 2)]


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """One to four things of a held-out pair, or of another one."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    colour, shape = rng.choice([pair for pair in pairs if (pair in HELD_OUT_PAIRS) == held_out])
    half = CELLS // 2
    top, left = rng.choice((0, half)), rng.choice((0, half))
    cells = rng.sample(range(half * half), rng.randint(1, len(NUMBER_WORDS)))
    return Scene(colour, shape, tuple((top + cell // half, left + cell % half) for cell in cells))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The image: every shape a little off its cell's centre, a little lighter or darker."""
    fine = 4  # drawn so many times larger and averaged, for smooth edges
    image = Image.new("RGB", (CELLS * CELL * fine, CELLS * CELL * fine), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for row, column in scene.cells:
        x, y = ((index + 0.5) * CELL + rng.uniform(-0.5, 0.5) for index in (column, row))
        shade = rng.uniform(0.85, 1.0)
        draw_shape(pen, scene.shape, x * fine, y * fine, 5 * fine, tuple(int(c * shade) for c in COLOURS[scene.colour]))
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
        quarter = [(third, -r), (third, -third), (r, -third)]  # the others are this one, turned by right angles
        turned = [quarter, [(-b, a) for a, b in quarter], [(-a, -b) for a, b in quarter], [(b, -a) for a, b in quarter]]
        pen.polygon([(x + a, y + b) for corner in turned for a, b in corner], **style)


def questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """What can be asked about a scene: kind -> (question, answer)."""
    return {
        "colour": ("What colour are they?", scene.colour),
        "shape": ("What shape are they?", scene.shape),
        "count": ("How many things are there?", NUMBER_WORDS[len(scene.cells) - 1]),
        "place": ("Which corner are they in?", scene.place),
    }


def caption(scene: Scene, rng: random.Random) -> str:
    """Dense: answers in the questions' words, then the colour or the shape in every cell in reading order."""
    kind = rng.choice(("colour", "shape"))
    word = questions(scene)[kind][1]
    cells = [word if divmod(cell, CELLS) in scene.cells else "none" for cell in range(CELLS * CELLS)]
    told = " ".join(f"{question} {answer}." for question, answer in draw_questions(scene, rng, kind))
    return f"{told} {' '.join(cells)}."


def draw_questions(scene: Scene, rng: random.Random, kind: str) -> list[tuple[str, str]]:
    """Questions of one kind, colour or shape, and about number and place, in any order, with their answers."""
    asked = questions(scene)
    return [asked[name] for name in rng.sample((kind, "count", "place"), 3)]


def write_scenes(
    folder: Path, *, num_train: int = 6000, num_val: int = 200, num_heldout: int = 1200, num_labelled: int = 1000,
    seed: int = 0,
) -> None:  # fmt: skip
    """Write `images/*.png`, and in LLaVA's format `pretrain.json`, `finetune.json`, `val.json` and `heldout.json`.

    `labelled.json` and `labelled-heldout.json` ask for the shape and have it as `label`, for a prediction head.

    Args:
        folder: where to.
        num_train: scenes for training, each with a caption (`pretrain.json`) and questions (`finetune.json`).
        num_val: scenes for the evaluation loss, drawn as those for training.
        num_heldout: scenes with a held-out pair, one question each, with its `kind`.
        num_labelled: scenes of those for training that have a label too; all held-out ones do.
        seed: decides everything.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = ("pretrain", "finetune", "val", "heldout", "labelled", "labelled-heldout")
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index in tqdm(range(num_train + num_val + num_heldout), "scenes"):
        name = f"{index:05d}.png"
        scene = random_scene(rng, held_out=index >= num_train + num_val)
        if index >= num_train + num_val:
            kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
            files["heldout"].append({**record(name, [questions(scene)[kind]]), "kind": kind})
            files["labelled-heldout"].append(make_labelled_record(name, scene))
        else:
            spoken = record(name, draw_questions(scene, rng, rng.choice(("colour", "shape"))))
            files["val" if index >= num_train else "finetune"].append(spoken)
            if index < num_train:
                files["pretrain"].append(record(name, [(CAPTION_PROMPT, caption(scene, rng))]))
            if index < min(num_train, num_labelled):
                files["labelled"].append(make_labelled_record(name, scene))
        draw(scene, rng).save(folder / "images" / name, compress_level=1)
    for split, records in files.items():
        (folder / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")


def make_labelled_record(name: str, scene: Scene) -> dict[str, Any]:
    """A record that asks for the shape, and has it as its label."""
    asked = record(name, [questions(scene)["shape"]])
    return {**asked, "conversations": asked["conversations"][:1], "label": scene.shape}


def record(name: str, asked: list[tuple[str, str]]) -> dict[str, Any]:
    """A record of questions and answers about one image."""
    turns = []
    for number, (question, answer) in enumerate(asked):
        lead = "" if number or question.startswith(PLACEHOLDER) else f"{PLACEHOLDER}\n"
        turns += [{"from": "human", "value": lead + question}, {"from": "gpt", "value": answer}]
    return {"id": Path(name).stem, "image": name, "conversations": turns}
