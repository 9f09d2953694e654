"""Answers to a file of records: in batches against one by one, and about one picture against about many.

    python -m benchmarks.generation [--records N] [--repeats N] [--tokens N] [--gpu]

The model has the shapes of SmolLM2-135M (text) and ViT-B/16 at 224 pixels (pictures), with random weights, which end an
answer anywhere: every answer is made so many tokens long. All variants ask as `vlm generate --input` does, records of
questions between 5 and 60 words. Answers in batches are first compared with those one by one: they must be the same.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.features import build
from benchmarks.report import Row, compared, report
from vlm.build import build_model, compose
from vlm.config.schema import (
    ConnectorConfig,
    DatasetConfig,
    InferenceConfig,
    LanguageModelConfig,
    ModelConfig,
    SourceConfig,
    VisualEncoderConfig,
)
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.generate_file import generate_file

WORDS = ("what", "is", "the", "colour", "of", "circle", "square", "in", "this", "picture", "red", "green", "blue")
BATCH = 16
"""What `vlm generate --batch-size` is by default."""


class Unending(VisionLanguageModel):
    """Its answers are as long as they may be."""

    def generation_options(self, settings: InferenceConfig) -> dict[str, Any]:
        """As usual, with the least length set to the greatest."""
        return {**super().generation_options(settings), "min_new_tokens": settings.max_new_tokens}


def save(folder: Path) -> None:
    """Write a checkpoint with random weights."""
    build(folder)
    recipe = ModelConfig(
        visual_encoder=VisualEncoderConfig(str(folder / "visual_encoder")),
        connector=ConnectorConfig("mlp"),
        language_model=LanguageModelConfig(str(folder / "language_model")),
    )
    config, processor = compose(recipe, "chatml", None)
    build_model(recipe, config, processor, torch.float32, 0).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def write_records(folder: Path, number: int) -> None:
    """Write pictures of noise, and the same questions about each its own and about all the same."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for place in range(number):
        pixels = torch.randint(0, 256, (240, 320, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{place}.png")
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(number)]
    for name, same in (("many", False), ("one", True)):
        records = [
            {"id": place, "image": f"{0 if same else place}.png",
             "conversations": [{"from": "human", "value": f"<image>\n{question}"}]}
            for place, question in enumerate(questions)
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(records))


def ask(folder: Path, load: Any, records: str, batch_size: int, tokens: int) -> tuple[float, list[str]]:
    """Seconds and answers of a whole file, by a model that has just been loaded and has seen no picture."""
    model = load()
    source = SourceConfig(path=str(folder / f"{records}.json"))
    begun = time.perf_counter()
    rows = generate_file(
        model, source, folder / "answers.jsonl", InferenceConfig(max_new_tokens=tokens), cache=folder / "cache",
        fingerprint="", batch_size=batch_size, num_workers=0, max_frames=DatasetConfig.max_frames, overwrite=True,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    assert not any(row["error"] for row in rows)
    return seconds, [row["answer"] for row in rows]


def measure(folder: Path, args: argparse.Namespace) -> list[Row]:
    """All variants in turns."""

    def load() -> Unending:
        return Unending.load(
            folder / "model", device="cuda" if args.gpu else "cpu", dtype="bfloat16" if args.gpu else "float32"
        )

    ask(folder, load, "many", BATCH, 2)  # reads what is read once
    variants = {"one by one": ("many", 1), "in batches": ("many", BATCH), "one picture": ("one", BATCH)}
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    answers: dict[str, list[str]] = {}
    for _ in range(args.repeats):
        for name, (records, batch_size) in variants.items():
            seconds, answers[name] = ask(folder, load, records, batch_size, args.tokens)
            speeds[name].append(args.records / seconds)
    if not args.gpu:  # in half precision, batches of other sizes round otherwise
        assert answers["in batches"] == answers["one by one"]
    return [
        compared(
            f"answers of {args.tokens} tokens in batches of {BATCH}", speeds["in batches"], speeds["one by one"],
            ("in batches", "one by one"), "records/s", 3.0,
        ),
        compared(
            "questions about one picture, in batches", speeds["one picture"], speeds["in batches"],
            ("one picture", "a picture each"), "records/s", 1.2,
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser("benchmarks.generation", description=__doc__)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=InferenceConfig.max_new_tokens)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, in bfloat16")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is none")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        write_records(folder, args.records)
        report("generation-gpu" if args.gpu else "generation", measure(folder, args))


if __name__ == "__main__":
    main()
