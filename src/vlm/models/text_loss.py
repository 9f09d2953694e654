"""The loss of text: cross-entropy at supervised positions, in chunks where logits are many.

Hub code: imports torch only. Shapes: B rows, T tokens, S supervised positions, D text width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""The label of a position that is not supervised."""

MAX_LOGITS = 2**26
"""The most logits of one chunk: 256 MiB in float32."""

Divisor = Tensor | int | None
"""The divisor of a summed loss; None: the number of supervised positions."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Computes one or several numbers for each position: `(S, vocabulary), (S,) -> (S, ...)`, float32."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of each position in float32: `(S, vocabulary), (S,) -> (S,)`."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def mean_loss(losses: Tensor, num_items: Divisor) -> Tensor:
    """Divide the sum of losses `(S,)` by `num_items`, by default S; 0 where nothing is supervised."""
    return losses.sum() / (max(losses.numel(), 1) if num_items is None else num_items)


def supervised_loss(logits: Tensor, targets: Tensor, num_items: Divisor) -> Tensor:
    """Compute the cross-entropy in float32 at the supervised positions: `(S, vocabulary), (S,) -> ()`.

    `-sum_s log softmax(logits_s)[target_s] / num_items`; `num_items` is S by default. 0 where nothing is supervised.
    Logits in half precision are converted in chunks.
    """
    return mean_loss(chunked_scores(nn.Identity(), logits, targets, logits.shape[-1]), num_items)


def chunked_scores(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int, score: Score = token_losses
) -> Tensor:
    """Compute a score of a vocabulary head's logits, in chunks of at most `MAX_LOGITS` logits: `(S, D) -> (S, ...)`.

    The logits of several chunks are computed again for the gradient, one chunk after the other.

    Args:
        head: `(S, D) -> (S, vocabulary)`.
        hidden: `(S, D)`, the hidden states at the supervised positions.
        targets: `(S,)`, the ids that they predict.
        vocabulary: the number of logits of a position.
        score: what is computed of the logits.
    """

    def score_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return score(head(hidden), targets)

    num_chunks = max(-(-targets.numel() // max(MAX_LOGITS // vocabulary, 1)), 1)
    targets = targets.to(hidden.device)
    with record_function("loss"):  # its name in profiles
        if num_chunks == 1:
            return score_chunk(hidden, targets)
        chunks = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        scores: list[Any] = [checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(scores)


class SupervisedScores:
    """Computes a score of a model's logits at supervised positions, by default the loss, in chunks.

    The scores are computed in the call of the model's vocabulary head, and take the place of the logits in its output.
    So ZeRO-3 gathers the weights of the head once, and each rank has as many chunks as its own positions need. A model
    that changes its logits behind its head (Gemma 2 caps them) would change the scores too. `prove` finds that out, and
    the logits of such a model at all supervised positions are computed at once, as the model does it.

    Attributes:
        model: the model, not wrapped by DeepSpeed or DDP. Called with a mask `logits_to_keep`, `(B, T)`, it returns
            logits at these positions, `(S, vocabulary)`.
        score: what is computed of the logits.
        in_head: whether the scores are computed in the head's call; None: the first call finds out.
    """

    def __init__(self, model: Any, score: Score = token_losses):
        self.model, self.score = model, score
        self.in_head: bool | None = None

    def __call__(self, inputs: Mapping[str, Any], call: Callable[..., Any] | None = None) -> tuple[Tensor, Tensor, Any]:
        """Return the scores `(S, ...)`, the targets `(S,)` that they are of, and the model's output without logits.

        Args:
            inputs: those of the model, with labels `(B, T)`.
            call: the model as it is called, such as DDP around it; None: `model`.
        """
        forward: Any = self.model if call is None else call
        targets = F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T)
        keep = targets != IGNORE_INDEX
        targets = targets[keep]
        arguments = {"use_cache": False, **inputs, "logits_to_keep": keep}
        del arguments["labels"]
        vocabulary = self.model.config.get_text_config().vocab_size
        if self.in_head is None:
            self.prove(inputs)
        if self.in_head:
            with _replace_head(self.model, lambda head, x: chunked_scores(head, x, targets, vocabulary, self.score)):
                outputs = forward(**arguments)
            scores = outputs.logits
        else:
            outputs = forward(**arguments)
            scores = chunked_scores(nn.Identity(), outputs.logits, targets, vocabulary, self.score)
        return scores, targets, replace(outputs, logits=None)

    @torch.no_grad()
    def prove(self, inputs: Mapping[str, Any]) -> bool:
        """Find out whether a model's logits are what its head returns, all of it and unchanged; set `in_head`.

        The head returns known numbers instead. `inputs` are those of the model, without a cache; every rank decides the
        same, whatever its inputs are.
        """
        known: list[Tensor] = []

        def return_known(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            logits = head(hidden.new_zeros(1, hidden.shape[-1]))
            known.append(torch.linspace(-50, 50, logits.numel(), device=logits.device).to(logits.dtype)[None])
            return known[-1]

        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        if self.model.get_output_embeddings() is None:
            self.in_head = False
            return False
        with _replace_head(self.model, return_known):
            logits = self.model(**{"use_cache": False, **arguments, "logits_to_keep": keep}).logits
        self.in_head = len(known) == 1 and torch.equal(logits.float(), known[0].float().to(logits.device))
        return self.in_head


@contextmanager
def _replace_head(model: Any, compute: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    """Let the vocabulary head of a model return `compute(forward, hidden)`, where `forward` is its own function.

    Its hooks run around that as around its own function.
    """
    head = model.get_output_embeddings()
    own, forward = vars(head).get("forward"), head.forward
    head.forward = lambda hidden: compute(forward, hidden)
    try:
        yield
    finally:
        del head.forward
        if own is not None:  # such as that of a hook of accelerate
            head.forward = own
