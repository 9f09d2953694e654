"""Copies in a run's data, for `vlm data stats`: near copies within the training records, and overlap with evaluation.

From a source with too many records, an evenly spread selection is compared. A run compares all of them with
`dataset.overlap=warn` or `refuse`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.shown import presentable
from vlm.data.dataset import draw_records
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.overlap import NearCopies, Overlap, ScannedRecord, find_near_copies, find_overlap, scan
from vlm.data.sources import Source, make_sources


def describe_copies(config: DatasetConfig, encoder: SampleEncoder, limit: int, seed: int = 0) -> str:
    """Compare records of a run, at most `limit` of each source; return what was found, as text for a terminal."""
    sources = make_sources(config, encoder)
    training, told = _scan_some(sources, limit, seed)
    lines = ["── copies", *(f"  {line}" for line in told), *_near_copies_as_lines(find_near_copies(training))]
    others = {"dataset.eval_path": (config.eval_path, config.eval_image_folder)}
    others["dataset.test_path"] = (config.test_path, config.test_image_folder)
    for key, (path, folder) in others.items():
        if path is None:
            continue
        other = replace(config, path=path, image_folder=folder or config.image_folder, sources={}, max_samples=None)
        records, told = _scan_some(make_sources(other, encoder), limit, seed)
        lines += [f"── overlap with {key}", *(f"  {line}" for line in told)]
        lines += _overlap_as_lines(find_overlap(training, records))
    return "\n".join(lines)


def _scan_some(sources: Sequence[Source], limit: int, seed: int) -> tuple[list[ScannedRecord], list[str]]:
    """Scan records of each source, and say which sources were not scanned completely."""
    records: list[ScannedRecord] = []
    told = []
    for source in sources:
        numbers = draw_records(len(source), source.config.max_samples, seed)
        if len(numbers) > limit:
            told.append(f"{source.name}: {limit:,} of {len(numbers):,} records are compared (--compare N)")
            numbers = numbers[np.linspace(0, len(numbers) - 1, limit).astype(int)]
        records += scan(source, numbers)
    return records, told


def _near_copies_as_lines(found: NearCopies) -> list[str]:
    lines = [f"  {found.copies:,} of {found.images:,} different image files look like an earlier one"]
    if found.copies:
        lines += [f"    {presentable(example)}" for example in found.examples]
        lines.append("  vlm data clean --near-duplicates leaves them out")
    return lines


def _overlap_as_lines(overlap: Overlap) -> list[str]:
    lines = [f"  {overlap}"]
    if overlap.is_any:
        lines += [f"    {presentable(example)}" for example in overlap.examples]
        lines.append("  dataset.overlap=refuse stops a run where there is any")
    return lines
