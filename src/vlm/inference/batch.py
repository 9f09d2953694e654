"""Running a model on every record of a file: from records to prompts, batches and rows of a table."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from vlm.assembly.language_models import max_positions
from vlm.config.dataset_schema import SourceConfig
from vlm.data.batching.collator import Collator
from vlm.data.cache import json_digest
from vlm.data.dataset import encode_blank_sample, encode_sample
from vlm.data.encoding.labels import Encoded
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, MediaSize, Sample
from vlm.data.sources import Source
from vlm.data.surrogates import find_surrogate
from vlm.inference.generate import check_length, on_device
from vlm.inference.resumable_table import ResumableTable

WINDOW_BATCHES = 8
"""Number of batches that are read before they are sorted by length; up to twice as many are in memory."""


def prompt_source(
    model: PreTrainedModel,
    processor: Processor,
    config: SourceConfig,
    *,
    cache: Path,
    max_frames: int,
    suffix: Sequence[int] = (),
    answer_tokens: int = 0,
) -> Source:
    """Return the records of a file, each as the prompt of training, up to its last reply.

    Args:
        model: the model; its number of positions bounds a prompt.
        processor: the model's processor.
        config: where the records are and how to read them.
        cache: the folder of record indices.
        max_frames: the largest number of frames read from a video.
        suffix: ids to append to every prompt.
        answer_tokens: the largest number of tokens in an answer; a prompt that leaves fewer positions is refused.

    Raises:
        ValueError: the model has fewer positions than `answer_tokens`.
    """
    longest = max_positions(model.config)
    check_length(1, longest, answer_tokens)
    encoder = FullPromptEncoder(processor, longest, truncate=False, suffix=tuple(suffix), answer_tokens=answer_tokens)
    return Source(Path(str(config.path)).name, config, cache, encoder, max_frames)


@dataclass(frozen=True)
class FullPromptEncoder(PromptEncoder):
    """Encodes prompts for generation; those that leave fewer positions than `answer_tokens` are refused."""

    answer_tokens: int = 0

    def __call__(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids of a prompt; raise BadSample where the sample cannot be used, or is too long."""
        encoded = self.encode(sample, sizes)
        try:
            check_length(len(encoded.input_ids), self.longest, self.answer_tokens)
        except ValueError as error:
            raise BadSample(sample.id, str(error)) from error
        return encoded


Result = TypeVar("Result")
Row = dict[str, object]
"""A row of a table: column -> cell."""


def fill_table(
    table: ResumableTable, source: Source, device: torch.device,
    run_batch: Callable[[dict[str, Tensor]], Sequence[Result]],
    row: Callable[[Sample, Result | None, BadSample | None], Row], *, progress_label: str, batch_size: int,
    num_workers: int, left: bool = False, seed: int | None = None, overwrite: bool = False, is_blank: bool = False,
) -> list[Row]:  # fmt: skip
    """Run a model on every record, write a table, and return its rows in the order of the records.

    Args:
        table: the table to write; one that was begun is resumed.
        source: the records.
        device: the model's device.
        run_batch: inputs of a batch -> the result for each of its rows.
        row: makes a row of the table from a sample, and its result or the reason why it could not be read.
        progress_label: the label of the progress bar.
        batch_size: number of records in a batch.
        num_workers: number of processes that read and decode images.
        left: whether to pad on the left, as generation needs.
        seed: seeds sampling anew for each batch, so that a resumed table is the same; None: not seeded.
        overwrite: whether to start over where a table was begun.
        is_blank: whether blank images take the place of all images.

    Raises:
        ValueError: the table was begun with other records, options or another checkpoint.
    """
    done = table.begin_or_resume(overwrite=overwrite)
    processor = source.encoder.processor
    collate = Collator.of(processor, left=left)
    with (
        table.open_writer() as write,
        tqdm(total=len(source), initial=len(done), desc=progress_label, unit="record", disable=None) as bar,
    ):
        for window in read_windows(source, done, batch_size, num_workers, is_blank=is_blank):
            for batch in batch_by_length(window, batch_size):
                numbers = [prompt.number for prompt in batch]
                if done.issuperset(numbers):
                    continue
                if seed is not None:
                    torch.manual_seed(int(json_digest(seed, numbers[0])[:15], 16))
                results = run_batch(on_device(collate([prompt.inputs for prompt in batch]), processor, device))
                pairs = zip(batch, results, strict=True)
                write((prompt.number, row(prompt.sample, result, None)) for prompt, result in pairs)
                bar.update(len(set(numbers) - done))
            bad = [prompt for prompt in window if prompt.problem is not None and prompt.number not in done]
            write((prompt.number, row(prompt.sample, None, prompt.problem)) for prompt in bad)
            bar.update(len(bad))
    rows = table.rows()
    table.finalize()
    return rows


