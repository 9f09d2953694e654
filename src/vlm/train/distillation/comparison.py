"""What a student's logits are compared with: a teacher that runs beside it, or what is kept of its logits.

Shapes: S supervised positions of a chunk, V ids that both models have, k tokens that are kept of each position.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vlm.train.distillation.divergences import coarse_log_probabilities, decode_rows, log_probabilities, row_bytes
from vlm.train.distillation.targets import TeacherStates


class Compared(NamedTuple):
    """Log-probabilities of the same classes, `(S, classes)`, and the teacher's likeliest ids, `(S,)`."""

    teacher: Tensor
    student: Tensor
    likeliest: Tensor


class Comparison(Protocol):
    """Compares the logits of a batch's supervised positions, chunk by chunk."""

    @property
    def aligned(self) -> tuple[Tensor, ...]:
        """Return what is needed of all positions, a row each; a call gets those of a chunk."""
        ...

    def __call__(self, logits: Tensor, *aligned: Tensor) -> Compared:
        """Compare the student's logits of a chunk, `(S, vocabulary)`."""
        ...


@dataclass(frozen=True)
class LiveComparison:
    """With a teacher whose logits are made here, for a chunk at a time.

    Attributes:
        read: what the teacher read of the batch.
        vocabulary: V; the probabilities of both are of these ids alone.
        temperature: of both.
    """

    read: TeacherStates
    vocabulary: int
    temperature: float

    @property
    def aligned(self) -> tuple[Tensor, ...]:
        """Return the teacher's states."""
        return (self.read.states,)

    def __call__(self, logits: Tensor, *aligned: Tensor) -> Compared:
        """Compare with the teacher's logits over all V ids."""
        (states,) = aligned
        teacher = self.read.head(states)[:, : self.vocabulary]
        log_q = log_probabilities(logits[:, : self.vocabulary], self.temperature)
        return Compared(log_probabilities(teacher, self.temperature), log_q, teacher.argmax(-1))


@dataclass(frozen=True)
class KeptComparison:
    """With what is kept of a teacher's logits.

    Attributes:
        rows: of all positions, see `encode_rows`.
        top_k: number of tokens that are kept.
        vocabulary: V.
        temperature: of both.
    """

    rows: Tensor
    top_k: int
    vocabulary: int
    temperature: float

    @classmethod
    def of(cls, rows: Tensor | None, top_k: int, vocabulary: int, temperature: float) -> "KeptComparison":
        """Return the comparison with the rows of a batch; None: it has no supervised position."""
        empty = torch.zeros((0, row_bytes(top_k, vocabulary)), dtype=torch.uint8)
        return cls(empty if rows is None else rows, top_k, vocabulary, temperature)

    @property
    def aligned(self) -> tuple[Tensor, ...]:
        """Return the rows."""
        return (self.rows,)

    def __call__(self, logits: Tensor, *aligned: Tensor) -> Compared:
        """Compare over the k tokens and the class of all others."""
        (rows,) = aligned
        ids, log_p = decode_rows(rows.to(logits.device), self.top_k, self.vocabulary)
        return Compared(log_p, coarse_log_probabilities(logits[:, : self.vocabulary], ids, self.temperature), ids[:, 0])
