"""The vectors of whole data sets, what is measured of them, and the report at the end of a run."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vlm.data.pairs.dataset import MemberDataset, Members, PairDataset, find_members
from vlm.evaluation.bootstrap import Score, flatten_scores, format_scores, scores_to_json
from vlm.evaluation.embedding_metrics import chance_scores, embedding_scores
from vlm.evaluation.record_sums import RecordSums
from vlm.models import VLMForPrediction
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.contrastive import POSITIVE, QUERY, StepRows, query_losses
from vlm.runs.evaluated_records import RESAMPLES_FILE, resamples_as_json
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.objectives.base import ObjectiveTrainer
from vlm.train.run_directory import write_json

log = logging.getLogger(__name__)

LOSS_BLOCK = 256
"""Queries whose loss is computed at once."""


@dataclass(frozen=True)
class Vectors:
    """The vectors of the distinct members of a data set.

    Attributes:
        vectors: `(M, D)`, float32.
        members: what they are of.
        losses: the loss of each record among the documents of all.
    """

    vectors: Tensor
    members: Members
    losses: RecordSums


def collect_vectors(
    trainer: ObjectiveTrainer, dataset: PairDataset, members: Members | None = None, *, blank: bool = False
) -> Vectors:
    """Return the vectors of a data set; every rank makes its share, and gets all.

    Args:
        trainer: the run's.
        dataset: the records.
        members: those of `find_members`, where they are known.
        blank: whether all images are in the processor's mean colour.
    """
    members = find_members(dataset) if members is None else members
    model = cast(VLMForPrediction, trainer.model)
    (head,) = model.config.settings
    parts: list[Tensor] = []
    for inputs in trainer.evaluation_batches(MemberDataset(dataset, members, blank=blank), "embedding"):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            outputs = model(**inputs).outputs
        assert outputs is not None
        parts.append(trainer.accelerator.gather_for_metrics(outputs[head.name]).float().cpu())
    vectors = torch.cat(parts)
    with torch.no_grad():
        options = {name: value for name, value in model.head(head.name).loss_options().items() if value is not None}
    return Vectors(vectors, members, record_losses(vectors, members, options))


def record_losses(vectors: Tensor, members: Members, options: Mapping[str, object]) -> RecordSums:
    """Return the loss of each record among the documents of all; `options` are those of `contrastive`."""
    known = {name: value for name, value in options.items() if name != "learned_temperature"}
    temperature = known.pop("temperature", 0.05)
    negatives = np.setdiff1d(members.documents, members.positives)
    places = torch.from_numpy(np.concatenate([members.queries, members.positives, negatives]))
    number = len(members.queries)
    roles = torch.full((len(places),), POSITIVE + 1)
    roles[:number], roles[number : 2 * number] = QUERY, POSITIVE
    losses = []
    for start in range(0, number, LOSS_BLOCK):
        is_own = torch.zeros(len(places), dtype=torch.bool)
        is_own[start : start + LOSS_BLOCK] = True
        step = StepRows(vectors[places], roles, places, is_own)
        losses.append(query_losses(step, torch.as_tensor(temperature).cpu(), **known))  # pyright: ignore[reportArgumentType] - the options of a checked configuration
    return RecordSums(torch.cat(losses).double().numpy(), np.ones(number))


def evaluation_metrics(vectors: Vectors) -> dict[str, float]:
    """Return loss and metrics of vectors, as evaluations log them; the loss has an interval, see `record_sums`."""
    scores = embedding_scores(vectors.vectors, vectors.members, num_resamples=0)
    values = {name: score.value for name, score in scores.items() if score.value is not None}
    return flatten_scores({"loss": vectors.losses.score}) | values


def report(
    folder: Path,
    head: HeadSettings,
    sets: Mapping[str, Vectors],
    blank: Vectors | None,
    widths: Sequence[int],
    identities: Mapping[str, str],
) -> None:
    """Write `scores.json`, `scores_resampled.json` and print the tables: metrics beside those of a random order.

    Args:
        folder: the run directory.
        head: the model's head.
        sets: vectors of the evaluation records, named `evaluation`, and of those of `test`, if there are any.
        blank: those of the last set with blank images; None: it has no images.
        widths: the widths of vectors that the run trained for, besides whole ones.
        identities: set -> a digest of its records, see `identify_records`.
    """
    contents: dict[str, dict[str, object]] = {}
    resamples: dict[str, dict[str, object]] = {}
    for name, vectors in sets.items():
        scores = embedding_scores(vectors.vectors, vectors.members)
        others = {"random order": chance_scores(vectors.members)}
        columns: dict[str, dict[str, Score]] = {
            f"first {width}": embedding_scores(vectors.vectors, vectors.members, width=width) for width in widths
        }
        entry: dict[str, object] = {
            "records": len(vectors.members.queries),
            "documents": len(vectors.members.documents),
            "note": None,
            "scores": scores_to_json(scores),
            "baseline": scores_to_json(others["random order"]),
            "widths": {str(width): scores_to_json(columns[f"first {width}"]) for width in widths},
        }
        if blank is not None and name == list(sets)[-1]:
            others["blank images"] = embedding_scores(blank.vectors, blank.members)
            entry["blank_pictures"] = scores_to_json(others["blank images"])
        log.info(
            "%s: %s queries among %s documents\n\n%s\n",
            name,
            f"{len(np.unique(vectors.members.queries)):,}",
            f"{len(vectors.members.documents):,}",
            format_scores(scores, others | columns),
        )
        contents[name] = {head.name: entry}
        resamples[name] = {head.name: resamples_as_json(identities[name], scores)}
    write_json(folder / "scores.json", contents)
    write_text_whole(folder / RESAMPLES_FILE, f"{json.dumps(resamples)}\n")
