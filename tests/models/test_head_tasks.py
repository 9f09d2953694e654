"""What the numbers of a head mean, against formulas written out once more."""

import pytest
import torch
from torch import Tensor

from vlm.models.head_tasks import CLASSIFICATION_TASKS, NUM_OUTPUTS_BY_TASK, choose_labels, probabilities


@pytest.mark.parametrize(
    ("task", "labels", "numbers"),
    [("binary", 2, 1), ("multiclass", 4, 4), ("multilabel", 1, 1), ("multilabel", 4, 4), ("regression", 0, 1),
     ("ordinal", 4, 3), ("ordinal", 2, 1), ("pairwise", 0, 1)],
)  # fmt: skip
def test_how_many_numbers_a_task_has(task: str, labels: int, numbers: int):
    assert NUM_OUTPUTS_BY_TASK[task](labels) == numbers
    assert {task for task in NUM_OUTPUTS_BY_TASK if task not in CLASSIFICATION_TASKS} == {"regression", "pairwise"}


def expected(task: str, outputs: Tensor) -> list[list[float]]:
    """Probabilities one by one, in Python's own numbers."""
    found = []
    for row in outputs.double().tolist():
        above = [1 / (1 + 2.718281828459045**-one) for one in row]
        if task == "multiclass":
            powers = [2.718281828459045**one for one in row]
            found.append([one / sum(powers) for one in powers])
        elif task == "multilabel":
            found.append(above)
        else:
            edges = [1.0, *above, 0.0]
            found.append([edges[place] - edges[place + 1] for place in range(len(edges) - 1)])
    return found


@pytest.mark.parametrize("task", CLASSIFICATION_TASKS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_probabilities(task: str, temperature: float):
    outputs = 3 * torch.randn(20, NUM_OUTPUTS_BY_TASK[task](4 if task != "binary" else 2))
    if task == "ordinal":
        outputs = outputs.sort(dim=1, descending=True).values
    found = probabilities(task, outputs, temperature)
    assert found.shape == (20, 2 if task == "binary" else 4)
    wanted = torch.tensor(expected(task, outputs / temperature), dtype=torch.float64)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert (found >= 0).all()
    if task != "multilabel":
        assert torch.allclose(found.sum(dim=1), torch.ones(20))


def test_probabilities_by_hand():
    log = torch.tensor([1.0, 3.0]).log()  # of odds 1 : 1 and 3 : 1
    assert probabilities("binary", log[:, None]).tolist() == [[0.5, 0.5], pytest.approx([0.25, 0.75])]
    assert probabilities("multilabel", log[None]).tolist() == [pytest.approx([0.5, 0.75])]
    assert probabilities("multiclass", log[None]).tolist() == [pytest.approx([0.25, 0.75])]
    assert probabilities("ordinal", log.flip(0)[None]).tolist() == [pytest.approx([0.25, 0.25, 0.5])]


@pytest.mark.parametrize(
    ("given", "found"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_probabilities_have_at_least_single_precision(given: torch.dtype, found: torch.dtype):
    assert probabilities("binary", torch.zeros(1, 1, dtype=given)).dtype == found


@pytest.mark.parametrize("task", CLASSIFICATION_TASKS)
def test_extreme_numbers_are_sure(task: str):
    outputs = torch.tensor([[500.0], [-500.0]]).expand(2, NUM_OUTPUTS_BY_TASK[task](2))
    found = probabilities(task, outputs)
    assert torch.isfinite(found).all()
    if task in ("binary", "ordinal"):
        assert found.tolist() == [[0, 1], [1, 0]]


def test_an_ordinal_task_of_two_labels_is_a_binary_one():
    outputs = torch.randn(9, 1)
    binary, ordinal = (probabilities(task, outputs) for task in ("binary", "ordinal"))
    assert torch.equal(binary, ordinal)
    assert torch.equal(choose_labels("binary", binary), choose_labels("ordinal", ordinal))


@pytest.mark.parametrize(
    ("threshold", "wanted"), [(None, [0, 1, 1, 1]), (0.5, [0, 1, 1, 1]), (0.7, [0, 0, 0, 1]), (0.0, [1, 1, 1, 1])]
)
def test_the_threshold_of_binary(threshold: float | None, wanted: list[int]):
    """A probability that is the threshold is enough."""
    positive = torch.tensor([0.25, 0.5, 0.625, 0.75])
    assert choose_labels("binary", torch.stack([1 - positive, positive], dim=1), threshold).tolist() == wanted


def test_each_label_of_multilabel_has_its_threshold():
    label_probabilities = torch.tensor([[0.25, 0.5, 0.75], [0.5, 0.5, 0.125]])
    assert choose_labels("multilabel", label_probabilities).tolist() == [[False, True, True], [True, True, False]]
    assert choose_labels("multilabel", label_probabilities, [0.25, 0.75, 0.125]).tolist() == [
        [True, False, True],
        [True, False, True],
    ]
    assert choose_labels("multilabel", label_probabilities, 0.75).tolist() == [
        [False, False, True],
        [False, False, False],
    ]


def test_the_likeliest_label_of_multiclass():
    label_probabilities = probabilities("multiclass", torch.randn(30, 5))
    assert choose_labels("multiclass", label_probabilities).tolist() == [
        max(range(5), key=row.__getitem__) for row in label_probabilities.tolist()
    ]


def test_ordinal_decides_the_median():
    """The first label with at least half of the probability up to it, which need not be the likeliest."""
    label_probabilities = torch.tensor([[0.375, 0.25, 0.375], [0.5, 0.25, 0.25], [0.25, 0.125, 0.625], [0.0, 1.0, 0.0]])
    assert choose_labels("ordinal", label_probabilities).tolist() == [1, 0, 2, 1]
    label_probabilities = torch.softmax(torch.randn(50, 6), dim=1)
    wanted = [next(k for k in range(6) if k == 5 or sum(row[: k + 1]) >= 0.5) for row in label_probabilities.tolist()]
    assert choose_labels("ordinal", label_probabilities).tolist() == wanted
