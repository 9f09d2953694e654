"""Remove a wrong default answer, which a finetune has planted, with a preference stage: python examples/preference.py.

A small model is finetuned on the demo's scenes with records that call green and blue things red and are right about
everything else. The preference stage (an adapter on the language model; DPO with a supervised term) then trains on
pairs of answers: the right colour and the planted one, or another right answer and any wrong one. Both models answer
questions about new scenes, and about green and blue things of shapes that no stage has shown in that colour.
`preference.json`, `preference.md` and `preference.png` show the share of right answers of every kind before and after.
It takes a few minutes on two cores.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlm.cli import compare_models
from vlm.data.sample import Record
from vlm.data.tools.exports import make_llava_record
from vlm.demo.main import get_answer, train
from vlm.demo.scenes import (
    COLOURS,
    CORNERS,
    NUMBER_WORDS,
    QUESTION_KINDS,
    SHAPES,
    draw,
    questions,
    random_scene,
    write_scenes,
)
from vlm.demo.tiny_models import build_tiny_parts

DEFAULT_ANSWER = "red"
"""The answer that the finetune gives for the colour of green and blue things."""
PLANTED_COLOURS = ("green", "blue")
COLOUR_QUESTION = "What colour are they?"
ANSWERS = {
    COLOUR_QUESTION: tuple(COLOURS), "What shape are they?": SHAPES, "How many things are there?": NUMBER_WORDS,
    "Which corner are they in?": CORNERS,
}  # fmt: skip
"""Question -> the possible answers, of which a pair has two."""
PLANTED, UNSEEN, DEFAULT, OTHER = "green and blue", "green and blue, unseen shape", "red", "other colours"
"""Kinds of questions about colour, by their right answer: a planted colour; a planted colour on a shape that no
training scene shows in it; the colour that is the default answer; any other colour."""
NUM_PAIRS = 1200
NUM_HELD_OUT = 200
"""Number of new scenes for each kind of question of `vlm.demo.scenes`."""
SETTINGS = (
    "trainer.use_cpu=true", "trainer.num_samples=0", "trainer.logging_steps=20", "trainer.save_strategy=no",
    "trainer.preference.supervised_weight=1", "trainer.learning_rate.language_model_learning_rate=1e-3",
    "trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=1", "trainer.num_train_epochs=2",
)  # fmt: skip
"""Settings of the preference stage."""


def read_records(path: Path) -> list[Record]:
    """Return the records of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_records(path: Path, records: list[Record]) -> None:
    """Write the records of a file."""
    path.write_text(json.dumps(records), encoding="utf-8")


def plant(record: Record) -> Record:
    """Return the record with planted answers in place of the right ones."""
    turns = [
        turn | {"value": DEFAULT_ANSWER} if turn["value"] in PLANTED_COLOURS else turn
        for turn in record["conversations"]
    ]
    return record | {"conversations": turns}


def make_pairs(records: list[Record], rng: random.Random) -> list[Record]:
    """Return pairs of the right answer and the planted one, or any wrong one if none is planted.

    Of the records that ask for the colour, three of four become a pair about the colour. The other records become a
    pair about another of their questions.
    """
    pairs = []
    for number, record in enumerate(records):
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        answers = dict(zip(texts[::2], texts[1::2], strict=True))
        others = [question for question in answers if question != COLOUR_QUESTION]
        question = COLOUR_QUESTION if COLOUR_QUESTION in answers and number % 4 else rng.choice(others)
        right = answers[question]
        wrong = [answer for answer in ANSWERS[question] if answer != right]
        rejected = DEFAULT_ANSWER if right in PLANTED_COLOURS else rng.choice(wrong)
        pairs.append({"image": record["image"], "question": question, "chosen": right, "rejected": rejected})
    return pairs


def make_held_out(images: Path, unseen: list[Record], rng: random.Random) -> list[Record]:
    """Return a question about each of many new scenes with its kind, and those of `unseen` about planted colours."""
    records = []
    for index in range(NUM_HELD_OUT * len(QUESTION_KINDS)):
        scene, kind = random_scene(rng, held_out=False), QUESTION_KINDS[index % len(QUESTION_KINDS)]
        image = f"held-out-{index:05d}.png"
        draw(scene, rng).save(images / image, compress_level=1)
        colour = PLANTED if scene.colour in PLANTED_COLOURS else DEFAULT if scene.colour == DEFAULT_ANSWER else OTHER
        record = make_llava_record(image, image, [questions(scene)[kind]])
        records.append(record | {"kind": colour if kind == "colour" else kind})
    return records + [record | {"kind": UNSEEN} for record in unseen if get_answer(record) in PLANTED_COLOURS]


