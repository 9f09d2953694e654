"""Opening a large set of records, in a process of its own: seconds and memory as one line of JSON. See `data.py`.

    python -m benchmarks.opening index|json|start|empty FOLDER

What a measurement needs is imported before its clock starts, and nothing else.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure_process(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, peak memory and unique memory of a process once it has done some work and holds what came of it."""
    begun = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - begun
    peak = read_kilobytes("status", "VmHWM")  # what `resource` tells began with the parent's
    unique = read_kilobytes("smaps_rollup", "Private_Clean") + read_kilobytes("smaps_rollup", "Private_Dirty")
    del kept
    return {"seconds": seconds, "peak_mb": peak / 1000, "unique_mb": unique / 1000}


def read_kilobytes(file: str, name: str) -> int:
    """A line of a file that the kernel keeps about this process."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def index(folder: Path) -> dict[str, float]:
    """The index of the large set, made anew."""
    from vlm.data.records.index import IndexedRecords

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        return measure_process(lambda: IndexedRecords(folder / "large.json", Path(cache)))


def load_json(folder: Path) -> dict[str, float]:
    """What a program does that reads the whole file."""
    return measure_process(lambda: json.loads((folder / "large.json").read_text()))


def measure_start(folder: Path) -> dict[str, float]:
    """The large set as training opens it, up to the first sample."""
    from vlm.data.dataset import load_dataset

    assert load_dataset
    processor = make_processor()

    def work() -> Any:
        data = dataset(folder, "large.json", processor)
        return data, data[0]

    return measure_process(work)


def measure_empty(folder: Path) -> dict[str, float]:
    """The imports, and the processor that a worker has anyway."""
    from vlm.data.dataset import load_dataset

    assert load_dataset
    processor = make_processor()
    return measure_process(lambda: processor)


def dataset(folder: Path, name: str, processor: Any) -> Any:
    """A set of records as training opens it."""
    from vlm.config.schema import DatasetConfig
    from vlm.data.dataset import load_dataset
    from vlm.data.encoding.sample_encoder import SampleEncoder

    config = DatasetConfig(
        path=str(folder / name), image_folder=str(folder / "images"), cache_dir=str(folder / "cache"), check_samples=0
    )
    return load_dataset(config, SampleEncoder(processor, 2048, truncate=True))


def make_processor() -> Any:
    """This framework's processor."""
    from vlm.models import VLMProcessor

    image_processor, tokenizer = load_parts()
    return VLMProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template, tokens_per_image=576)


def load_parts() -> tuple[Any, Any]:
    """CLIP's image processor at 336 pixels, and a tokenizer with an image token."""
    from transformers import CLIPImageProcessor

    from vlm.demo.tiny_models import make_word_tokenizer

    side = {"height": 336, "width": 336}
    tokenizer = make_word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side), tokenizer


MEASURES = {"index": index, "json": load_json, "start": measure_start, "empty": measure_empty}

if __name__ == "__main__":
    print(json.dumps(MEASURES[sys.argv[1]](Path(sys.argv[2]))))
