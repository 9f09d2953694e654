"""Checks of `vlm eval` before a model loads, and where it writes: beside a checkpoint, never inside it.

Imports neither torch nor a model.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from vlm.checks.checkpoint_files import read_object
from vlm.checks.weights import is_of_other_weights
from vlm.config.choices import LOSS_METRICS
from vlm.config.dataset_schema import SourceConfig
from vlm.config.secrets import mask_settings
from vlm.data.sample import BadSample, Sample

NUM_INSPECTED = 100
"""Number of records that are searched for references before a model loads."""

FINAL_FOLDER = "final"
"""The name of the folder of a run's complete model."""


def resolve_output_folder(checkpoint: str, data: str, requested: Path | None) -> Path:
    """Return the folder of an evaluation: the requested one, else `eval/DATA` beside the checkpoint.

    Beside a run's `final` that is in the run's directory. Beside a folder of another name, and for a Hub model (in the
    current folder), the checkpoint's name precedes the data's.

    Args:
        checkpoint: a folder, or a name on the Hub.
        data: the name of the data.
        requested: the folder that the user named.

    Raises:
        ValueError: the folder is within the checkpoint, or cannot be written to.
    """
    folder = Path(checkpoint).resolve()
    if requested is not None:
        output = requested
    elif folder.is_dir():
        output = folder.parent / "eval" / (data if folder.name == FINAL_FOLDER else f"{folder.name}-{data}")
    else:
        output = Path("eval") / f"{checkpoint.replace('/', '--')}-{data}"
    if folder.is_dir() and output.resolve().is_relative_to(folder):
        raise ValueError(
            f"--output {output}: this is inside the checkpoint, which is never changed; choose another folder"
        )
    parent = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{output}: {parent} cannot be written to; choose a folder with --output")
    return output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output


def check_no_results(folder: Path, checkpoint: str, *, overwrite: bool) -> None:
    """Raise ValueError where a folder has results already, which says so if a checkpoint has other weights since."""
    file = folder / "results.json"
    if not file.exists() or overwrite:
        return
    content = read_object(file)
    if Path(checkpoint).is_dir() and is_of_other_weights(content, Path(checkpoint).absolute().parent):
        raise ValueError(
            f"{file} exists, but is of weights that {checkpoint} no longer has; replace it with --overwrite, or choose "
            "another --output"
        )
    raise ValueError(f"{file} exists; choose another --output, or add --overwrite")


def read_first_samples(config: SourceConfig, option: str) -> list[Sample]:
    """Return the samples of a file's first records, without those that cannot be read.

    Args:
        config: the file, its format and its images.
        option: the option that named the file, for messages.

    Raises:
        ValueError: the file has no records, or none of the first ones can be read; with the format that they seem to
            have.
    """
    from vlm.data.cache import resolve_cache_folder
    from vlm.data.records.fields import label_record
    from vlm.data.records.formats import get_reader
    from vlm.data.records.guess import with_hint
    from vlm.data.records.open import open_records
    from vlm.data.records.positions import value_or_bad_sample

    assert config.path is not None
    records = open_records(
        config.path,
        resolve_cache_folder(None),
        split=config.split,
        subset=config.subset,
        follow_links=config.follow_links,
    )
    if not len(records):
        raise ValueError(f"{option} {config.path}: the file has no records")
    folder = Path(config.image_folder or Path(config.path).parent)
    read = get_reader(config.format)

    def read_sample(number: int) -> Sample:
        """Read a record by its index."""
        return read(records[number], folder, **config.options)

    first = [value_or_bad_sample(read_sample, number) for number in range(min(len(records), NUM_INSPECTED))]
    samples = [sample for sample in first if not isinstance(sample, BadSample)]
    if not samples:
        record, reason = value_or_bad_sample(lambda number: records[number], 0), cast(BadSample, first[0])
        if not isinstance(record, BadSample):
            reason = with_hint(reason, record, config.format, config.options, "clean")
        is_unset = reason.file is not None and config.image_folder is None
        hint = f"; without --image-folder, image paths are relative to the folder of the records, {folder}" * is_unset
        raise ValueError(
            f"{option} {config.path}: none of the first {len(first)} records can be read; "
            f"{label_record(0, reason.sample_id)}: {reason.reason}{hint}"
        )
    return samples


def check_references(config: SourceConfig, names: Sequence[str]) -> None:
    """Refuse a file whose first records have no references.

    Raises:
        ValueError: the file has no records; none of the first ones has a reply or `answers`; or, for losses, a reply.
    """
    samples = read_first_samples(config, "--data")
    have_replies = any(turn.role == "assistant" for sample in samples for turn in sample.turns)
    have_references = any(sample.references or sample.turns[-1].role == "assistant" for sample in samples)
    loss_names = [name for name in names if name in LOSS_METRICS]
    if loss_names and not have_replies:
        needing = ", ".join(loss_names)
        raise ValueError(
            f"--data {config.path}: {needing} needs records with replies; the first {len(samples)} have none"
        )
    if len(loss_names) < len(names) and not have_references:
        raise ValueError(
            f"--data {config.path}: the first {len(samples)} records end with no reply and list no `answers`, which "
            "an answer can be compared with; vlm generate --input writes answers without measuring them"
        )


def write_json(folder: Path, content: Mapping[str, object]) -> None:
    """Write `results.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(mask_settings(content), indent=2, ensure_ascii=False, default=str)
    (folder / "results.json").write_text(f"{text}\n", encoding="utf-8")


def write_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as JSON lines; no file where there are none."""
    if rows:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
