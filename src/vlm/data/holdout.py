"""Splits of a data set by records: the samples of one record, which may be repeated, are all on the same side."""

import numpy as np
import torch

from vlm.data.dataset import SampleDataset
from vlm.data.sample import ImageRef

MAX_COMPARED = 20_000
"""The most training samples whose images are looked up by name for `count_shared_images`: every record is parsed."""


def split_off_eval(dataset: SampleDataset, share: float, seed: int) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a random share of the records: (training, held out), at least one record in each.

    A record that is repeated is on one side only.

    Raises:
        ValueError: there are fewer than two records.
    """
    first, record_indices = unique_records(dataset)
    number = len(first)
    if number < 2:
        raise ValueError(f"dataset.eval_split={share}: at least two records are needed, got {number}")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).numpy()
    held_out = order[: min(max(round(share * number), 1), number - 1)]
    return hold_out(dataset, first, record_indices, held_out)


def unique_records(dataset: SampleDataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first sample of each record, and for each sample the index of its record among those.

    The parts of a record are samples of it.
    """
    sources, places = dataset.sources, dataset.places
    if any(source.parts for source in sources):
        places = np.array([(number, sources[number].record_of(record)) for number, record in places.tolist()])
    _, first, record_indices = np.unique(places, axis=0, return_index=True, return_inverse=True)
    return first, record_indices.ravel()


def hold_out(
    dataset: SampleDataset, first: np.ndarray, record_indices: np.ndarray, held_out: np.ndarray
) -> tuple[SampleDataset, SampleDataset]:
    """Divide samples in two: those of the other records, and one of each record or part of one that is held out.

    `first` and `record_indices` are those of `unique_records`, and `held_out` holds indices of records. The first part
    keeps the list of skipped records.
    """
    rest = dataset.subset(np.flatnonzero(~np.isin(record_indices, held_out)))
    rest.skipped, rest.contributions = dataset.skipped, dataset.contributions
    if any(source.parts for source in dataset.sources):
        held = np.flatnonzero(np.isin(record_indices, held_out))
        _, once = np.unique(dataset.places[held], axis=0, return_index=True)
        return rest, dataset.subset(np.sort(held[once]))
    return rest, dataset.subset(np.sort(first[held_out]))


def count_shared_images(training: SampleDataset, held_out: SampleDataset) -> int | None:
    """Return how many held-out samples have an image file that a training sample has too; no image is opened.

    None: there are more than `MAX_COMPARED` training samples. `dataset.overlap` compares what files contain as well.
    """
    if len(training) > MAX_COMPARED:
        return None
    trained = {file for index in range(len(training)) for file in _image_files(training, index)}
    return sum(not trained.isdisjoint(_image_files(held_out, index)) for index in range(len(held_out)))


def _image_files(dataset: SampleDataset, index: int) -> set[ImageRef]:
    """Return the images of a sample that are files."""
    return {image for image in dataset.sample(index).images if image.content is None}
