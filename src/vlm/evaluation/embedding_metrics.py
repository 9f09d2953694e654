"""Metrics of vectors that are compared: how high a query's own document ranks among all, and the reverse.

Shapes: Q things that search, N things that are searched for, D numbers of a vector.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import lgamma

import numpy as np
import torch
from torch import Tensor

from vlm.data.pairs.dataset import Members
from vlm.evaluation.bootstrap import Score, bootstrap
from vlm.models.contrastive import shorten_vectors

DEPTHS = (1, 5, 10)
"""The k of each `recall@k`."""
RECALLS = tuple(f"recall@{depth}" for depth in DEPTHS)
BLOCK = 1024
"""Most queries that are compared with all documents at once."""

Relevant = Sequence[np.ndarray]
"""For each thing that searches, the indices of what it should find, at least one."""


def embedding_scores(
    vectors: Tensor, members: Members, *, width: int | None = None, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Return `recall@k` and `mrr` of queries among documents, and with `reverse_` those of positives among queries.

    `recall@k` is the share of queries of which a positive is among the first k documents, `mrr` the mean of 1 / rank of
    the first one. A query's other positives do not count against it; documents as near as its positive do. Equal
    contents are one query, or one document. Recalls have the intervals of shares; for `mrr`,
    queries are resampled.

    Args:
        vectors: `(M, D)`, those of `members.places`, of length 1.
        members: which belong together.
        width: how many numbers of each vector are compared; None: all.
        num_resamples: number of bootstrap resamples; 0: no intervals.
        seed: seeds the resamples.
    """
    scores: dict[str, Score] = {}
    compared = vectors if width is None or width == vectors.shape[1] else shorten_vectors(vectors, width)
    for prefix, searching, searched, relevant in _directions(members):
        ranks = find_ranks(compared[searching], compared[searched], relevant)
        found = bootstrap(
            lambda rows, ranks=ranks: _metrics(ranks[rows]), len(ranks), num_resamples, seed, shares=RECALLS
        )
        scores |= {f"{prefix}{name}": score for name, score in found.items()}
    return scores


def chance_scores(members: Members) -> dict[str, Score]:
    """Return the `recall@k` that a random order has on average, in both directions."""
    scores: dict[str, Score] = {}
    for prefix, _, searched, relevant in _directions(members):
        counts = np.array([len(places) for places in relevant])
        for depth in DEPTHS:
            misses = [_miss_probability(len(searched), int(count), depth) for count in counts]
            scores[f"{prefix}recall@{depth}"] = Score(1 - float(np.mean(misses)))
    return scores


def find_ranks(searching: Tensor, searched: Tensor, relevant: Relevant) -> np.ndarray:
    """Return the rank of the nearest relevant one, from 1, for each that searches: `(Q, D), (N, D) -> (Q,)`.

    Relevant ones do not stand in each other's way; one that is as near as the nearest relevant one stands before it.
    """
    ranks = []
    for start in range(0, len(searching), BLOCK):
        similarities = searching[start : start + BLOCK] @ searched.T
        for row, places in zip(similarities, relevant[start : start + BLOCK], strict=True):
            best = row[torch.from_numpy(places)]
            ranks.append(1 + int((row >= best.max()).sum()) - int((best >= best.max()).sum()))
    return np.array(ranks)


def _directions(members: Members) -> list[tuple[str, np.ndarray, np.ndarray, Relevant]]:
    """Return for both directions the prefix of its metrics, places of what searches and is searched, and `Relevant`."""
    queries, positives = np.unique(members.queries), np.unique(members.positives)
    pairs = list(zip(members.queries.tolist(), members.positives.tolist(), strict=True))
    return [
        ("", queries, members.documents, _relevant(queries, members.documents, pairs)),
        ("reverse_", positives, queries, _relevant(positives, queries, [(second, first) for first, second in pairs])),
    ]


def _relevant(searching: np.ndarray, searched: np.ndarray, pairs: Sequence[tuple[int, int]]) -> Relevant:
    index = {place: number for number, place in enumerate(searched.tolist())}
    found: dict[int, set[int]] = defaultdict(set)
    for first, second in pairs:
        found[first].add(index[second])
    return [np.array(sorted(found[place])) for place in searching.tolist()]


def _metrics(ranks: np.ndarray) -> dict[str, float]:
    recalls = {name: float((ranks <= depth).mean()) for name, depth in zip(RECALLS, DEPTHS, strict=True)}
    return {**recalls, "mrr": float((1 / ranks).mean())}


def _miss_probability(total: int, relevant: int, depth: int) -> float:
    """Return the probability that none of the first of a random order is relevant."""
    others = total - relevant
    if depth > others:
        return 0.0
    return float(
        np.exp(lgamma(others + 1) - lgamma(others - depth + 1) + lgamma(total - depth + 1) - lgamma(total + 1))
    )
