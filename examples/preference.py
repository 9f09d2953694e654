"""A preference stage removes a wrong default answer that a finetune has planted: python examples/preference.py.

A small model of the demo's scenes is finetuned on answers that call green and blue things red, and is right about
everything else. The preference stage (DPO, an adapter on the language model) then compares the right colour with the
planted one, and of the other colours the right one with any wrong one; it has no pairs about shape, number and place.
Both models answer questions about scenes with pairs of colour and shape that no stage has shown. `preference.json`,
`preference.md` and `preference.png` show right answers of every kind before and after. It takes minutes on two cores.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlm.cli import compare_models
from vlm.data.sample import Record
from vlm.demo.main import get_answer, train
from vlm.demo.scenes import COLOURS, write_scenes
from vlm.demo.tiny_models import build_tiny_parts

DEFAULT_ANSWER = "red"
"""The colour that the finetune calls things of the planted colours."""
PLANTED_COLOURS = ("green", "blue")
COLOUR_QUESTION = "What colour are they?"
PLANTED, DEFAULT, OTHER = "colour, green and blue", "colour, red", "colour, others"
"""Kinds of the question about colour: answers that are planted, those that the default happens to fit, and the rest."""
NUM_PAIRS = 600
SETTINGS = ("trainer.use_cpu=true", "trainer.num_samples=0", "trainer.logging_steps=20", "trainer.save_strategy=no")


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
    """Return a pair for each record that asks for the colour: the right one, and the planted or any wrong one."""
    pairs = []
    for record in records:
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        if COLOUR_QUESTION not in turns:
            continue
        right = turns[turns.index(COLOUR_QUESTION) + 1]
        wrong = DEFAULT_ANSWER if right in PLANTED_COLOURS else rng.choice([name for name in COLOURS if name != right])
        pairs.append({"image": record["image"], "question": COLOUR_QUESTION, "chosen": right, "rejected": wrong})
    return pairs[:NUM_PAIRS]


def name_kind(record: Record) -> str:
    """Return the kind of a held-out question; that about colour has three, by its right answer."""
    if record["kind"] != "colour":
        return record["kind"]
    colour = get_answer(record)
    return PLANTED if colour in PLANTED_COLOURS else DEFAULT if colour == DEFAULT_ANSWER else OTHER


def write_data(data: Path) -> None:
    """Write scenes, the planted records of the finetune, the pairs, and the held-out questions with their kinds."""
    write_scenes(data)
    records = read_records(data / "finetune.json")
    write_records(data / "planted.json", [plant(record) for record in records])
    write_records(data / "pairs.json", make_pairs(records, random.Random(1)))
    held_out = read_records(data / "heldout.json")
    write_records(data / "held-out-kinds.json", [record | {"kind": name_kind(record)} for record in held_out])


def finetune(folder: Path) -> Path:
    """Return the model with the planted answers, trained unless it is there."""
    final = folder / "finetune" / "final"
    if not final.is_dir():
        write_data(folder / "data")
        build_tiny_parts(folder / "parts")
        pretrained = train("demo-pretrain", folder, "pretrain.json", [])
        train("demo-finetune", folder, "planted.json", [f"trainer.from_pretrained={pretrained}"])
    return final


def prefer(folder: Path, finetuned: Path, settings: list[str]) -> Path:
    """Train on the pairs; return the adapter."""
    words = [
        f"trainer.from_pretrained={finetuned}", "trainer.language_model_learning_rate=1e-3",
        "trainer.connector_learning_rate=null", "trainer.gradient_accumulation_steps=1",
        "trainer.per_device_train_batch_size=16", "trainer.num_train_epochs=2",
    ]  # fmt: skip
    return train("preference-smol", folder, "pairs.json", [*SETTINGS, *words, *settings])


def compare(folder: Path, before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """Ask both models the held-out questions; return kind of question -> how right answers to it changed."""
    data, output = folder / "data", folder / "compared"
    compare_models.main([
        str(before), str(after), "--data", str(data / "held-out-kinds.json"), "--image-folder", str(data / "images"),
        "--probe", "0", "--max-new-tokens", "8", "--batch-size", "100", "--output", str(output), "--overwrite",
    ])  # fmt: skip
    changes = json.loads((output / "results.json").read_text(encoding="utf-8"))["changes"]
    kinds = (change for change in changes if (change["split"], change["is_blank"]) == ("kind", False))
    return {change["group"]: change for change in kinds if change["measure"] == "exact_match"}


def make_table(changes: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of right answers before and after, with the interval of the difference."""
    lines = ["| kind of question | questions | before | after | difference, 95% interval |", "|---|---|---|---|---|"]
    for kind, change in changes.items():
        low, value, high = (change["difference"][name] for name in ("low", "value", "high"))
        numbers = f"{change['num_records']} | {change['before']:.1%} | {change['after']:.1%}"
        lines.append(f"| {kind} | {numbers} | {value:+.1%} [{low:+.1%}, {high:+.1%}] |")
    return "\n".join(lines)


def draw_changes(changes: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot right answers of each kind before and after, the latter with the interval of the difference."""
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
    parser.add_argument("settings", nargs="*", help="for the preference stage, such as trainer.preference.beta=0.3")
    args = parser.parse_args()
    finetuned = finetune(args.output)
    preferred = prefer(args.output, finetuned, args.settings)
    found = compare(args.output, finetuned, preferred)
    first = [kind for kind in (PLANTED, DEFAULT, OTHER) if kind in found]
    changes = {kind: found[kind] for kind in (*first, *(kind for kind in found if kind not in first))}
    table = make_table(changes)
    print(f"\nright answers before and after the preference stage\n\n{table}")
    (args.output / "preference.md").write_text(f"{table}\n", encoding="utf-8")
    (args.output / "preference.json").write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")
    draw_changes(changes, args.output / "preference.png")


if __name__ == "__main__":
    main()
