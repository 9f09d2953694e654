"""What the tests of prediction heads share: their records, and what a run left behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor

from vlm.data.sample import ImageRef, Sample, Turn
from vlm.inference.predict import Predictor

SHORT = ["trainer.max_steps=3"]
CONNECTOR = ["trainer.unfreeze.train_connector=true"]


def records_of(labelled: Path) -> list[dict]:
    return json.loads(labelled.read_text())


def scores_of(folder: Path, part: str = "evaluation", head: str = "label") -> dict[str, float]:
    found = json.loads((folder / "scores.json").read_text())[part][head]["scores"]
    return {name: score["value"] for name, score in found.items()}


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def alone(final: Path) -> Predictor:
    """The saved folder, as somebody loads it who has but transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    return Predictor(model, AutoProcessor.from_pretrained(final))


def ask(predictor: Predictor, labelled: Path) -> dict[str, np.ndarray]:
    """Head -> what a model says of each record, its raw numbers."""
    records = records_of(labelled)
    pictures = [[Image.open(labelled.parent / record["image"]).convert("RGB")] for record in records]
    found = predictor.predict([record["prompt"] for record in records], pictures)
    if len(predictor.heads) == 1:
        found = [{predictor.heads[0].name: one} for one in found]
    return {head.name: np.array([one[head.name].outputs for one in found]) for head in predictor.heads}


def rewritten(labelled: Path, folder: Path, change: Callable[[int, dict], object]) -> list[str]:
    """Overrides for records that are changed."""
    records = records_of(labelled)
    for index, record in enumerate(records):
        change(index, record)
    (folder / "changed.json").write_text(json.dumps(records))
    return [f"dataset.path={folder / 'changed.json'}"]


def answered(record: dict, image_folder: Path, label_key: str = "colour") -> Sample:
    """A reader: the colour is the label, and what a model would answer."""
    content = (ImageRef(image_folder / record["image"]), record["prompt"])
    turns = (Turn("user", content), Turn("assistant", (f"it is {record['colour']}",)))
    return Sample(record["id"], turns, record[label_key])


def sometimes_answered(record: dict, image_folder: Path, label_key: str = "colour") -> Sample:
    """As `answered`, but the first half of the records have no answer."""
    sample = answered(record, image_folder, label_key)
    return sample if int(record["id"]) >= 24 else replace(sample, turns=sample.turns[:1])
