"""Write a small data set in LLaVA's format: python examples/make_data.py [FOLDER] [--parts].

`captions.json` has twelve images with a caption each. `train.json` has questions, conversations of several turns, a
record with two images and a record without images. `val.json` has questions about the green shapes. `--parts` also
writes small untrained parts, so that the commands of examples/README.md run without a network.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange")
SHAPES = ("circle", "square", "triangle")


def draw_image(colour: str, shape: str) -> Image.Image:
    """Return an image of a shape on a white ground."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((16, 16, 80, 80), fill=colour)
    elif shape == "square":
        draw.rectangle((16, 16, 80, 80), fill=colour)
    else:
        draw.polygon([(48, 12), (84, 80), (12, 80)], fill=colour)
    return image


def record(name: str, image: str | list[str] | None, *texts: str) -> dict[str, Any]:
    """Return a record whose texts are the turns of the human and the model, alternately."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


def captions() -> list[dict[str, Any]]:
    """Return a caption for each image."""
    return [
        record(f"{colour}-{shape}", f"{colour}-{shape}.png", "<image>\nDescribe the image.", f"A {colour} {shape}.")
        for colour in COLOURS
        for shape in SHAPES
    ]


def conversations() -> list[dict[str, Any]]:
    """Return records with one image, with two images, and without images, of one turn or several."""
    records = [
        record(f"talk-{colour}", f"{colour}-circle.png", "<image>\nWhich shape is it?", "A circle.", "And its colour?",
               f"It is {colour}.")
        for colour in COLOURS
    ]  # fmt: skip
    for shape in SHAPES:
        records.append(record(f"colour-{shape}", f"red-{shape}.png", f"What colour is the {shape}?\n<image>", "Red."))
    both = ["red-square.png", "blue-square.png"]
    records.append(record("two", both, "<image>\n<image>\nDo they differ?", "Yes: one is red, the other one blue."))
    records.append(record("text", None, "Name a shape without corners.", "A circle."))
    return records


def questions() -> list[dict[str, Any]]:
    """Return questions for evaluation."""
    return [
        record(f"shape-{shape}", f"green-{shape}.png", "<image>\nWhich shape is it?", f"A {shape}.") for shape in SHAPES
    ]


def write(folder: Path) -> None:
    """Write `images/`, `captions.json`, `train.json` and `val.json`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        for shape in SHAPES:
            draw_image(colour, shape).save(folder / "images" / f"{colour}-{shape}.png")
    for name, records in (("captions", captions()), ("train", conversations()), ("val", questions())):
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"{len(records):3} records  {folder / name}.json")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).with_name("data"))
    parser.add_argument("--parts", action="store_true", help="also write small untrained parts into FOLDER/parts")
    args = parser.parse_args()
    write(args.folder)
    if args.parts:
        from vlm.demo.tiny_models import build_tiny_parts  # imports torch

        build_tiny_parts(args.folder / "parts")


if __name__ == "__main__":
    main()
