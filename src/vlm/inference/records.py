"""Asking a model about every record of a file: records to prompts to batches to rows of a table."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.config.schema import SourceConfig
from vlm.data.collate import Collator
from vlm.data.dataset import encoded_item
from vlm.data.prompts import PromptEncoder
from vlm.data.sample import BadSample, Sample
from vlm.data.sources import Source
from vlm.inference.generate import on_device
from vlm.inference.table import Table


def prompt_source(
    model: Any, processor: Any, config: SourceConfig, *, cache: Path, max_frames: int, suffix: Sequence[int] = ()
) -> Source:
    """The records of a file, each as the prompt that it was in training, up to its last reply.

    Args:
        model: the model that is asked: its longest prompt counts.
        processor: its processor.
        config: where the records are and how they are read.
        cache: where indices of records are kept.
        max_frames: of a video.
        suffix: ids behind every prompt.
    """
    longest = model.config.get_text_config().max_position_embeddings
    encoder = PromptEncoder(processor, longest, truncate=False, suffix=tuple(suffix))
    return Source(Path(str(config.path)).name, config, cache, encoder, max_frames)


def fill(
    table: Table, source: Source, processor: Any, device: torch.device, ask: Callable[[dict[str, Any]], Sequence[Any]],
    row: Callable[[Sample, Any, BadSample | None], dict[str, Any]], *, what: str, batch_size: int, num_workers: int,
    left: bool = False, overwrite: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Ask about every record, and write a table; a table that was begun is gone on with.

    Args:
        table: what is written.
        source: the records.
        processor: the model's.
        device: the model's.
        ask: inputs of a batch -> what is said of each row of it.
        row: makes a row of the table of a sample, what was said of it, and why it could not be read (one of the two).
        what: what the progress bar calls it.
        batch_size: records at a time.
        num_workers: processes that read and decode pictures.
        left: whether rows are padded on the left, as generation wants them.
        overwrite: whether what was begun is begun again.

    Returns:
        All rows of the table.

    Raises:
        ValueError: the table was begun with something else.
    """
    done = table.begin(overwrite=overwrite)
    with table.opened() as write, tqdm(total=len(source), initial=done, desc=what, unit="record") as bar:
        for read, batch in prompt_loader(source, processor, done, batch_size, num_workers, left=left):
            said = iter(ask(on_device(batch, processor, device)) if batch else [])
            write([
                row(sample, None if problem is not None else next(said), problem) for sample, problem in read
            ])  # fmt: skip
            bar.update(len(read))
    rows = table.rows()
    table.finish()
    return rows


class Prompts(Dataset[Any]):
    """Records from a number on: each sample, and what the model reads of it or why it cannot be read.

    Of a record that is no sample, what it calls itself and its label are kept.
    """

    def __init__(self, source: Source, start: int):
        self.source, self.start = source, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index: int) -> tuple[Sample, dict[str, Any] | BadSample]:
        sample, record = None, None
        try:
            record = self.source.records[self.start + index]
            sample = self.source.read(record)
            return self._named(sample, index), encoded_item(self.source, sample)
        except BadSample as error:
            label = record.get("label") if isinstance(record, dict) else None
            sample = sample or Sample(error.sample_id, (), label)
            return self._named(sample, index), error

    def _named(self, sample: Sample, index: int) -> Sample:
        """A sample that calls itself nothing is called by its file and its number there, from 0."""
        return sample if sample.id != "?" else replace(sample, id=f"{self.source.name}:{self.start + index}")


def prompt_loader(
    source: Source, processor: Any, start: int, batch_size: int, num_workers: int, *, left: bool
) -> DataLoader[Any]:
    """Batches of (samples with their problem or None, inputs of those that have none), from a record on."""
    collate = Collator.of(processor, left=left)

    def lay_out(rows: list[tuple[Sample, Any]]) -> tuple[list[tuple[Sample, BadSample | None]], dict[str, Any]]:
        read = [(sample, item if isinstance(item, BadSample) else None) for sample, item in rows]
        whole = [item for _, item in rows if not isinstance(item, BadSample)]
        return read, collate(whole) if whole else {}

    return DataLoader(Prompts(source, start), batch_size, collate_fn=lay_out, num_workers=num_workers)