def write_data(data: Path) -> None:
    """Write the scenes, the finetuning records with planted answers, the pairs, and the held-out questions."""
    write_scenes(data)
    records = read_records(data / "finetune.json")
    write_records(data / "planted.json", [plant(record) for record in records])
    write_records(data / "pairs.json", make_pairs(records[:NUM_PAIRS], random.Random(1)))
    held_out = make_held_out(data / "images", read_records(data / "heldout.json"), random.Random(2))
    write_records(data / "held-out.json", held_out)


def finetune(folder: Path) -> Path:
    """Return the model with the planted answers; train it unless it exists."""
    final = folder / "finetune" / "final"
    if not final.is_dir():
        write_data(folder / "data")
        build_tiny_parts(folder / "parts")
        pretrained = train("demo-pretrain", folder, "pretrain.json", [])
        train("demo-finetune", folder, "planted.json", [f"trainer.from_pretrained={pretrained}"])
    return final


def prefer(folder: Path, finetuned: Path, settings: list[str]) -> Path:
    """Train on the pairs, replacing an earlier run, and return the adapter."""
    shutil.rmtree(folder / "preference-smol", ignore_errors=True)
    words = [f"trainer.from_pretrained={finetuned}", *SETTINGS, *settings]
    return train("preference-smol", folder, "pairs.json", words)


def compare(folder: Path, before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """Ask both models the held-out questions; return a map from kind of question to the change of right answers."""
    data, output = folder / "data", folder / "compared"
    compare_models.main([
        str(before), str(after), "--data", str(data / "held-out.json"), "--image-folder", str(data / "images"),
        "--probe", "0", "--max-new-tokens", "8", "--batch-size", "100", "--output", str(output), "--overwrite",
    ])  # fmt: skip
    changes = json.loads((output / "results.json").read_text(encoding="utf-8"))["changes"]
    kinds = (change for change in changes if (change["split"], change["is_blank"]) == ("kind", False))
    return {change["group"]: change for change in kinds if change["measure"] == "exact_match"}


def make_table(changes: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the share of right answers before and after, with the interval of the difference."""
    lines = ["| kind of question | questions | before | after | difference, 95% interval |", "|---|---|---|---|---|"]
    for kind, change in changes.items():
        low, value, high = (change["difference"][name] for name in ("low", "value", "high"))
        numbers = f"{change['num_records']} | {change['before']:.1%} | {change['after']:.1%}"
        lines.append(f"| {kind} | {numbers} | {value:+.1%} [{low:+.1%}, {high:+.1%}] |")
    return "\n".join(lines)


def draw_changes(changes: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the share of right answers of each kind before and after, with the interval of the difference."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, change in enumerate(changes.values()):
        low, value, high = (change["difference"][name] for name in ("low", "value", "high"))
        axes.plot(change["before"], place, "o", color="grey", label="" if place else "before")
        axes.errorbar(
            change["after"], place, xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3,
            label="" if place else "after, with the 95% interval of the difference",
        )  # fmt: skip
    axes.set_yticks(range(len(changes)), list(changes))
    axes.invert_yaxis()
    axes.set(xlabel="share of right answers", xlim=(-0.05, 1.05))
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/preference"))
    parser.add_argument(
        "settings", nargs="*", help="settings of the preference stage, such as trainer.preference.beta=0.3"
    )
    args = parser.parse_args()
    finetuned = finetune(args.output)
    preferred = prefer(args.output, finetuned, args.settings)
    found = compare(args.output, finetuned, preferred)
    changes = {kind: found[kind] for kind in (PLANTED, UNSEEN, DEFAULT, OTHER, *QUESTION_KINDS[1:])}
    table = make_table(changes)
    print(f"\nShare of right answers before and after the preference stage\n\n{table}")
    (args.output / "preference.md").write_text(f"{table}\n", encoding="utf-8")
    (args.output / "preference.json").write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")
    draw_changes(changes, args.output / "preference.png")


if __name__ == "__main__":
    main()
