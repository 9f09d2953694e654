"""The loss of text: cross-entropy at supervised positions, in chunks where logits are many.

Hub code: imports torch and transformers only. Shapes: B rows, T tokens, S supervised positions, D text width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from .vocabulary import find_vocabulary_head

IGNORE_INDEX = -100
"""The label of a position that is not supervised."""

LOSS_INPUTS = ("labels", "loss_weights")
"""Inputs of a batch that its loss is computed with, and that no model reads here."""

MAX_LOGITS = 2**26
"""The most logits of one chunk: 256 MiB in float32."""

Divisor = Tensor | int | None
"""The divisor of a summed loss; None: the number of supervised positions."""

Score = Callable[..., Tensor]
"""Computes one or several numbers for each position: `(S, vocabulary), (S,), *aligned -> (S, ...)`, float32.

`aligned` are further tensors with a row for each position, where the caller gives some.
"""


Head = Callable[[Tensor], Tensor]
"""A vocabulary head: `(S, D) -> (S, vocabulary)`."""

SOFTCAP_KEY = "final_logit_softcapping"
"""The key of configurations of language models that cap logits (Gemma Team 2024, arXiv:2408.00118, section 2)."""


BALANCE_KEY = "router_aux_loss_coef"
"""The key of configurations of mixtures of experts: the coefficient of the balance loss."""


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """Cap logits as Gemma 2 does: `softcap * tanh(logits / softcap)`."""
    return torch.tanh(logits / softcap) * softcap


def is_close(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape, and numbers that differ by rounding at most."""
    return tensor.shape == other.shape and torch.allclose(tensor, other, rtol=1e-6, atol=1e-6)


def select_kept(values: Tensor, keep: Tensor) -> Tensor:
    """Return `values`, `(B, T, D)`, where `keep`, `(B, T)`, is true: `(S, D)`.

    A model that reads `logits_to_keep` has done so, and its `(S, D)` stay as they are; a few models do not read it.
    """
    return values[keep] if values.shape[:-1] == keep.shape else values


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


def add_balance_loss(
    loss: Tensor, outputs: Mapping[str, object], text_config: object, num_supervised: Tensor | int, num_items: Divisor
) -> Tensor:
    """Add the balance loss of a mixture of experts, which keeps tokens spread over its experts, to the loss of a batch.

    `loss + router_aux_loss_coef * aux_loss`, as transformers' own models add it. Where the loss is a sum that is
    divided by the supervised positions of several batches (accumulated ones, or those of other ranks), each batch adds
    its share, so that the balance loss of a step is a mean over its batches.

    Args:
        loss: that of the supervised positions, a scalar.
        outputs: of the model; without `aux_loss`, the loss stays as it is.
        text_config: the language model's configuration.
        num_supervised: the supervised positions of this batch.
        num_items: the divisor of the loss.
    """
    balance_loss = outputs.get("aux_loss")
    if not isinstance(balance_loss, Tensor):
        return loss
    share = 1.0 if num_items is None else num_supervised / num_items
    return loss + getattr(text_config, BALANCE_KEY) * share * balance_loss.to(loss.device)


