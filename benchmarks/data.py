"""Data: the speed of the loader, and the cost of opening a set of 665 thousand records.

    python -m benchmarks.data [--records 665000] [--workers 2] [--folder FOLDER]

Everything is generated with a fixed seed: 640x480 JPEGs, and a LLaVA JSON of about the size of LLaVA-665k's. About
eight minutes on two cores, most of them for the first count of all tokens. Each variant runs in separate processes, in
turns with the one that it is compared with.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaProcessor

from benchmarks.opening import dataset, load_parts, make_processor
from benchmarks.report import below, compared, report
from vlm.data.batching.collator import Collator
from vlm.models import VLMProcessor

NUM_IMAGES = 64
BATCH_SIZE = 16
NUM_SAMPLES = 480
NUM_ROUNDS = 7
TEXT = "what is the red circle in this picture there are two blue squares at the top left of a green and a small one"
WORDS = TEXT.split()


def main() -> None:
    """Generate, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the data is generated and kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        generate(folder, args.records)
        report("data", [*loader_rows(folder, args.workers), *index_rows(folder), *start_rows(folder)])


# --- generated data --------------------------------------------------------------------------------------------------


def generate(folder: Path, number: int) -> None:
    """Write the images, a small set of records for the loader, and the large set."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(NUM_IMAGES):
        draw = np.random.default_rng(index)
        shapes = Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noise = np.asarray(shapes).astype(int) + draw.normal(0, 8, (480, 640, 1)).astype(int)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{index}.jpg", quality=90)
    draw = random.Random(0)
    small = [make_record(draw, index, turns=1) for index in range(NUM_SAMPLES)]
    (folder / "small.json").write_text(json.dumps(small))
    if not (folder / "large.json").exists():
        with (folder / "large.json").open("w") as file:
            for index in tqdm(range(number), "generating", unit="record"):
                text = json.dumps(make_record(draw, index, turns=draw.choice((1, 1, 2, 3, 6))))
                file.write(f"{',' if index else '['}\n{text}")
            file.write("\n]\n")


def make_record(draw: random.Random, index: int, turns: int) -> dict[str, Any]:
    """Return a LLaVA record of short questions and answers of several lengths."""
    conversation = []
    for turn in range(turns):
        question = " ".join(draw.choices(WORDS, k=12))
        answer = " ".join(draw.choices(WORDS, k=draw.choice((2, 8, 20, 60))))
        conversation.append({"from": "human", "value": "<image>\n" * (turn == 0) + question})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": f"{index:012d}", "image": f"{index % NUM_IMAGES}.jpg", "conversations": conversation}


# --- the loader ------------------------------------------------------------------------------------------------------


class TransformersDataset(Dataset[Any]):
    """Samples of transformers' own processor, called for each sample."""

    def __init__(self, folder: Path):
        image_processor, tokenizer = load_parts()
        self.processor = LlavaProcessor(
            image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
        )  # fmt: skip
        self.folder = folder
        self.records = json.loads((folder / "small.json").read_text())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        record = self.records[index]
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        image = Image.open(self.folder / "images" / record["image"]).convert("RGB")
        text = self.processor.apply_chat_template(messages)
        return self.processor(images=image, text=text, return_tensors="pt")

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Return a padded batch."""
        rows = [{"input_ids": sample["input_ids"][0]} for sample in samples]
        batch = self.processor.tokenizer.pad(rows, return_tensors="pt")
        return {**batch, "pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}


def loader_rows(folder: Path, workers: int) -> list[Any]:
    """Measure samples per second through decoding, resizing, tokenising and collating."""
    ours, plain = dataset(folder, "small.json", make_processor()), TransformersDataset(folder)
    processor = ours.processor
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": workers, "persistent_workers": True}
    loaders = {
        "vlm": DataLoader(ours, collate_fn=Collator(processor.tokenizer.pad_token_id), **options),
        "transformers": DataLoader(plain, collate_fn=plain.collate, **options),
    }
    measured: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for turn in range(NUM_ROUNDS + 1):
        for (name, loader), normalises in product(loaders.items(), (False, True)):
            start = time.perf_counter()
            for batch in loader:
                if normalises:  # a training step does that on its device
                    processor.normalise(batch["pixel_values"])
            if turn:  # the first round starts the workers
                measured[name, normalises].append(len(ours) / (time.perf_counter() - start))
    difference = max(_max_pixel_difference(ours[index], plain[index], processor) for index in range(NUM_IMAGES))
    print(f"Pixels are at most {difference:.3f} of 255 levels apart")
    if difference > 1:
        raise SystemExit("the two do different work")
    name = f"samples/s, 640x480 JPEG to CLIP-336, {workers} workers"
    labels = ("vlm", "transformers")
    pairs = {normalises: [measured[label, normalises] for label in labels] for normalises in (False, True)}
    return [
        compared(name, *pairs[False], labels, "samples/s", 2.0),
        compared("the same, normalised on the CPU by one more thread", *pairs[True], labels, "samples/s", 1.0),
    ]


def _max_pixel_difference(ours: Any, theirs: Any, processor: VLMProcessor) -> float:
    """Return the largest difference of pixels, in levels of 255."""
    scale = 255 * torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    return ((processor.normalise(ours["pixel_values"]) - theirs["pixel_values"]) * scale).abs().max().item()


# --- the large set ---------------------------------------------------------------------------------------------------


def index_rows(folder: Path) -> list[Any]:
    """Measure time and peak memory of the first opening, against `json.load`."""
    size = (folder / "large.json").stat().st_size
    print(f"large.json: {size / 1e6:.0f} MB")
    indexed, loaded = zip(*[(measure("index", folder), measure("json", folder)) for _ in range(3)], strict=True)
    return [
        compared("json.load's time over the index's", [run["seconds"] for run in loaded],
                 [run["seconds"] for run in indexed], ("json.load", "vlm"), "s", 1.0),
        below("peak memory of the index", [run["peak_mb"] for run in indexed], "vlm", "MB", 1000),
        compared("peak memory of the index over json.load's", [run["peak_mb"] for run in indexed],
                 [run["peak_mb"] for run in loaded], ("vlm", "json.load"), "MB", 1.0, "lower"),
    ]  # fmt: skip


def start_rows(folder: Path) -> list[Any]:
    """Measure the opening of an indexed and counted set, up to the first sample."""
    first = measure("start", folder)
    print(f"First start, with the count of all tokens: {first['seconds']:.0f} s")
    starts = [measure("start", folder) for _ in range(3)]
    empty = [measure("empty", folder) for _ in range(3)]
    loaded = [measure("json", folder) for _ in range(3)]
    base = min(run["unique_mb"] for run in empty)
    return [
        below("second start to the first sample, after the imports", [run["seconds"] for run in starts], "vlm", "s", 3),
        below("unique memory above an empty worker", [run["unique_mb"] - base for run in starts], "vlm", "MB", 400),
        compared("unique memory over json.load's", [run["unique_mb"] - base for run in starts],
                 [run["unique_mb"] for run in loaded], ("vlm", "json.load"), "MB", 1.0, "lower"),
    ]  # fmt: skip


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run a measurement of `opening.py` in a separate process."""
    words = [sys.executable, "-m", "benchmarks.opening", name, str(folder.resolve())]
    process = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
