"""What the tests of runs that learn preferences share: their records, and overrides for tiny parts."""

import json
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green")
WORDS = [
    "dataset.format=preference", "dataset.template=chatml", "dataset.eval_split=0.25", "trainer.eval_strategy=epoch",
    "trainer.max_steps=4", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.num_samples=0",
    "trainer.gradient_accumulation_steps=1", "trainer.save_strategy=no",
    "trainer.learning_rate.language_model_learning_rate=1e-3",
]  # fmt: skip
"""Overrides for `preference-smol`."""


def pair_records(world: Path) -> list[dict[str, Any]]:
    """Return pairs about the images of the tiny world: a colour that is right, and one that is not."""
    pairs: list[dict[str, Any]] = []
    for record in json.loads((world / "records.json").read_text()):
        number = int(record["id"])
        right, wrong = COLOURS[number % 3], COLOURS[(number + 1) % 3]
        shown = {"image": record["image"]} if "image" in record else {}
        pairs.append({
            "id": record["id"], **shown, "question": "what?", "chosen": f"a {right} square",
            "rejected": f"one {wrong} thing" * (1 + number % 2),
        })  # fmt: skip
    pairs[0]["image"], pairs[0]["question"] = [pairs[0]["image"], pairs[1]["image"]], "<image><image>what?"
    return pairs


def write_preferences(world: Path, path: Path, *, labelled: bool = False) -> list[str]:
    """Write pairs, or single replies with labels; return the overrides that read them."""
    records = pair_records(world)
    if labelled:
        for number, record in enumerate(records):
            rejected = record.pop("rejected")
            record |= {"label": number % 2 == 0} | ({} if number % 2 == 0 else {"chosen": rejected})
    path.write_text(json.dumps(records))
    return [f"dataset.path={path}", f"dataset.image_folder={world / 'images'}"]
