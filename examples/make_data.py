"""Write a small data set in LLaVA's format: python examples/make_data.py [FOLDER].

Twelve plain pictures with a caption each, two conversations of several turns, and one record of text only. With
`--parts`, small untrained parts too, so that the commands of examples/README.md run without a network.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange")
SHAPES = ("circle", "square", "triangle")


def picture(colour: str, shape: str) -> Image.Image:
    """A shape in the middle of a white picture."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((16, 16, 80, 80), fill=colour)
    elif shape == "square":
        draw.rectangle((16, 16, 80, 80), fill=colour)
    else:
        draw.polygon([(48, 12), (84, 80), (12, 80)], fill=colour)
    return image


def turns(*texts: str) -> list[dict[str, str]]:
    """Texts of human and model in turn."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def write(folder: Path) -> None:
    """Write `images/`, `train.json` and `val.json`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour}-{shape}.png"
            picture(colour, shape).save(folder / "images" / name)
            talk = turns("<image>\nWhat is in this picture?", f"A {colour} {shape}.")
            records.append({"id": name, "image": name, "conversations": talk})
    for colour in COLOURS[:2]:
        name = f"{colour}-circle.png"
        talk = turns("<image>\nWhich shape is it?", "A circle.", "And its colour?", f"It is {colour}.")
        records.append({"id": f"talk-{colour}", "image": name, "conversations": talk})
    records.append({"id": "text", "conversations": turns("Name a shape without corners.", "A circle.")})
    (folder / "train.json").write_text(json.dumps(records[1:], indent=1))
    (folder / "val.json").write_text(json.dumps(records[:3], indent=1))
    print(f"{len(records) - 1} training records and 3 for validation in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).with_name("data"))
    parser.add_argument("--parts", action="store_true", help="write small untrained parts into FOLDER/parts as well")
    args = parser.parse_args()
    write(args.folder)
    if args.parts:
        from vlm.tiny import build_tiny_parts

        build_tiny_parts(args.folder / "parts")