def chunked_scores(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    score: Score = token_losses,
    aligned: Sequence[Tensor] = (),
) -> Tensor:
    """Compute a score of a vocabulary head's logits, in chunks of at most `MAX_LOGITS` logits: `(S, D) -> (S, ...)`.

    The logits of several chunks are computed again for the gradient, one chunk after the other.

    Args:
        head: `(S, D) -> (S, vocabulary)`.
        hidden: `(S, D)`, the hidden states at the supervised positions.
        targets: `(S,)`, the ids that they predict.
        vocabulary: the number of logits of a position.
        score: what is computed of the logits.
        aligned: `(S, ...)` each, what the score reads besides.
    """

    def score_chunk(hidden: Tensor, targets: Tensor, *aligned: Tensor) -> Tensor:
        """Score one chunk, whose logits are computed here, and once more in the backward pass."""
        return score(head(hidden), targets, *aligned)

    num_chunks = max(-(-targets.numel() // max(MAX_LOGITS // vocabulary, 1)), 1)
    targets = targets.to(hidden.device)
    with record_function("loss"):  # its name in profiles
        if num_chunks == 1:
            return score_chunk(hidden, targets, *aligned)
        chunks = zip(*(rows.tensor_split(num_chunks) for rows in (hidden, targets, *aligned)), strict=True)
        scores: list[Any] = [checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(scores)


class SupervisedScores:
    """Computes a score of a model's logits at supervised positions, by default the loss, in chunks.

    The scores are computed in the call of the model's vocabulary head, and take the place of the logits in its output.
    So ZeRO-3 gathers the weights of the head once, and each rank has as many chunks as its own positions need. Where
    the model caps its logits behind its head (Gemma 2, PaliGemma 2), that is done in the head's call too. A model that
    does anything else to its logits would do so to the scores: `prove` finds that out, and the logits of such a model
    at all supervised positions are computed at once, as the model does it.

    Attributes:
        model: the model, not wrapped by DeepSpeed or DDP. Called with a mask `logits_to_keep`, `(B, T)`, it returns
            logits at these positions, `(S, vocabulary)`, or all of them, `(B, T, vocabulary)`.
        score: what is computed of the logits.
        in_head: whether the scores are computed in the head's call; None: the first call finds out.
        softcap: the largest logit that the model allows; None: it does not cap its logits, or `in_head` is not true.
    """

    def __init__(self, model: Any, score: Score = token_losses):
        self.model, self.score = model, score
        self.in_head: bool | None = None
        self.softcap: float | None = None

    def with_score(self, score: Score) -> "SupervisedScores":
        """Return what computes another score of the same model, with what is known of it."""
        other = SupervisedScores(self.model, score)
        other.in_head, other.softcap = self.in_head, self.softcap
        return other

    def __call__(
        self, inputs: Mapping[str, Any], call: Callable[..., Any] | None = None, aligned: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the scores `(S, ...)`, the targets `(S,)` that they are of, and the model's output without logits.

        Args:
            inputs: those of the model, with labels `(B, T)`.
            call: the model as it is called, such as DDP around it; None: `model`.
            aligned: `(S, ...)` each, what the score reads of each position besides logits and target.
        """
        forward: Any = self.model if call is None else call
        arguments, targets = _keep_supervised(inputs)
        keep = arguments["logits_to_keep"]
        vocabulary = self.model.config.get_text_config().vocab_size
        if self.in_head is None:
            self.prove(inputs)
        if self.in_head:

            def compute(head: Head, hidden: Tensor) -> Tensor:
                """Return the scores at the supervised positions."""
                return chunked_scores(head, select_kept(hidden, keep), targets, vocabulary, self.score, aligned)

            with self._computing_in_head(compute):
                outputs = forward(**arguments)
            scores = outputs.logits
        else:
            outputs = forward(**arguments)
            logits = select_kept(outputs.logits, keep)
            scores = chunked_scores(nn.Identity(), logits, targets, vocabulary, self.score, aligned)
        return scores, targets, replace(outputs, logits=None)

    @torch.no_grad()
    def read_states(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Head]:
        """Return what logits at the supervised positions are made of, `(S, D)`, and what makes them: `-> (S, V)`.

        No logit is computed, so that a caller does that chunk by chunk. Of a model that changes logits behind its head
        (`in_head` is false) the logits themselves are returned, with the identity. No gradient is kept.
        """
        arguments, _ = _keep_supervised(inputs)
        keep = arguments["logits_to_keep"]
        if self.in_head is None:
            self.prove(inputs)
        if not self.in_head:
            return select_kept(self.model(**arguments).logits, keep), nn.Identity()
        read: list[tuple[Tensor, Head]] = []

        def remember(head: Head, hidden: Tensor) -> Tensor:
            """Keep the head and what it would have read."""
            read.append((select_kept(hidden, keep), head))
            return hidden[..., :1]

        with self._computing_in_head(remember):
            self.model(**arguments)
        return read[0]

    @torch.no_grad()
    def prove(self, inputs: Mapping[str, object]) -> bool:
        """Find out whether a model's logits are all that its head returns, unchanged or capped; set `in_head`.

        The head returns known numbers instead. `inputs` are those of the model, without a cache; every rank decides the
        same, whatever its inputs are.
        """
        self.in_head, self.softcap = False, None
        if find_vocabulary_head(self.model) is None:
            return False
        softcap = getattr(self.model.config.get_text_config(), SOFTCAP_KEY, None)
        try:
            known, logits = self._replace_logits(inputs)
        except IndexError:  # its code looks for logits of single rows and tokens
            return False
        self.in_head = torch.equal(logits, known.float())
        if not self.in_head and softcap and is_close(logits, cap_logits(known, softcap).float()):
            self.softcap = softcap
            known, logits = self._replace_logits(inputs)
            self.in_head = torch.equal(logits, known.float())
        return self.in_head

    def _replace_logits(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return numbers that the head returned, `(1, vocabulary)`, and the logits that the model made of them."""
        known: list[Tensor] = []

        def return_known(head: Head, hidden: Tensor) -> Tensor:
            """Return known numbers in place of the head's."""
            logits = head(hidden.new_zeros(1, hidden.shape[-1]))
            known.append(torch.linspace(-50, 50, logits.numel(), device=logits.device).to(logits.dtype)[None])
            return known[-1]

        arguments = {name: value for name, value in inputs.items() if name not in LOSS_INPUTS}
        keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        with self._computing_in_head(return_known):
            logits = self.model(**{"use_cache": False, **arguments, "logits_to_keep": keep}).logits
        numbers = known[0] if len(known) == 1 else logits.new_zeros(0)  # the head was called more than once, or never
        return numbers, logits.to(numbers.device).float()

    @contextmanager
    def _computing_in_head(self, compute: Callable[[Head, Tensor], Tensor]) -> Iterator[None]:
        """Let the model's vocabulary head return `compute(head, hidden)`, where `head` is its own function.

        Its hooks run around that as around its own function. Where the model caps logits, `head` does so in its place.
        """
        module, config, softcap = find_vocabulary_head(self.model), self.model.config.get_text_config(), self.softcap
        own, forward = vars(module).get("forward"), module.forward
        head = forward if softcap is None else lambda hidden: cap_logits(forward(hidden), softcap)
        module.forward = lambda hidden: compute(head, hidden)
        try:
            if softcap is not None:
                _set_softcap(config, None)
            yield
        finally:
            del module.forward
            if own is not None:  # such as that of a hook of accelerate
                module.forward = own
            if softcap is not None:
                _set_softcap(config, softcap)


def _keep_supervised(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return a model's arguments with the mask of its supervised positions, and the targets there: `(S,)`."""
    targets = F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T)
    keep = targets != IGNORE_INDEX
    read = {name: value for name, value in inputs.items() if name not in LOSS_INPUTS}
    return {"use_cache": False, **read, "logits_to_keep": keep}, targets[keep]


def _set_softcap(config: PreTrainedConfig, softcap: float | None) -> None:
    """Set the softcap of a configuration, some of which refuse None."""
    object.__setattr__(config, config.attribute_map.get(SOFTCAP_KEY, SOFTCAP_KEY), softcap)
