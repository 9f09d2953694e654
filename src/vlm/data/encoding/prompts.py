"""Prompts as ids: what a prediction head reads. The reply is left out, or stands behind the prompt to be learnt too."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm.data.encoding.labels import IGNORE_INDEX, Encoded, encode, render
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, MediaSize, Sample, Turn


@dataclass(frozen=True)
class PromptEncoder(SampleEncoder):
    """Encodes samples for one run that learns their labels: conversations up to their last reply, waiting for it.

    Attributes:
        suffix: ids behind every prompt, such as those of a token at which a head reads.
        answers: whether the last reply stands behind the prompt and is supervised, where there is one.

    Raises:
        ValueError: prompts would be cut, or replies would stand behind a suffix.
    """

    encodes_labels: ClassVar[bool] = True

    suffix: tuple[int, ...] = ()
    answers: bool = False

    def __post_init__(self):
        if self.truncate:
            raise ValueError(
                "dataset.over_length=truncate: what a head reads stands at the end of a prompt, which is never cut; "
                "choose error or skip"
            )
        if self.answers and self.suffix:
            raise ValueError(
                f"suffix={self.suffix}, answers=True: a reply follows its prompt, nothing can stand between them"
            )

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Ids of a whole prompt, and with `answers` of its reply; labels: the reply's ids, -100 elsewhere.

        Raises:
            BadSample: the template refuses it or leaves nothing of it, or renders a prompt otherwise once it is
                answered.
        """
        prompt = self._prompt(sample, sizes)
        if not self.answers or sample.turns[-1].role != "assistant":
            return Encoded([*prompt, *self.suffix], [IGNORE_INDEX] * (len(prompt) + len(self.suffix)))
        whole = encode(self.processor, sample, sizes)
        behind = len(prompt)
        # A head reads the end of the prompt: nothing may stand between it and what is supervised.
        if whole.input_ids[:behind] != prompt or whole.labels[behind : behind + 1] in ([], [IGNORE_INDEX]):
            raise BadSample(
                sample.id,
                "its template renders a prompt otherwise once it is answered, as some do that have thinking blocks; "
                "dataset.template names another",
            )
        return Encoded(whole.input_ids, [*[IGNORE_INDEX] * behind, *whole.labels[behind:]])

    def min_length(self, encoded: Encoded) -> int:
        """All tokens: a prompt is never cut."""
        return len(encoded.input_ids)

    def label_and_group(self, sample: Sample) -> tuple[str | None, str | None]:
        """A sample's label as JSON, and its group.

        Raises:
            BadSample: JSON cannot hold the label.
        """
        group = None if sample.group is None else str(sample.group)
        try:
            return None if sample.label is None else json.dumps(sample.label), group
        except (TypeError, ValueError) as error:
            raise BadSample(sample.id, f"its label {sample.label!r:.60} cannot be written as JSON: {error}") from error

    @property
    def fingerprint_fields(self) -> tuple[Any, ...]:
        """What ids and labels depend on besides the processor."""
        return (*super().fingerprint_fields, self.suffix, self.answers)

    def _prompt(self, sample: Sample, sizes: Sequence[MediaSize]) -> list[int]:
        """Ids as `encode.encode_prompt` gives them, with the sample named where it cannot be used."""
        turns = prompt_turns(sample)
        if not turns:
            raise BadSample(sample.id, "nothing stands before its reply")
        rendered = render(self.processor, turns, sample.id, prompt=True)
        ids, _ = self.processor.tokenize(rendered.text, rendered.spoken, sizes)
        if not ids:
            raise BadSample(sample.id, "its template leaves nothing of its prompt")
        return ids


def prompt_turns(sample: Sample) -> tuple[Turn, ...]:
    """The conversation up to its last reply, if it ends with one."""
    return sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
