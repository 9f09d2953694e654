"""Speed of answers to a file of records: in batches against one by one, and about one image against many.

    python -m benchmarks.generation [--gpu] [--records N] [--repeats N] [--tokens N]

The model has the shapes of SmolLM2-135M (text) and ViT-B/16 at 224 pixels (images), with random weights, scaled so that
answers depend on questions and images. All answers are forced to the same length. All variants work as
`vlm generate --input` does, on records with questions of 5 to 60 words. The first ids of answers in batches must be
those of answers one by one; different questions, and different images, must have different answers, as the comparison
would prove nothing otherwise.
"""

import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.report import Row, compared, report
from benchmarks.shapes import SHAPES, compose_model, write_parts
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import SEED, silence_libraries
from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.schema import InferenceConfig
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.generate_file import generate_file

WORDS = ("what", "is", "the", "colour", "of", "circle", "square", "in", "this", "picture", "red", "green", "blue")
BATCH_SIZE = 16
"""The default of `vlm generate --batch-size`."""
NUM_COMPARED_TOKENS = 32
"""Number of ids that have to agree between batches. Batches of another size round differently; sooner or later two ids
are equally likely within rounding, and a random model diverges from there."""


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        scale: factor of the matrices of connector and language model, see `save`.
        records: number of records in each file.
        repeats: how often the variants take turns.
        tokens: number of tokens in an answer.
        bf16: whether the model is loaded in bfloat16.
    """

    shape: str = "smol"
    scale: float = 2.0
    records: int = 16
    repeats: int = 3
    tokens: int = InferenceConfig.max_new_tokens
    bf16: bool = False


GPU = Size(bf16=True)
"""The size for one large GPU."""


class FixedLengthModel(VisionLanguageModel):
    """A model whose answers have the largest allowed length, and are returned as ids, as text would drop some ids."""

    def generation_options(self, settings: InferenceConfig) -> dict[str, Any]:
        """Return the usual options, with the least length set to the greatest."""
        return {**super().generation_options(settings), "min_new_tokens": settings.max_new_tokens}

    def answers(self, inputs: dict[str, torch.Tensor], settings: InferenceConfig, **kwargs: object) -> list[str]:
        """Return the ids of each answer, between blanks."""
        return [" ".join(map(str, ids)) for ids in self.answer_ids(inputs, settings, **kwargs)]


def save(folder: Path, size: Size) -> None:
    """Write a checkpoint with random weights.

    Unscaled random layers add almost nothing to a token's embedding, so a model with tied embeddings would repeat the
    last token, whatever the question.
    """
    write_parts(folder, SHAPES[size.shape])
    model, processor = compose_model(folder, SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("visual_encoder"):
                parameter.mul_(size.scale)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def write_records(folder: Path, number: int) -> None:
    """Write images of noise, and the same questions about an image each (`many`) and about a single image (`one`)."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        pixels = torch.randint(0, 256, (240, 320, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(number)]
    for name, same in (("many", False), ("one", True)):
        records = [
            {"id": index, "image": f"{0 if same else index}.png",
             "conversations": [{"from": "human", "value": f"<image>\n{question}"}]}
            for index, question in enumerate(questions)
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(records))


def time_answers(folder: Path, size: Size, records: str, batch_size: int, tokens: int) -> tuple[float, list[str]]:
    """Return the seconds and the answers of a whole file, by a newly loaded model without cached images."""
    model = FixedLengthModel.load(
        folder / "model", device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="bfloat16" if size.bf16 else "float32",
    )  # fmt: skip
    source = SourceConfig(path=str(folder / f"{records}.json"))
    start = time.perf_counter()
    rows = generate_file(
        model, source, folder / "answers.jsonl", InferenceConfig(max_new_tokens=tokens), cache=folder / "cache",
        fingerprint="", batch_size=batch_size, num_workers=0, max_frames=DatasetConfig.max_frames, overwrite=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert not any(row["error"] for row in rows)
    return seconds, [row["answer"] for row in rows]


VARIANTS = {"one by one": ("many", 1), "in batches": ("many", BATCH_SIZE), "one image": ("one", BATCH_SIZE)}
"""Variant -> the file and the batch size."""


def check_answers(answers: dict[str, list[str]]) -> None:
    """Raise SystemExit where answers in batches are not those one by one, or do not depend on question and image."""
    alone, batched, one_image = (answers[name] for name in VARIANTS)
    starts = [[answer.split()[:NUM_COMPARED_TOKENS] for answer in variant] for variant in (alone, batched)]
    if other := [index for index, (first, second) in enumerate(zip(*starts, strict=True)) if first != second]:
        raise SystemExit(f"answers in batches are not those one by one: records {other}, {answers}")
    if any(len(set(variant)) < len(variant) for variant in (alone, one_image)):
        raise SystemExit(f"different questions have the same answer, so comparing them proves nothing: {answers}")
    if one_image[0].split()[:NUM_COMPARED_TOKENS] != starts[1][0]:
        raise SystemExit(f"the first record, which is the same in both files, has two answers: {answers}")
    if same := [index for index in range(1, len(one_image)) if one_image[index] == batched[index]]:
        raise SystemExit(f"another image gave the same answer, so comparing them proves nothing: {same}, {answers}")


def measure(size: Size, folder: Path) -> tuple[list[Row], dict[str, int]]:
    """Measure all variants in turns, and count answers that are the same in batches and one by one to their last id."""
    save(folder, size)
    write_records(folder, size.records)
    time_answers(folder, size, "many", BATCH_SIZE, 2)  # a warm-up
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    answers: dict[str, list[str]] = {}
    for _ in range(size.repeats):
        for name, (records, batch_size) in VARIANTS.items():
            seconds, answers[name] = time_answers(folder, size, records, batch_size, size.tokens)
            speeds[name].append(size.records / seconds)
    if not size.bf16:  # in half precision, ids are often equally likely
        check_answers(answers)
    same = sum(a == b for a, b in zip(answers["in batches"], answers["one by one"], strict=True))
    rows = [
        compared(
            f"answers of {size.tokens} tokens in batches of {BATCH_SIZE}", speeds["in batches"], speeds["one by one"],
            ("in batches", "one by one"), "records/s", 3.0,
        ),
        compared(
            "questions about one image, in batches", speeds["one image"], speeds["in batches"],
            ("one image", "an image each"), "records/s", 1.2,
        ),
    ]  # fmt: skip
    return rows, {"answers": size.records, "of them the same in batches and one by one to the last id": same}


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("records", "repeats", "tokens")).parse_args()
    size = make_size(args, Size(), GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        report("generation-gpu" if args.gpu else "generation", *measure(size, Path(name)))


if __name__ == "__main__":
    main()
