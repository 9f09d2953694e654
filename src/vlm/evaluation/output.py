"""What `vlm eval` refuses before a model loads, and where it writes: beside a checkpoint, never inside it.

Imports neither torch nor a model.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.config.schema import SourceConfig
from vlm.data.sample import BadSample, Sample

NUM_INSPECTED = 100
"""So many records are looked at for references before a model loads."""

FINAL_FOLDER = "final"
"""The folder of a run's complete model."""


def resolve_output_folder(checkpoint: str, data: str, requested: Path | None) -> Path:
    """The folder of an evaluation: as given, else `eval/DATA` beside the checkpoint.

    Beside a run's `final` that is the run's directory; beside a folder of another name, and for a model of the Hub
    (whose place is the current folder), the checkpoint's name stands before the data's.

    Args:
        checkpoint: a folder, or a name on the Hub.
        data: what the data is called.
        requested: what the user asked for.

    Raises:
        ValueError: it is within the checkpoint, or cannot be written to.
    """
    folder = Path(checkpoint)
    local = folder.is_dir()
    if requested is not None:
        place = requested
    elif local:
        whole = folder.resolve()
        place = whole.parent / "eval" / (data if whole.name == FINAL_FOLDER else f"{whole.name}-{data}")
    else:
        place = Path("eval") / f"{checkpoint.replace('/', '--')}-{data}"
    if local and folder.resolve() in (place.resolve(), *place.resolve().parents):
        raise ValueError(f"--output {place}: this is within the checkpoint, which stays as it is; name another folder")
    above = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{place}: {above} cannot be written to; name a folder with --output")
    return place


def check_no_results(place: Path, *, overwrite: bool) -> None:
    """Raise ValueError where results are there already."""
    if (place / "results.json").exists() and not overwrite:
        raise ValueError(f"{place / 'results.json'} exists; name another folder with --output, or give --overwrite")


def check_references(config: SourceConfig, names: Sequence[str]) -> None:
    """Refuse a file whose first records hold nothing that answers could be measured against.

    Raises:
        ValueError: it has no records; or none of the first ones has a reply, `answers` or, for losses, a reply.
    """
    from vlm.data.cache import resolve_cache_folder
    from vlm.data.records.formats import get_reader
    from vlm.data.records.open import open_records, value_or_bad_sample
    from vlm.evaluation.text_metrics import LOSS

    assert config.path is not None
    records = open_records(config.path, resolve_cache_folder(None), split=config.split, subset=config.subset)
    if not len(records):
        raise ValueError(f"--data {config.path}: it has no records")
    folder = Path(config.image_folder or Path(config.path).parent)
    read = get_reader(config.format)

    def sample(place: int) -> Sample:
        record = records[place]
        if isinstance(record, BadSample):
            raise record
        return read(record, folder, **config.options)

    first = [value_or_bad_sample(sample, place) for place in range(min(len(records), NUM_INSPECTED))]
    bad = [one for one in first if isinstance(one, BadSample)]
    samples = [one for one in first if not isinstance(one, BadSample)]
    if not samples:
        raise ValueError(f"--data {config.path}: none of the first {len(first)} records can be read; {bad[0]}")
    replied = any(turn.role == "assistant" for one in samples for turn in one.turns)
    known = any(one.references or one.turns[-1].role == "assistant" for one in samples)
    if LOSS in names and not replied:
        raise ValueError(f"--data {config.path}: loss needs records with replies; the first {len(first)} have none")
    if set(names) != {LOSS} and not known:
        raise ValueError(
            f"--data {config.path}: the first {len(first)} records end with no reply and list no `answers`, which "
            "answers could be held against; vlm generate --input writes answers without measuring them"
        )


def write_json(place: Path, content: dict[str, Any]) -> None:
    """Write `results.json`."""
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    (place / "results.json").write_text(f"{text}\n", encoding="utf-8")
