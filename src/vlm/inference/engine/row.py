"""One answer while it is generated: its request, its tokens so far, and where its pieces go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm.inference.engine.constraints import ConstraintCompiler
from vlm.inference.engine.options import FinishReason, Piece, SamplingOptions, TokenLogprob
from vlm.inference.engine.sampling import Sampler, make_logprob
from vlm.inference.engine.text import AnswerText


@dataclass(frozen=True)
class Prepared:
    """A conversation as the model's inputs, on the CPU; may be generated from any number of times.

    Args:
        inputs: the inputs of one row, as `VisionLanguageModel.inputs` returns them.
        num_prompt_tokens: number of its tokens, those of images included.
    """

    inputs: dict[str, Tensor]
    num_prompt_tokens: int

    def inputs_with(self, answer: Sequence[int]) -> dict[str, Tensor]:
        """Return the inputs with the tokens of an answer behind the prompt."""
        ids = torch.tensor([answer], dtype=torch.long)
        continuation = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        continuation |= dict.fromkeys(("token_type_ids", "mm_token_type_ids"), torch.zeros_like(ids))  # 0: text
        return self.inputs | {
            name: torch.cat([self.inputs[name], value.to(self.inputs[name].dtype)], dim=1)
            for name, value in continuation.items()
            if name in self.inputs
        }


@dataclass(frozen=True)
class AnswerContext:
    """What all answers of a model share.

    Args:
        tokenizer: the model's tokenizer.
        ends: ids of the tokens that end an answer.
        stops: texts that end every answer: the template's ending where it is white space.
        constraints: knows the bytes of tokens.
        device: the model's device.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    stops: tuple[str, ...]
    constraints: ConstraintCompiler
    device: torch.device


class Row:
    """One answer of a batch.

    Args:
        prepared: the prompt.
        options: the request's.
        context: what all answers share.
        deliver: takes pieces, at the end a failure; called on the engine's thread.

    Attributes:
        is_cancelled: set by any thread when nobody waits for the answer any more.
        is_finished: whether the last piece or a failure was delivered.
        answer: the tokens so far.
    """

    def __init__(
        self,
        prepared: Prepared,
        options: SamplingOptions,
        context: AnswerContext,
        deliver: Callable[[Piece | BaseException], None],
    ):
        self.prepared, self.options, self.deliver = prepared, options, deliver
        self.is_cancelled = self.is_finished = False
        self.answer: list[int] = []
        self.sampler = Sampler(options, prepared.num_prompt_tokens, context.device)
        self._context = context
        self._text = AnswerText(context.tokenizer, (*options.stop, *context.stops))
        self._tokens: list[int] = []  # not delivered yet
        self._logprobs: list[TokenLogprob] = []

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and the answer so far."""
        return self.prepared.num_prompt_tokens + len(self.answer)

    def advance(self, ids: Tensor, logits: Tensor, likeliest: int | None) -> None:
        """Choose the next token, and deliver what it completes; a failure ends this answer alone.

        Args:
            ids: `(1, tokens)`, prompt and answer so far.
            logits: `(1, vocabulary)`, float32, the model's own.
            likeliest: the token of the greatest logit, where it is known.
        """
        try:
            token = likeliest if likeliest is not None else self.sampler.choose(ids, logits)
            self._accept(token, logits[0])
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the answer with a failure."""
        self.is_finished = True
        self.deliver(error.with_traceback(None))  # its frames would keep tensors alive

    def _accept(self, token: int, logits: Tensor) -> None:
        self.answer.append(token)
        self._tokens.append(token)
        if token in self._context.ends:
            return self._finish("", "stop")
        if self.options.top_logprobs is not None:
            constraints = self._context.constraints
            self._logprobs.append(make_logprob(logits, token, self.options.top_logprobs, constraints))
        is_complete = self.sampler.accept(token)
        text = self._text.push(token)
        if self._text.is_stopped or is_complete:
            return self._finish(text, "stop")
        if len(self.answer) >= self.options.max_new_tokens:
            return self._finish(text, "length")
        if text:
            self._deliver(text, None)
        return None

    def _finish(self, text: str, reason: FinishReason) -> None:
        text += self._text.flush()
        self.is_finished = True
        self._deliver(text, "stop" if self._text.is_stopped else reason)

    def _deliver(self, text: str, reason: FinishReason | None) -> None:
        self.deliver(Piece(text, tuple(self._tokens), tuple(self._logprobs), reason))
        self._tokens, self._logprobs = [], []