def format_media_paths(sample: Sample, problem: BadSample | None) -> str:
    """Return the paths of a record's media, or the path that its problem is about: the cell `image_path`."""
    if problem is not None and problem.file is not None:
        return problem.file
    return ";".join(map(str, sample.media))


ReadRecord = tuple[Sample, SampleInputs | BadSample]
"""A record as a sample, and its model inputs or the reason why it cannot be read."""


class PromptDataset(Dataset[ReadRecord]):
    """Records from a number on, with blank images if asked for; one that is no sample keeps its id and its label."""

    def __init__(self, source: Source, start: int, *, is_blank: bool = False):
        self.source, self.start = source, start
        self.encode = encode_blank_sample if is_blank else encode_sample

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.source) - self.start

    def __getitem__(self, index: int) -> ReadRecord:
        """Return a record, encoded, or with why it cannot be used."""
        number = self.start + index
        sample, record = None, None
        try:
            record = self.source.records[number]
            sample = self.source.read(record)
            item = self.encode(self.source, sample)
        except BadSample as error:
            label = record.get("label") if isinstance(record, dict) else None
            label = None if find_surrogate(label) else label
            sample = sample or Sample(error.sample_id, (), label)
            item = error
        if sample.id == "?":
            sample = replace(sample, id=f"{self.source.name}:{number}")
        return sample, item


@dataclass(frozen=True)
class Prompt:
    """A record by its index in the source: its sample and model inputs, or the problem why it cannot be read."""

    number: int
    sample: Sample
    inputs: SampleInputs
    problem: BadSample | None = None


def read_windows(
    source: Source, done: Collection[int], batch_size: int, num_workers: int, *, is_blank: bool = False
) -> Iterator[list[Prompt]]:
    """Yield windows of `WINDOW_BATCHES` batches, from the first window on that is not done yet.

    Windows begin at the same records wherever a run was stopped, so that batches are the same.
    """
    size = WINDOW_BATCHES * batch_size
    first = next((number for number in range(len(source)) if number not in done), None)
    if first is None:
        return
    start = first - first % size
    # Workers return arrays: each tensor would hold an open file, of which a process has few. They are a window ahead.
    loader = DataLoader(
        PromptDataset(source, start, is_blank=is_blank),
        batch_size,
        collate_fn=_as_arrays,
        num_workers=num_workers,
        prefetch_factor=-(-WINDOW_BATCHES // num_workers) if num_workers else None,
    )
    rows = enumerate((row for chunk in loader for row in chunk), start)
    while window := [_make_prompt(number, *row) for number, row in islice(rows, size)]:
        yield window


def batch_by_length(window: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Return batches of the readable records of a window, records of similar length together.

    The longest come first, so that a batch that exceeds the memory shows early.
    """
    readable = [prompt for prompt in window if prompt.problem is None]
    order = sorted(readable, key=lambda prompt: len(prompt.inputs["input_ids"]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _as_arrays(rows: Sequence[ReadRecord]) -> list[ReadRecord]:
    converted: list[ReadRecord] = []
    for sample, item in rows:
        if not isinstance(item, BadSample):
            item = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in item.items()}
        converted.append((sample, item))
    return converted


def _make_prompt(number: int, sample: Sample, item: SampleInputs | BadSample) -> Prompt:
    if isinstance(item, BadSample):
        return Prompt(number, sample, {}, item)
    inputs = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in item.items()}
    return Prompt(number, sample, inputs)
