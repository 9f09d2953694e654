"""Records that are counted while a run trains on them: which samples there are is known, their lengths are not yet.

That is so where no record may be left out: a record that cannot be used is then an error, whenever it is found. Another
process counts into the cache, with low priority. Whatever needs a count waits for all of them, so that nothing can be
other than after counting first.
"""

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch

from vlm.data.dataset import SampleDataset, Skipped
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.data.vision.images import read_media_sizes

COUNTS = frozenset({"lengths", "num_images", "has_videos", "has_thinking", "skipped", "contributions"})
"""The attributes of a `SampleDataset` that are known once its records are counted."""
IN_THIS_PROCESS = frozenset({"_process", "_load", "_waiting", "_measured", "has_media"})
"""The attributes that no data worker needs."""
WAIT_SECONDS = 1.0
"""Seconds between two looks at the other process while something waits for it."""


class CountedLater(SampleDataset):
    """Samples whose records another process counts; an attribute of `COUNTS` waits for it.

    Args:
        sources: where the samples come from; their indices exist.
        places: those of all samples, see `SampleDataset`.
        load: counts the records, or reads the counts from the cache, and returns the same samples.
        has_media: `(samples,)`: whether each has images or videos; None: that is not known yet.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        places: np.ndarray,
        load: Callable[[], SampleDataset],
        has_media: np.ndarray | None = None,
    ):
        self.sources, self.places, self.has_media = list(sources), places, has_media
        self._measured: dict[int, tuple[int, int]] = {}
        self._labels_and_groups = None, None
        self._load = load
        self._waiting: list[Callable[[], object]] = []
        for source in sources:
            _ = source.fingerprint  # a processor may change later in settings that no count depends on
        self._process = get_context("fork").Process(target=_count_in_background, args=(load, os.getpid()))
        self._process.start()
        atexit.register(self.stop)  # before multiprocessing waits for its end

    def __getattr__(self, name: str) -> object:
        """Return a count, after waiting until all are there."""
        if name not in COUNTS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        self.wait()
        return getattr(self, name)

    def __getstate__(self) -> dict[str, object]:
        """Return what a data worker needs, which asks for no counts."""
        return {name: value for name, value in vars(self).items() if name not in IN_THIS_PROCESS}

    @property
    def is_counted(self) -> bool:
        """Whether `wait` has ended."""
        return "lengths" in vars(self)

    @property
    def is_due(self) -> bool:
        """Whether `wait` would not wait long, and has not been called since."""
        return not self.is_counted and not self._process.is_alive()

    def when_counted(self, act: Callable[[], object]) -> None:
        """Call something as soon as `wait` has ended; at once if it has."""
        if self.is_counted:
            act()
        else:
            self._waiting.append(act)

    def wait(self, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Wait until all records are counted, then call what was given to `when_counted`.

        Args:
            goes_on: called every second; where it returns False, nothing is waited for any longer.

        Raises:
            ValueError: a record cannot be used.
        """
        if self.is_counted:
            return
        while self._process.is_alive():
            self._process.join(WAIT_SECONDS)
            if not goes_on():
                return
        counted = self._load()  # from the cache; what the other process failed at fails here too
        assert np.array_equal(counted.places, self.places)
        vars(self).update({name: getattr(counted, name) for name in COUNTS})
        self._measured = {}
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            act()

    def measure(self, index: int) -> tuple[int, int]:
        """Return the number of tokens of a sample, and of its images and videos, as they will be counted.

        Raises:
            ValueError: its record cannot be used.
        """
        if self.is_counted:
            return int(self.lengths[index]), int(self.num_images[index])
        if index not in self._measured:
            self._measured[index] = self._encode(index)
        return self._measured[index]

    def _encode(self, index: int) -> tuple[int, int]:
        number, record = self.places[index].tolist()
        source = self.sources[number]
        try:
            sample = source.sample(record)
            encoded = source.encoder.encode(sample, read_media_sizes(sample, source.encoder.processor))
        except BadSample as error:
            raise Skipped.from_error(error, source, record).as_error(source) from error
        return min(len(encoded.input_ids), source.encoder.longest), len(sample.media)

    def stop(self) -> None:
        """End the other process; what it has counted stays in the cache."""
        atexit.unregister(self.stop)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


class MeasuredLengths:
    """Lengths of samples that are counted while a run trains: those of a step are measured when it comes.

    Attributes:
        lengths: `(samples,)`, 0 where they are not known yet.
    """

    def __init__(self, dataset: CountedLater):
        self._dataset, self.lengths = dataset, np.zeros(len(dataset), dtype=np.int64)
        dataset.when_counted(self._take_counts)

    def measure(self, indices: Sequence[int]) -> None:
        """Fill in the lengths of some samples; raise ValueError if a record cannot be used."""
        for index in indices:
            if not self.lengths[index]:
                self.lengths[index], _ = self._dataset.measure(index)

    def _take_counts(self) -> None:
        self.lengths[:] = self._dataset.lengths


def when_counted(dataset: object, act: Callable[[], object]) -> None:
    """Call something as soon as the records of a data set are counted; at once if they are."""
    if isinstance(dataset, CountedLater):
        dataset.when_counted(act)
    else:
        act()


def _count_in_background(load: Callable[[], SampleDataset], parent: int) -> None:
    """Count in this process, which gives way to the run and ends with it; errors are found again by the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_with_workers)
    os.nice(19)
    logging.disable(logging.INFO)  # its progress would run into the run's
    torch.set_num_threads(1)  # threads do not survive a fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with Path(os.devnull).open("w") as nothing, redirect_stderr(nothing), suppress(Exception):
        load()


def _end_with_workers(number: int, frame: object) -> None:
    """End this process and its data workers, which would otherwise wait for ever for one that reads their results."""
    for worker in active_children():
        worker.kill()
    os._exit(128 + number)


def _end_with(parent: int) -> None:
    """End this process once its parent has ended, by whatever signal."""
    while os.getppid() == parent:
        time.sleep(WAIT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
