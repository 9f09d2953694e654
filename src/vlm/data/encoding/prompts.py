"""Prompts as ids for prediction heads. The reply is left out, or follows the prompt and is supervised too."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlm.data.encoding.labels import IGNORE_INDEX, Encoded, encode, encode_prompt
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, MediaSize, Sample, Turn
from vlm.models.processing_messages import thinks


@dataclass(frozen=True)
class PromptEncoder(SampleEncoder):
    """Encodes prompts, conversations without their last reply, for a run that trains on their labels.

    Attributes:
        suffix: ids after every prompt, such as that of a token whose hidden state a head reads.
        answers: whether the last reply, if there is one, follows the prompt and is supervised.

    Raises:
        ValueError: prompts would be truncated, or replies would follow a suffix.
    """

    encodes_labels: ClassVar[bool] = True
    needs_reply: ClassVar[bool] = False

    suffix: tuple[int, ...] = ()
    answers: bool = False

    def __post_init__(self):
        """Raise ValueError for settings that contradict each other."""
        if self.truncate:
            raise ValueError(
                "dataset.over_length=truncate: a head reads the end of a prompt, so prompts are never cut; "
                "choose error or skip"
            )
        if self.answers and self.suffix:
            raise ValueError(
                f"suffix={self.suffix}, answers=True: a reply follows its prompt directly, so no suffix can come "
                "between them"
            )

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids of a prompt, with `answers` also of its reply; labels are the reply's ids, -100 elsewhere.

        Raises:
            BadSample: the template refuses or drops the prompt, or renders it differently once it is answered.
        """
        sample = self.with_thinking(sample)
        turns = prompt_turns(sample)
        if not turns:
            raise BadSample(sample.id, "there is nothing before its reply")
        prompt = encode_prompt(self.processor, turns, sizes, sample.id, sample.tools)
        if not prompt:
            raise BadSample(sample.id, "its template drops the whole prompt")
        last = sample.turns[-1]
        if not self.answers or last.role != "assistant" or not last.supervised:
            return Encoded([*prompt, *self.suffix], [IGNORE_INDEX] * (len(prompt) + len(self.suffix)))
        if any(turn.weight != 1 for turn in sample.replies):
            raise BadSample(
                sample.id, "a reply has a weight; with a prediction head, only the weights 0 and 1 are allowed"
            )
        whole = encode(self.processor, sample, sizes)
        length = len(prompt)
        # A head reads the end of the prompt: the reply must be supervised from its first token on.
        if whole.input_ids[:length] != prompt or whole.labels[length : length + 1] in ([], [IGNORE_INDEX]):
            problem = (
                "its template renders a prompt differently once it is answered, as some templates with thinking do"
            )
            raise BadSample(sample.id, f"{problem}; dataset.template names another")
        return Encoded(whole.input_ids, [*[IGNORE_INDEX] * length, *whole.labels[length:]])

    def min_length(self, encoded: Encoded) -> int:
        """Return the number of all tokens, since a prompt is never cut."""
        return len(encoded.input_ids)

    def label_and_group(self, sample: Sample) -> tuple[str | None, str | None]:
        """Return the label of a sample as JSON, and its group.

        Raises:
            BadSample: JSON cannot hold the label.
        """
        group = None if sample.group is None else str(sample.group)
        try:
            return None if sample.label is None else json.dumps(sample.label), group
        except (TypeError, ValueError) as error:
            raise BadSample(sample.id, f"its label {sample.label!r:.60} cannot be written as JSON: {error}") from error

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        """The settings that ids and labels depend on, in addition to the processor."""
        return (*super().fingerprint_fields, self.suffix, self.answers, thinks(self.processor.tokenizer))


def prompt_turns(sample: Sample) -> tuple[Turn, ...]:
    """Return the conversation without its last turn if that is a reply."""
    return sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
