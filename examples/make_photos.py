"""Write a folder of photos with captions and questions as tables: python examples/make_photos.py [FOLDER] [--parts].

These photos stand in for your own in docs/tutorial.md. `photos/` has JPEG files, and `captions.csv` has a caption for
each of them. `questions.csv` has two questions about each photo, except the last 48, whose questions are in
`questions-eval.csv`. As in a real collection, some records are faulty: one photo is truncated, one occurs twice, and
one caption is empty. `--parts` also writes small untrained parts, so that nothing needs a network.
"""

import argparse
import csv
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (210, 50, 40), "green": (50, 160, 70), "blue": (60, 90, 220), "yellow": (235, 200, 50)}
SHAPES = ("circle", "square", "triangle")
SIDE = 96
"""Width and height of a photo in pixels."""
NUM_EVALUATION = 48
"""Number of photos whose questions are kept for evaluation."""


def draw_photo(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """Return a photo of one shape whose position, size and brightness are random."""
    light = rng.uniform(0.8, 1.0)
    ground = rng.randint(90, 200)
    photo = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    pen, half = ImageDraw.Draw(photo), rng.randint(18, 30)
    x, y = (rng.randint(half + 4, SIDE - half - 4) for _ in range(2))
    fill = tuple(int(channel * light) for channel in COLOURS[colour])
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "square":
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        pen.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=fill)
    return photo


def write_photos(folder: Path, number: int) -> None:
    """Write `number` photos, and the tables of captions and questions."""
    rng = random.Random(0)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    captions, questions = [], []
    for index in range(number):
        colour, shape, name = rng.choice(list(COLOURS)), rng.choice(SHAPES), f"{index:04}.jpg"
        draw_photo(colour, shape, rng).save(folder / "photos" / name, quality=90)
        captions.append((name, f"A {colour} {shape}."))
        questions.append((name, "What colour is it?", colour))
        questions.append((name, "Which shape is it?", shape))
    spoil(folder / "photos", captions)
    write_table(folder / "captions.csv", ("image", "caption"), captions)
    evaluation = {name for name, _ in captions[-NUM_EVALUATION:]}
    for file, kept in (("questions.csv", False), ("questions-eval.csv", True)):
        rows = [row for row in questions if (row[0] in evaluation) == kept]
        write_table(folder / file, ("image", "question", "answer"), rows)


def spoil(photos: Path, captions: list[tuple[str, str]]) -> None:
    """Truncate one photo, duplicate another, and empty one caption."""
    torn = photos / captions[3][0]
    torn.write_bytes(torn.read_bytes()[:700])
    (photos / captions[5][0]).write_bytes((photos / captions[4][0]).read_bytes())
    captions[5] = (captions[5][0], captions[4][1])
    captions[7] = (captions[7][0], "")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file, and print how many rows it has."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    print(f"{len(rows):4} rows  {path}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("my-photos"))
    parser.add_argument("--number", type=int, default=400, help="number of photos (%(default)s)")
    parser.add_argument("--parts", action="store_true", help="also write small untrained parts into FOLDER/parts")
    args = parser.parse_args()
    write_photos(args.folder, args.number)
    if args.parts:
        from vlm.demo.tiny_models import build_tiny_parts  # imports torch

        build_tiny_parts(args.folder / "parts")


if __name__ == "__main__":
    main()
