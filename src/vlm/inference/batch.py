"""Asking a model about every record of a file: records to prompts to batches to rows of a table."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.config.schema import SourceConfig
from vlm.data.batching.collator import Collator
from vlm.data.cache import json_digest
from vlm.data.dataset import encode_sample
from vlm.data.encoding.labels import Encoded
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.sample import BadSample, MediaSize, Sample
from vlm.data.sources import Source
from vlm.inference.generate import check_length, on_device
from vlm.inference.resumable_table import ResumableTable

WINDOW_BATCHES = 8
"""So many batches of records are read before they are put together by length; up to twice as many are in memory."""


def prompt_source(
    model: Any, processor: Any, config: SourceConfig, *, cache: Path, max_frames: int, suffix: Sequence[int] = (),
    answer_tokens: int = 0,
) -> Source:  # fmt: skip
    """The records of a file, each as the prompt that it was in training, up to its last reply.

    Args:
        model: the model that is asked: its longest prompt counts.
        processor: its processor.
        config: where the records are and how they are read.
        cache: where indices of records are kept.
        max_frames: of a video.
        suffix: ids behind every prompt.
        answer_tokens: tokens that an answer may have; a prompt that leaves less is refused.

    Raises:
        ValueError: no prompt leaves so much.
    """
    longest = model.config.get_text_config().max_position_embeddings
    check_length(1, longest, answer_tokens)
    encoder = FullPromptEncoder(processor, longest, truncate=False, suffix=tuple(suffix), answer_tokens=answer_tokens)
    return Source(Path(str(config.path)).name, config, cache, encoder, max_frames)


@dataclass(frozen=True)
class FullPromptEncoder(PromptEncoder):
    """Encodes prompts that a model is asked.

    Attributes:
        room: tokens that its answer may have.
    """

    answer_tokens: int = 0

    def __call__(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Ids of a prompt.

        Raises:
            BadSample: it cannot be used, or is too long.
        """
        encoded = self.encode(sample, sizes)
        try:
            check_length(len(encoded.input_ids), self.longest, self.answer_tokens)
        except ValueError as error:
            raise BadSample(sample.id, str(error)) from error
        return encoded


def fill_table(
    table: ResumableTable, source: Source, processor: Any, device: torch.device, run_batch: Callable[[dict[str, Any]], Sequence[Any]],
    row: Callable[[Sample, Any, BadSample | None], dict[str, Any]], *, progress_label: str, batch_size: int, num_workers: int,
    left: bool = False, seed: int | None = None, overwrite: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Ask about every record, and write a table; a table that was begun is gone on with.

    Args:
        table: what is written.
        source: the records.
        processor: the model's.
        device: the model's.
        run_batch: inputs of a batch -> what is said of each row of it.
        row: makes a row of the table of a sample, what was said of it, and why it could not be read (one of the two).
        progress_label: what the progress bar calls it.
        batch_size: records at a time.
        num_workers: processes that read and decode images.
        left: whether rows are padded on the left, as generation wants them.
        seed: of what is drawn at random, anew for each batch, so that it is the same wherever the table was stopped;
            None: chance.
        overwrite: whether what was begun is begun again.

    Returns:
        All rows of the table, in the order of the records.

    Raises:
        ValueError: the table was begun with something else.
    """
    done = table.begin_or_resume(overwrite=overwrite)
    collate = Collator.of(processor, left=left)
    with (
        table.open_writer() as write,
        tqdm(total=len(source), initial=len(done), desc=progress_label, unit="record") as bar,
    ):
        for window in read_windows(source, done, batch_size, num_workers):
            for batch in batch_by_length(window, batch_size):
                numbers = [one.number for one in batch]
                if done.issuperset(numbers):
                    continue
                if seed is not None:
                    torch.manual_seed(int(json_digest(seed, numbers[0])[:15], 16))
                said = run_batch(on_device(collate([one.inputs for one in batch]), processor, device))
                write((one.number, row(one.sample, found, None)) for one, found in zip(batch, said, strict=True))
                bar.update(len(set(numbers) - done))
            bad = [one for one in window if one.problem is not None and one.number not in done]
            write((one.number, row(one.sample, None, one.problem)) for one in bad)
            bar.update(len(bad))
    rows = table.rows()
    table.finalize()
    return rows


def format_media_paths(sample: Sample, problem: BadSample | None) -> str:
    """The files that a record shows, or the one that its problem is about; the cell `image_path` of its row."""
    if problem is not None and problem.file is not None:
        return problem.file
    return ";".join(map(str, sample.media))


class PromptDataset(Dataset[Any]):
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
            return self._with_id(sample, index), encode_sample(self.source, sample)
        except BadSample as error:
            label = record.get("label") if isinstance(record, dict) else None
            sample = sample or Sample(error.sample_id, (), label)
            return self._with_id(sample, index), error

    def _with_id(self, sample: Sample, index: int) -> Sample:
        """A sample that calls itself nothing is called by its file and its number there, from 0."""
        return sample if sample.id != "?" else replace(sample, id=f"{self.source.name}:{self.start + index}")


@dataclass(frozen=True)
class Prompt:
    """A record that was read.

    Attributes:
        number: its place in the source.
        sample: what it is.
        inputs: what the model reads of it; nothing where that cannot be.
        problem: why it cannot be read.
    """

    number: int
    sample: Sample
    inputs: dict[str, Any]
    problem: BadSample | None = None


def read_windows(
    source: Source, done: Collection[int], batch_size: int, num_workers: int
) -> Iterator[list[Prompt]]:  # fmt: skip
    """Records in pieces of `WINDOW` batches, from the first piece on in which one is not done yet.

    The pieces begin at the same records wherever a run was stopped, so that the same batches are made of them.
    """
    size = WINDOW_BATCHES * batch_size
    first = next((number for number in range(len(source)) if number not in done), None)
    if first is None:
        return
    start = first - first % size
    # What data workers hand over as tensors would hold an open file for each, of which a process has few. They read a
    # window ahead, so that the next one is there when this one has been asked.
    loader = DataLoader(
        PromptDataset(source, start), batch_size, collate_fn=_as_arrays, num_workers=num_workers,
        prefetch_factor=-(-WINDOW_BATCHES // num_workers) if num_workers else None,
    )  # fmt: skip
    rows = enumerate((row for chunk in loader for row in chunk), start)
    while window := [_make_prompt(number, *row) for number, row in islice(rows, size)]:
        yield window


def batch_by_length(window: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """The records of a window that can be asked, those of like length together, the longest first.

    The longest of a window come first, so that what the memory does not hold shows early.
    """
    whole = [one for one in window if one.problem is None]
    order = sorted(whole, key=lambda one: len(one.inputs["input_ids"]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _as_arrays(rows: Sequence[tuple[Sample, Any]]) -> list[tuple[Sample, Any]]:
    return [
        (sample, item if isinstance(item, BadSample) else
         {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in item.items()})
        for sample, item in rows
    ]  # fmt: skip


def _make_prompt(number: int, sample: Sample, item: Any) -> Prompt:
    if isinstance(item, BadSample):
        return Prompt(number, sample, {}, item)
    inputs = {name: torch.from_numpy(one) if isinstance(one, np.ndarray) else one for name, one in item.items()}
    return Prompt(number, sample, inputs)
