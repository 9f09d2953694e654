"""Records that are left out of a run: which they are, why, and how many may be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.secrets import mask
from vlm.config.shown import shorten
from vlm.data.encoding.labels import SMALLER_IMAGES
from vlm.data.sample import BadSample, OverLong, group_reasons
from vlm.data.sources import Source
from vlm.data.token_counts import Counts


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why.

    `record` is its index in the source, from 0, None in a stream; `id` the name that it gives itself, or `?`; `file`
    the image that could not be used, if there is one; `policy` the key of `dataset` that decides about such records.
    """

    record: int | None
    id: str
    reason: str
    file: str | None
    source: str
    policy: str = "on_bad_sample"

    @classmethod
    def from_error(cls, error: BadSample, source: Source, record: int | None = None) -> "Skipped":
        """Make the entry for the record of a source that raised an error."""
        policy = "over_length" if isinstance(error, OverLong) else "on_bad_sample"
        texts = (error.sample_id, error.reason, error.file)
        name, reason, file = (mask(text) if text and "://" in text else text for text in texts)  # addresses of shards
        record = None if record is None else source.record_of(record)
        return cls(record, name or "", reason or "", file, source.shown_path, policy)

    def as_error(self, source: Source | None = None) -> ValueError:
        """Return the error to raise if such records are not left out; with their source, it tells its image folder."""
        place = self.source if self.record is None else f"{self.source}, record {self.record}"
        hint = f"dataset.{self.policy}=skip leaves such records out and lists them."
        name = "" if self.id in ("", "?") else f"record {self.id!r}: "
        if "add dataset." in self.reason:  # the records are read once that is added
            return ValueError(shorten(f"{place}: {name}{self.reason}"))
        if self.file is not None:
            hint = f"{explain_folder(source)}. {hint}"
        return ValueError(shorten(f"{place}: {name}{self.reason}. {hint}"))


def explain_folder(source: Source | None) -> str:
    """Return what image paths are relative to."""
    if source is None or source.config.image_folder is not None:
        return "Image paths are relative to dataset.image_folder"
    return (
        "dataset.image_folder is not set, so image paths are relative to the folder of the records, "
        f"{source.folder}; set dataset.image_folder=FOLDER"
    )


def skip_or_raise(source: Source, config: DatasetConfig, record: int, error: BadSample) -> Skipped:
    """Return the entry for a record that is left out; raise ValueError if the policy is `error`."""
    skipped = Skipped.from_error(error, source, record)
    if getattr(config, skipped.policy) in ("error", "split"):  # one that cannot be split
        raise skipped.as_error(source)
    return skipped


def find_unusable(source: Source, counts: Counts, config: DatasetConfig, split: np.ndarray) -> dict[int, Skipped]:
    """Return the counted records that are left out, by index: those with a problem, and those that are too long.

    `split` holds the indices of those that are too long, and whose parts take their place.

    Raises:
        ValueError: a record is left out, and the policy is `error`.
    """
    longest, truncate = source.encoder.longest, source.encoder.truncate
    too_long = counts.needed > longest if truncate else counts.length > longest
    reason = f", at most {longest} are allowed (dataset.max_length, or the language model's positions)"
    shrinks = source.encoder.processor.needs_image_sizes
    if truncate:
        reason = f": cutting it to {longest} would cut an image or every reply"
    elif config.over_length == "split":
        reason = f": a reply with its question and images has more than {longest}, or its template refuses a part"
    errors = dict(counts.problems)
    for place in np.setdiff1d(np.flatnonzero(too_long), split).tolist():
        hint = SMALLER_IMAGES if shrinks and counts.images[place] else ""
        errors[place] = OverLong(counts.ids[place].as_py(), f"{counts.length[place]} tokens{reason}{hint}")
    places = sorted(errors)
    return {place: skip_or_raise(source, config, int(counts.record[place]), errors[place]) for place in places}


def check_skipped_share(path: str, bad: Sequence[BadSample | Skipped], total: int, share: float) -> None:
    """Raise ValueError if more records cannot be used than `dataset.max_skipped` allows."""
    if len(bad) > share * total:
        reasons = group_reasons(bad)[:3]
        listing = "; ".join(f"{reason} ({number})" if number > 1 else reason for reason, number in reasons)
        raise ValueError(
            f"{path}: {len(bad)} of {total} records cannot be used, more than dataset.max_skipped={share} allows. "
            f"Reasons: {listing}{' …' if len(bad) > sum(number for _, number in reasons) else ''}"
        )
