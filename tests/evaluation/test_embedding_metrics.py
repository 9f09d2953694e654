"""Recall and reciprocal ranks in both directions, by hand."""

import numpy as np
import pytest
import torch

from vlm.data.pairs.dataset import Members
from vlm.evaluation.embedding_metrics import chance_scores, embedding_scores, find_ranks

MEMBERS = Members(np.zeros((5, 2)), np.array([0, 0, 1]), np.array([2, 3, 3]), np.array([2, 3, 4]))
"""Two queries, the first with two positives, of which the second query has one; and a negative."""


def test_a_rank_counts_what_is_as_near_and_not_what_is_relevant_too():
    searched = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    relevant = [np.array([1]), np.array([0, 1]), np.array([0]), np.array([3])]
    assert find_ranks(torch.tensor([[1.0, 0.0]]).expand(4, 2), searched, relevant).tolist() == [3, 2, 2, 4]


def test_equal_vectors_find_nothing():
    scores = embedding_scores(torch.ones(5, 1), MEMBERS, num_resamples=0)
    assert scores["recall@1"].value == 0.0
    assert scores["reverse_recall@1"].value == 0.5, "of the document that both queries find none is wrong"


def test_scores_of_both_directions():
    vectors = torch.eye(5)
    vectors[0, 2] = vectors[1, 4] = 0.5  # the first query finds a positive; the second a wrong document
    scores = embedding_scores(vectors, MEMBERS, num_resamples=20)
    assert scores["recall@1"].value == 0.5
    assert scores["recall@5"].value == 1.0
    assert scores["mrr"].value == pytest.approx((1 + 1 / 3) / 2)
    assert scores["recall@1"].low is not None
    assert set(scores) == {
        f"{way}{name}" for way in ("", "reverse_") for name in ("recall@1", "recall@5", "recall@10", "mrr")
    }
    narrow = embedding_scores(vectors, MEMBERS, width=2, num_resamples=0)
    assert narrow["recall@1"].value == 0.0


def test_chance_is_that_of_random_orders():
    random = np.random.RandomState(0)
    draws = [
        embedding_scores(torch.from_numpy(random.randn(5, 8)), MEMBERS, num_resamples=0)["recall@1"].value
        for _ in range(4000)
    ]
    found = chance_scores(MEMBERS)
    assert found["recall@1"].value == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["recall@1"].value == pytest.approx(float(np.mean(draws)), abs=0.03)  # pyright: ignore[reportCallIssue, reportArgumentType] - none is undefined
    assert found["recall@5"].value == 1.0
