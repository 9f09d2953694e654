"""Show what a finetune on one kind of question makes a model forget, and how much replay prevents it.

Run it with python examples/forgetting.py. A small model learns to answer questions about colour, shape, number and
place in the demo's scenes. It is then finetuned on a fifth kind of question ("What are they, in two words?"): once on
that kind alone, then with some of the first questions mixed in (replay). Each run compares its final model with the one
that it started from (`trainer.before_after`). For each learning rate and seed, a folder with `forgetting.json` and
`forgetting.png` shows the share of right answers of every kind before and after, for each share of replay. On two busy
cores the base model takes four minutes and each share half a minute. Finished runs are not repeated.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlm.data.tools.exports import make_llava_record
from vlm.demo.main import train
from vlm.demo.scenes import QUESTION_KINDS, draw, questions, random_scene, write_scenes
from vlm.demo.tiny_models import build_tiny_parts
from vlm.evaluation.comparison.replay import weight_of_source

NEW_KIND, NEW_QUESTION = "name", "What are they, in two words?"
NUM_TRAIN = 1200
"""Number of training scenes with a question of the new kind."""
NUM_HELD_OUT = 100
"""Number of held-out questions of each kind."""
SHARES = (0.0, 0.01, 0.05, 0.1, 0.25)
"""Shares of replay among the training samples."""
PARTS = ("visual_encoder", "connector", "language_model")
LEARNING_RATE = 1e-3
"""The peak learning rate of all parts, the same as in the training of the base model."""


def write_records(folder: Path, name: str, kinds: list[str], number: int, seed: int) -> Path:
    """Write `number` scenes for each kind of question, with one question each; return the path of the records."""
    rng, records = random.Random(seed), []
    for index in range(number * len(kinds)):
        kind, scene = kinds[index % len(kinds)], random_scene(rng, held_out=False)
        image = f"{name}-{index:05d}.png"
        draw(scene, rng).save(folder / "images" / image, compress_level=1)
        new = {NEW_KIND: (NEW_QUESTION, f"{scene.colour} {scene.shape}")}
        records.append(make_llava_record(image, image, [(questions(scene) | new)[kind]]) | {"kind": kind})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def train_base(folder: Path) -> Path:
    """Return the model that answers the first four kinds of questions; train it unless it exists."""
    final = folder / "finetune" / "final"
    if not final.is_dir():
        write_scenes(folder / "data")
        build_tiny_parts(folder / "parts")
        pretrained = train("demo-pretrain", folder, "pretrain.json", [])
        train("demo-finetune", folder, "finetune.json", [f"trainer.from_pretrained={pretrained}"])
    return final


def finetune(folder: Path, base: Path, share: float, output: Path, overrides: dict[str, float]) -> dict[str, Any]:
    """Train on the new kind with a share of replay, and return `results.json` of the comparison.

    If `output` already has this file, nothing is trained.
    """
    data, results = folder / "data", output / "before_after" / "results.json"
    if results.is_file():
        return json.loads(results.read_text(encoding="utf-8"))
    replayed = json.loads((data / "finetune.json").read_text(encoding="utf-8"))
    sources = {"new": ("new.json", 1.0), "replay": ("finetune.json", weight_of_source(share, NUM_TRAIN, len(replayed)))}
    words = [
        word
        for name, (file, weight) in sources.items()
        if weight
        for word in (f"dataset.sources.{name}.path={data / file}", f"dataset.sources.{name}.weight={weight}")
    ]
    settings = {
        "trainer.from_pretrained": base, "trainer.output_dir": output, "trainer.before_after": "true",
        "trainer.before_after_probe": 0, "trainer.before_after_samples": NUM_HELD_OUT * (len(QUESTION_KINDS) + 1),
        "trainer.per_device_eval_batch_size": 50, "dataset.path": "null", "dataset.eval_path": data / "held-out.json",
        "inference.max_new_tokens": 8, "trainer.num_samples": 0,
    } | overrides  # fmt: skip
    train("demo-finetune", folder, "new.json", [*words, *(f"{key}={value}" for key, value in settings.items())])
    return json.loads(results.read_text(encoding="utf-8"))


def read_changes(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a map from kind of question to the change of right answers."""
    changes = (change for change in results["changes"] if (change["split"], change["is_blank"]) == ("kind", False))
    return {change["group"]: change for change in changes if change["measure"] == "exact_match"}


def draw_shares(found: dict[float, dict[str, dict[str, Any]]], path: Path) -> None:
    """Plot the change of right answers for each kind of question and share of replay, with intervals."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate((NEW_KIND, *QUESTION_KINDS)):
        places = [place + 0.08 * (number - 2) for place in range(len(found))]
        differences = [changes[kind]["difference"] for changes in found.values()]
        values = [difference["value"] for difference in differences]
        errors = [
            [difference["value"] - difference["low"] for difference in differences],
            [difference["high"] - difference["value"] for difference in differences],
        ]
        axes.errorbar(places, values, yerr=errors, marker="o", label=kind, linestyle="--" if number else "-")
    axes.set_xticks(range(len(found)), [f"{share:.0%}" for share in found])
    axes.set(xlabel="share of replay", ylabel="change in the share of right answers")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(title="kind of question")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/forgetting"))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="shares of replay (%(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=LEARNING_RATE, help="learning rate of the finetunes (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the order of samples (%(default)s)")
    args = parser.parse_args()
    base = train_base(args.output)
    data = args.output / "data"
    write_records(data, "new", [NEW_KIND], NUM_TRAIN, seed=1)
    write_records(data, "held-out", [NEW_KIND, *QUESTION_KINDS], NUM_HELD_OUT, seed=2)
    folder = args.output / f"learning-rate-{args.learning_rate:g}-seed-{args.seed}"
    overrides = {f"trainer.learning_rate.{part}_learning_rate": args.learning_rate for part in PARTS}
    overrides["trainer.seed"] = args.seed
    results = {
        share: finetune(args.output, base, share, folder / f"replay-{share:g}", overrides) for share in args.shares
    }
    found = {share: read_changes(result) for share, result in results.items()}
    kinds = (NEW_KIND, *QUESTION_KINDS)
    print("\nShare of right answers after the finetune (before it), by kind of question\n")
    print("replay  " + "".join(f"{kind:>14}" for kind in kinds))
    for share, changes in found.items():
        cells = (f"{changes[kind]['after']:.0%} ({changes[kind]['before']:.0%})" for kind in kinds)
        print(f"{share:>6.0%}  " + "".join(f"{cell:>14}" for cell in cells))
    print(f"\nFirst run: {results[args.shares[0]]['replay']['text']}")
    content = {
        f"{share:g}": {"changes": changes, "replay": results[share]["replay"]} for share, changes in found.items()
    }
    (folder / "forgetting.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_shares(found, folder / "forgetting.png")


if __name__ == "__main__":
    main()
