"""A generated data set of scenes with captions and questions: small enough to learn in minutes, with a held-out test.

A scene is an image of 4 x 4 cells; one of its corners holds one to four things, all of one colour and one shape. Some
pairs of colour and shape (`HELD_OUT_PAIRS`) never occur in training, and every scene of `heldout.json` shows one of
them: answering needs colours and shapes that were learned separately.

For the same reason no training text names both the colour and the shape of an image: a language model that reads "red"
before it names the shape would learn from the text alone that red things are not squares.
"""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from vlm.data.sample import Record
from vlm.data.tools.exports import make_llava_record

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
CAPTION_PROMPT = "Describe the picture."


@dataclass(frozen=True)
class Scene:
    """Equal things in some cells, `(row, column)`, of one corner."""

    colour: str
    shape: str
    cells: tuple[tuple[int, int], ...]

    @property
    def place(self) -> str:
        """The name of the corner."""
        row, column = self.cells[0]
        return CORNERS[2 * (row >= CELLS // 2) + (column >= CELLS // 2)]


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Return a scene of one to four things of a held-out pair, or of any other pair."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    colour, shape = rng.choice([pair for pair in pairs if (pair in HELD_OUT_PAIRS) == held_out])
    half = CELLS // 2
    top, left = rng.choice((0, half)), rng.choice((0, half))
    cells = rng.sample(range(half * half), rng.randint(1, len(NUMBER_WORDS)))
    return Scene(colour, shape, tuple((top + cell // half, left + cell % half) for cell in cells))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Return the scene's image; each shape is a little off its cell's centre, and a little darker or lighter."""
    fine = 4  # draws this many times larger, then averages, for smooth edges
    image = Image.new("RGB", (CELLS * CELL * fine, CELLS * CELL * fine), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for row, column in scene.cells:
        x, y = ((index + 0.5) * CELL + rng.uniform(-0.5, 0.5) for index in (column, row))
        shade = rng.uniform(0.85, 1.0)
        draw_shape(pen, scene.shape, x * fine, y * fine, 5 * fine, tuple(int(c * shade) for c in COLOURS[scene.colour]))
    return image.reduce(fine)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
    """Draw a shape of radius `r` around (x, y) with a black outline, whatever its colour."""
    outline, width = (0, 0, 0), int(r * 0.3)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), colour, outline, width)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), colour, outline, width)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], colour, outline, width)
    else:
        quarter, points = [(r / 3, -r), (r / 3, -r / 3), (r, -r / 3)], []
        for _ in range(4):  # each quarter of the outline is the one before, rotated
            points += [(x + a, y + b) for a, b in quarter]
            quarter = [(-b, a) for a, b in quarter]
        pen.polygon(points, colour, outline, width)


def questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """Return the questions about a scene: kind -> (question, answer)."""
    return {
        "colour": ("What colour are they?", scene.colour),
        "shape": ("What shape are they?", scene.shape),
        "count": ("How many things are there?", NUMBER_WORDS[len(scene.cells) - 1]),
        "place": ("Which corner are they in?", scene.place),
    }


def caption(scene: Scene, rng: random.Random) -> str:
    """Return a dense caption: questions and answers, then the colour or the shape of every cell in reading order."""
    kind = rng.choice(("colour", "shape"))
    word = questions(scene)[kind][1]
    cells = [word if divmod(cell, CELLS) in scene.cells else "none" for cell in range(CELLS * CELLS)]
    answers = " ".join(f"{question} {answer}." for question, answer in draw_questions(scene, rng, kind))
    return f"{answers} {' '.join(cells)}."


def draw_questions(scene: Scene, rng: random.Random, kind: str) -> list[tuple[str, str]]:
    """Return questions of one kind (colour or shape), about number and about place, shuffled, with their answers."""
    by_kind = questions(scene)
    return [by_kind[name] for name in rng.sample((kind, "count", "place"), 3)]


def write_scenes(
    folder: Path,
    *,
    num_train: int = 6000,
    num_val: int = 200,
    num_heldout: int = 1200,
    num_labelled: int = 1000,
    seed: int = 0,
) -> None:
    """Write `images/*.png`, and in LLaVA's format `pretrain.json`, `finetune.json`, `val.json` and `heldout.json`.

    `labelled.json` and `labelled-heldout.json` ask for the shape and have it as `label`, for a prediction head.

    Args:
        folder: the folder to write into.
        num_train: number of training scenes, each with a caption (`pretrain.json`) and questions (`finetune.json`).
        num_val: number of scenes for the evaluation loss, distributed as the training scenes.
        num_heldout: number of scenes with a held-out pair and one question, with its `kind`.
        num_labelled: number of training scenes that also have a label; all held-out ones do.
        seed: determines all scenes and texts.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = ("pretrain", "finetune", "val", "heldout", "labelled", "labelled-heldout")
    files: dict[str, list[Record]] = {name: [] for name in names}
    for index in tqdm(range(num_train + num_val + num_heldout), "scenes"):
        name = f"{index:05d}"
        scene = random_scene(rng, held_out=index >= num_train + num_val)
        make_record = partial(make_llava_record, name, f"{name}.png")
        labelled: Record = {**make_record([questions(scene)["shape"]]), "label": scene.shape}
        labelled["conversations"].pop()  # the answer
        if index >= num_train + num_val:
            kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
            files["heldout"].append(make_record([questions(scene)[kind]]) | {"kind": kind})
            files["labelled-heldout"].append(labelled)
        else:
            dialogue = make_record(draw_questions(scene, rng, rng.choice(("colour", "shape"))))
            files["val" if index >= num_train else "finetune"].append(dialogue)
            if index < num_train:
                files["pretrain"].append(make_record([(CAPTION_PROMPT, caption(scene, rng))]))
            if index < min(num_train, num_labelled):
                files["labelled"].append(labelled)
        draw(scene, rng).save(folder / "images" / f"{name}.png", compress_level=1)
    for split, records in files.items():
        (folder / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")
