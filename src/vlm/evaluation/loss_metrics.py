"""Metrics that are computed from the losses of a data set, without generating text; see `text_metrics.py` for answers.

To add one, write a function that prepares it for a data set, and add it to `LOSS_METRICS` and its name to
`vlm.config.choices.LOSS_METRICS` (to `EVAL_METRICS` too, for use while a model trains).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.dataset import SampleDataset
from vlm.data.holdout import unique_records
from vlm.data.processor import SampleInputs
from vlm.evaluation.bootstrap import Score, mean_score
from vlm.evaluation.loss import loss_sums, sample_losses
from vlm.evaluation.record_sums import RecordSums, scores_of
from vlm.evaluation.retrieval import (
    CandidateDataset,
    CandidateLosses,
    Row,
    choose_trials,
    make_candidate_collator,
    make_rows,
    score_own,
)
from vlm.models.text_loss import SupervisedScores

NUM_RESAMPLES = 1000
"""Number of resamples of an interval."""

Collate = Callable[[Sequence[Any]], SampleInputs]
"""Makes a batch of a list with one item."""


class LossSource(Protocol):
    """A model and its way through data, on one process or on several ranks that share the items."""

    @property
    def compute_losses(self) -> SupervisedScores:
        """Return what computes the losses of a batch; its model is in evaluation mode once `batches` has begun."""
        ...

    @property
    def batch_size(self) -> int:
        """Return the number of rows of a batch."""
        ...

    def batches(self, dataset: Dataset[object], title: str, collate: Collate | None = None) -> Iterator[SampleInputs]:
        """Yield this rank's batches on the device, with a progress bar.

        With `collate`, each batch is what it makes of one item: model inputs by name, or groups of them.

        Raises:
            ValueError: a record cannot be used.
        """
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor of all ranks, in the order of the data set, none of them twice."""
        ...


@dataclass(frozen=True)
class LossMetricSettings:
    """Settings of metrics of losses.

    Attributes:
        retrieval_candidates: number of texts among which retrieval looks for an image's own, that one included.
        max_samples: the largest number of samples for metrics that cost more than the loss; None: all.
        advice: for each metric that may be refused, what the user should change.
    """

    retrieval_candidates: int
    max_samples: int | None
    advice: str


@dataclass(frozen=True)
class LossResult:
    """The result of a metric.

    Attributes:
        scores: its values by name.
        rows: the results of single samples, for a file with the metric's name; empty: no such file is written.
        sums: those of its values that are a ratio of sums over records, with these.
    """

    scores: dict[str, Score]
    rows: Sequence[Row] = ()
    sums: Mapping[str, RecordSums] = field(default_factory=dict)


@dataclass(frozen=True)
class LossMetric:
    """A metric that is ready to be computed, any number of times.

    Attributes:
        num_samples: the number of samples that it is computed on.
        compute: computes it, from the data set that it was prepared for (or the same with cached features) and a model.
    """

    num_samples: int
    compute: Callable[[SampleDataset, LossSource], LossResult]


def prepare_loss(dataset: SampleDataset, settings: LossMetricSettings) -> LossMetric:
    """Prepare `loss`, and where there are images `blank_loss` and `image_gain`, see `loss_sums`."""
    return LossMetric(len(dataset), compute_loss)


def compute_loss(dataset: SampleDataset, losses: LossSource) -> LossResult:
    """Return the loss of a data set, exact to the token, and the same on blank images."""
    with_images = torch.as_tensor(dataset.num_images) > 0
    sums, counts = sample_losses(losses.compute_losses, losses.batches(dataset, "loss"), losses.gather)
    blank_sums = None
    if with_images.any():
        blank = losses.batches(dataset.blank(), "loss on blank images")
        blank_sums, _ = sample_losses(losses.compute_losses, blank, losses.gather)
    _, records = unique_records(dataset)
    metrics = loss_sums(sums, counts, blank_sums, with_images, records)
    metrics |= loss_by_source(dataset, sums, counts, records)
    return LossResult(scores_of(metrics), sums=metrics)


def loss_by_source(dataset: SampleDataset, sums: Tensor, counts: Tensor, records: np.ndarray) -> dict[str, RecordSums]:
    """Return `loss/<source>` of each source of a mixture: the mean over its supervised tokens; nothing for one alone.

    Args:
        dataset: the data set.
        sums: `(samples,)`, the sum of each sample's losses.
        counts: `(samples,)`, its number of supervised tokens.
        records: `(samples,)`, the number of its record.
    """
    metrics: dict[str, RecordSums] = {}
    for number, source in enumerate(dataset.sources if len(dataset.sources) > 1 else ()):
        own = dataset.places[:, 0] == number
        if counts.numpy()[own].any():
            metrics[f"loss/{source.name}"] = RecordSums.of_samples(sums.numpy() * own, counts.numpy() * own, records)
    return metrics


def prepare_retrieval(dataset: SampleDataset, settings: LossMetricSettings) -> LossMetric:
    """Prepare `retrieval`, the share of images whose own text has the lowest loss, and `retrieval_chance`.

    Raises:
        ValueError: no sample has an image and ends with a supervised text, or there are too few different texts.
    """
    trials = choose_trials(dataset, settings.retrieval_candidates, settings.max_samples, settings.advice)

    def compute(dataset: SampleDataset, losses: LossSource) -> LossResult:
        """Compute the losses of all candidates and score where the own one ranks."""
        compute_losses = CandidateLosses(losses.compute_losses, losses.batch_size, losses.gather)
        collate = make_candidate_collator(dataset.processor)
        batches = losses.batches(CandidateDataset(dataset, trials), "retrieval", collate)
        rows = torch.cat([losses.gather(compute_losses(**batch)[None]).cpu() for batch in batches])
        found = score_own(rows)
        chance = Score(1 / settings.retrieval_candidates)
        scores = {"retrieval": mean_score(found, NUM_RESAMPLES), "retrieval_chance": chance}
        return LossResult(scores, make_rows(dataset, trials, rows, found))

    return LossMetric(len(trials), compute)


LOSS_METRICS: dict[str, Callable[[SampleDataset, LossMetricSettings], LossMetric]] = {
    "loss": prepare_loss,
    "retrieval": prepare_retrieval,
}
"""The name of a metric -> what prepares it."""
