"""Choosing the tokens of one answer: penalties, bias and constraint, its own random numbers, log probabilities."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, SequenceBiasLogitsProcessor

from vlm.inference.engine.constraints import ConstraintCompiler, ConstraintProcessor
from vlm.inference.engine.options import SamplingOptions, TokenAlternative, TokenLogprob


class AnswerPenalties(LogitsProcessor):
    """Penalties of tokens that stand in the answer, as OpenAI defines them; those in the prompt have none.

    Args:
        frequency: taken off for each time that the token stands in the answer.
        presence: taken off once.
        num_prompt_tokens: where the answer begins in the row.
    """

    def __init__(self, frequency: float, presence: float, num_prompt_tokens: int):
        self.frequency, self.presence, self.num_prompt_tokens = frequency, presence, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with penalties: `(1, vocabulary)`, for ids `(1, tokens)` of prompt and answer."""
        tokens, counts = input_ids[0, self.num_prompt_tokens :].unique(return_counts=True)
        penalties = self.presence + self.frequency * counts.to(scores.dtype)
        return scores.index_add(1, tokens, -penalties.unsqueeze(0))


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        options: the request's.
        num_prompt_tokens: number of tokens of its prompt.
        device: the model's device.
    """

    def __init__(self, options: SamplingOptions, num_prompt_tokens: int, device: torch.device):
        self.options = options
        self.constraint = None if options.constraint is None else ConstraintProcessor(options.constraint)
        self.processors = LogitsProcessorList()
        """All processors of the answer: the request's, and the model's own, which `generate` adds."""
        if options.frequency_penalty or options.presence_penalty:
            penalties = (options.frequency_penalty, options.presence_penalty)
            self.processors.append(AnswerPenalties(*penalties, num_prompt_tokens))
        if options.logit_bias:
            bias: list[list[list[int] | float]] = [[[token], float(bias)] for token, bias in options.logit_bias.items()]
            self.processors.append(SequenceBiasLogitsProcessor(bias))
        if self.constraint is not None:
            self.processors.append(self.constraint)
        self._generator: torch.Generator | None = None
        if options.temperature > 0:
            self._generator = torch.Generator(device)
            if options.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(options.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the likeliest token by the model's own logits is chosen."""
        return self._generator is None and not self.processors

    def generation_options(self) -> dict[str, object]:
        """Return what transformers' `generate` needs in order to add the model's own processors to the request's."""
        chosen: dict[str, object] = {"max_new_tokens": self.options.max_new_tokens, "logits_processor": self.processors}
        if self._generator is None:
            return {**chosen, "do_sample": False}
        return {**chosen, "do_sample": True, "temperature": self.options.temperature, "top_p": self.options.top_p}

    def choose(self, ids: Tensor, logits: Tensor) -> int:
        """Return the next token.

        Args:
            ids: `(1, tokens)`, prompt and answer so far.
            logits: `(1, vocabulary)`, float32.

        Raises:
            ValueError: the constraint allows nothing, or takes too long.
        """
        scores = self.processors(cast(torch.LongTensor, ids), logits.clone())
        if self._generator is None:
            return int(scores.argmax(dim=-1))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))

    def accept(self, token_id: int) -> bool:
        """Take the chosen token; return whether the constraint says that the answer is complete."""
        return self.constraint is not None and self.constraint.accept(token_id)


def make_logprob(logits: Tensor, token_id: int, num_top: int, compiler: ConstraintCompiler) -> TokenLogprob:
    """Return the log probability of a chosen token, and of the likeliest ones, by logits `(vocabulary,)`."""
    logprobs = logits.log_softmax(dim=-1)
    top = _likeliest(logprobs, num_top)
    chosen, *likeliest = [
        TokenAlternative(token, text.decode(errors="replace"), tuple(text), logprob)
        for token, logprob in [(token_id, float(logprobs[token_id])), *top]
        for text in [compiler.token_bytes(token)]
    ]
    return TokenLogprob(chosen.token_id, chosen.token, chosen.bytes, chosen.logprob, tuple(likeliest))


def _likeliest(logprobs: Tensor, number: int) -> Sequence[tuple[int, float]]:
    values, tokens = logprobs.topk(min(number, len(logprobs)))
    return list(zip(tokens.tolist(), values.tolist(), strict=True))
