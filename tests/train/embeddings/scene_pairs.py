"""Pairs of generated scenes and what they show, with the demo's tiny parts."""

import json
import random
from pathlib import Path

from vlm.demo.scenes import NUMBER_WORDS, draw, random_scene
from vlm.demo.tiny_models import build_tiny_parts


def write_scene_pairs(folder: Path, number: int) -> list[str]:
    """Write so many pairs and the parts; return the overrides that use them."""
    build_tiny_parts(folder / "parts")
    (folder / "images").mkdir()
    rng, records = random.Random(0), []
    for index in range(number):
        scene = random_scene(rng, held_out=False)
        draw(scene, rng).save(folder / "images" / f"{index}.png", compress_level=1)
        text = f"{NUMBER_WORDS[len(scene.cells) - 1]} {scene.colour} {scene.shape} {scene.place}"
        records.append({"id": str(index), "query": {"image": f"{index}.png"}, "positive": text})
    (folder / "pairs.json").write_text(json.dumps(records))
    return [
        f"model.visual_encoder.hf_name={folder / 'parts' / 'visual_encoder'}",
        f"model.language_model.hf_name={folder / 'parts' / 'language_model'}",
        f"dataset.path={folder / 'pairs.json'}", f"dataset.image_folder={folder / 'images'}",
    ]  # fmt: skip
