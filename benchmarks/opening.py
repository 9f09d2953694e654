"""Opens a large set of records, and prints seconds and memory of the process as one line of JSON. See `data.py`.

    python -m benchmarks.opening index|json|start|empty FOLDER

Only the modules that a measurement needs are imported, before its clock starts.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure_process(work: Callable[[], Any]) -> dict[str, float]:
    """Return seconds of some work, and the peak and unique memory of the process while it holds the result."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = read_kilobytes("status", "VmHWM")  # `resource` includes the parent's peak
    unique = read_kilobytes("smaps_rollup", "Private_Clean") + read_kilobytes("smaps_rollup", "Private_Dirty")
    del result
    return {"seconds": seconds, "peak_mb": peak / 1000, "unique_mb": unique / 1000}


def read_kilobytes(file: str, name: str) -> int:
    """Return the number in a line of a file in `/proc/self`."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def index(folder: Path) -> dict[str, float]:
    """Build the index of the large set."""
    from vlm.data.records.index import IndexedRecords

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        return measure_process(lambda: IndexedRecords(folder / "large.json", Path(cache)))


def load_json(folder: Path) -> dict[str, float]:
    """Read the whole file with `json.loads`."""
    return measure_process(lambda: json.loads((folder / "large.json").read_text()))


def measure_start(folder: Path) -> dict[str, float]:
    """Open the large set as training does, up to the first sample."""
    from vlm.data.dataset import load_dataset

    assert load_dataset
    processor = make_processor()

    def work() -> Any:
        data = dataset(folder, "large.json", processor)
        return data, data[0]

    return measure_process(work)


def measure_empty(folder: Path) -> dict[str, float]:
    """Import modules and make the processor, which a worker has anyway."""
    from vlm.data.dataset import load_dataset

    assert load_dataset
    processor = make_processor()
    return measure_process(lambda: processor)


def dataset(folder: Path, name: str, processor: Any) -> Any:
    """Open a set of records as training does."""
    from vlm.config.dataset_schema import DatasetConfig
    from vlm.data.dataset import load_dataset
    from vlm.data.encoding.sample_encoder import SampleEncoder

    config = DatasetConfig(
        path=str(folder / name), image_folder=str(folder / "images"), cache_dir=str(folder / "cache"), check_samples=0
    )
    return load_dataset(config, SampleEncoder(processor, 2048, truncate=True))


def make_processor() -> Any:
    """Return this framework's processor."""
    from vlm.models import VLMProcessor

    image_processor, tokenizer = load_parts()
    return VLMProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template, tokens_per_image=576)


def load_parts() -> tuple[Any, Any]:
    """Return CLIP's image processor at 336 pixels, and a tokenizer with an image token."""
    from transformers import CLIPImageProcessor

    from vlm.demo.tiny_models import make_word_tokenizer

    side = {"height": 336, "width": 336}
    tokenizer = make_word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side), tokenizer


MEASURES = {"index": index, "json": load_json, "start": measure_start, "empty": measure_empty}

if __name__ == "__main__":
    print(json.dumps(MEASURES[sys.argv[1]](Path(sys.argv[2]))))
