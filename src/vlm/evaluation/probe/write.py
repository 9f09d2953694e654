"""Writes the probe as records that any command reads: images, and `probe.jsonl` in LLaVA's form."""

import json
import random
from pathlib import Path

from vlm.data.sample import PLACEHOLDER
from vlm.evaluation.probe.abilities import ABILITIES

NUM_QUESTIONS = 24
"""Number of questions for each ability."""
PROBE_FILE = "probe.jsonl"
CHECK_KEY = "check"
"""The key of a record that says what makes an answer right, see `grading.Check`."""


def write_probe(folder: Path, num_questions: int = NUM_QUESTIONS) -> Path:
    """Write `images/` and `probe.jsonl`, with `num_questions` for each ability; return the path of the latter.

    The questions of an ability are different, as far as it has so many, and the same in every call; more of them begin
    with those of fewer.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for ability, ask in ABILITIES.items():
        rng, known = random.Random(ability), set[tuple[str, str, bytes]]()
        for number in range(num_questions):
            question = ask(rng)
            for _ in range(20):
                pixels = b"" if question.image is None else question.image.tobytes()
                if (key := (question.text, question.answer, pixels)) not in known:
                    known.add(key)
                    break
                question = ask(rng)
            name = f"{ability}-{number:03d}"
            image, lead = {}, ""
            if question.image is not None:
                question.image.save(folder / "images" / f"{name}.png")
                image, lead = {"image": f"images/{name}.png"}, f"{PLACEHOLDER}\n"
            turns = [{"from": "human", "value": lead + question.text}, {"from": "gpt", "value": question.answer}]
            lines.append(
                {
                    "id": name,
                    **image,
                    "conversations": turns,
                    "kind": ability,
                    CHECK_KEY: question.check.as_record(),
                }
            )
    path = folder / PROBE_FILE
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path
