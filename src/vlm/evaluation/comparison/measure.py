"""What one model makes of records: answers and losses, with their images and with blank ones.

Losses are means over the tokens of a record's last reply; earlier replies are only read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import TypeVar

import torch

from vlm.config.schema import InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import make_blank_medium
from vlm.data.dataset import model_inputs
from vlm.data.encoding.prompts import prompt_turns
from vlm.data.encoding.thinking import without_thinking
from vlm.data.processor import SampleInputs
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, ToolCallTurn, Turn, VideoRef
from vlm.data.vision.images import Medium, media_sizes_from_opened, open_media
from vlm.evaluation.comparison.records import ComparedRecord
from vlm.evaluation.loss import last_reply_text, row_losses
from vlm.inference.generate import VisionLanguageModel, on_device, prompt_inputs
from vlm.inference.generate_file import question_text
from vlm.models.text_loss import SupervisedScores

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """What a model made of a record; None where there is nothing to measure.

    Attributes:
        id: the record's name.
        dataset: its set.
        groups: its groups, see `ComparedRecord`.
        media: the paths of its images and videos, joined by `;`; of images within the record, a digest.
        prompt: its last question.
        references: the texts that an answer is compared with.
        check: what makes an answer right, see `probe.grading.Check`.
        answer: the model's answer.
        blank_answer: the same on blank images; None for a record without any.
        loss: of the last reply.
        blank_loss: the same with blank images.
        own_loss: of the model's own answer.
        other_loss: of the other model's answer.
        error: why the record could not be used; empty where it was.
    """

    id: str
    dataset: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    media: str = ""
    prompt: str = ""
    references: list[str] = field(default_factory=list)
    check: dict[str, object] | None = None
    answer: str | None = None
    blank_answer: str | None = None
    loss: float | None = None
    blank_loss: float | None = None
    own_loss: float | None = None
    other_loss: float | None = None
    error: str = ""

    def as_row(self) -> dict[str, object]:
        """Return the row of a table."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, object]) -> "Measured":
        """Return what a row of a table holds."""
        return cls(**row)  # pyright: ignore[reportArgumentType] - as `as_row` wrote it


@dataclass(frozen=True)
class _Prepared:
    """Inputs of a record: its prompt with its images and with blank ones (None where it shows none), and the same for
    the reply of the record (None where it has none to learn).
    """

    record: ComparedRecord
    prompt: SampleInputs
    blank_prompt: SampleInputs | None
    reply: SampleInputs | None
    blank_reply: SampleInputs | None
    opened: Sequence[Medium]
    sizes: Sequence[MediaSize]


@dataclass
class Measurer:
    """Measures a model on batches of records.

    Attributes:
        ready: the model with its processor.
        settings: generation settings; a greedy answer is what is compared.
        compute_losses: computes losses of the model.
        generation_options: options of `generate` besides, such as `synced_gpus`.
    """

    ready: VisionLanguageModel
    settings: InferenceConfig
    compute_losses: SupervisedScores
    generation_options: Mapping[str, object] = field(default_factory=dict)

    def measure(
        self, records: Sequence[ComparedRecord | BadSample], others: Sequence[str | None] = ()
    ) -> list[Measured]:
        """Return what the model makes of a batch of records; `others` are the other model's answers, if there are any.

        A record that cannot be asked has an `error`, and nothing else.
        """
        prepared = [_catch(self._prepare, record) for record in records]
        usable = [item for item in prepared if isinstance(item, _Prepared)]
        given = zip(others or [None] * len(records), prepared, strict=True)
        known = [other for other, item in given if isinstance(item, _Prepared)]
        answers = self._answers([item.prompt for item in usable])
        columns = zip(
            usable,
            answers,
            self._answers([item.blank_prompt for item in usable]),
            self._losses([item.reply for item in usable]),
            self._losses([item.blank_reply for item in usable]),
            self._losses(list(map(_answer_inputs, usable, answers))),
            self._losses(list(map(_answer_inputs, usable, known))),
            strict=True,
        )
        measured = iter([
            replace(_describe(item.record), answer=answer, blank_answer=blank_answer, loss=loss, blank_loss=blank_loss,
                    own_loss=own_loss, other_loss=other_loss)
            for item, answer, blank_answer, loss, blank_loss, own_loss, other_loss in columns
        ])  # fmt: skip
        return [
            next(measured) if isinstance(item, _Prepared) else _describe_bad(record, item)
            for record, item in zip(records, prepared, strict=True)
        ]

    def losses_of_answers(
        self, records: Sequence[ComparedRecord | BadSample], answers: Sequence[str | None]
    ) -> list[float | None]:
        """Return the losses of given answers to a batch of records."""
        pairs = zip(records, answers, strict=True)
        prepared = [(None if answer is None else _catch(self._prepare, record), answer) for record, answer in pairs]
        inputs = [_answer_inputs(item, answer) if isinstance(item, _Prepared) else None for item, answer in prepared]
        return self._losses(inputs)

    # Inputs

    def _prepare(self, record: ComparedRecord) -> _Prepared:
        """Return the inputs of a record; raise BadSample where it cannot be asked."""
        sample, processor = record.sample, self.ready.processor
        opened = open_media(sample)
        sizes = media_sizes_from_opened(sample.media, opened, processor)
        blanks = [make_blank_medium(processor, size) for size in sizes or [None] * len(sample.media)]
        turns = prompt_turns(sample)
        if not turns:
            raise BadSample(sample.id, "there is nothing before its reply")
        number = len(Sample(sample.id, turns).media)
        prompt = prompt_inputs(processor, turns, opened[:number], tools=sample.tools)
        length = len(prompt["input_ids"])
        if length + self.settings.max_new_tokens > self.ready.positions:
            problem = f"its prompt has {length} tokens, which leaves fewer than {self.settings.max_new_tokens} of "
            raise BadSample(sample.id, f"{problem}{self.ready.positions} for an answer")
        blank_prompt = prompt_inputs(processor, turns, blanks[:number], tools=sample.tools) if number else None
        last = sample.turns[-1]
        is_learned = last.role == "assistant" and last.supervised and not isinstance(last, ToolCallTurn)
        reply = _reply_inputs(record, last, opened, sizes) if is_learned else None
        blank_reply = _reply_inputs(record, last, blanks, sizes) if reply is not None and blanks else None
        return _Prepared(record, prompt, blank_prompt, reply, blank_reply, opened, sizes)

    # The model

    def _answers(self, inputs: Sequence[SampleInputs | None]) -> list[str | None]:
        """Return the answers to prompts; None where there is none."""

        def answer(rows: list[SampleInputs]) -> list[str]:
            """Answer a batch of prompts."""
            batch = Collator.of(self.ready.processor, left=True)(rows)
            inputs = on_device(batch, self.ready.processor, self.ready.model.device)
            return self.ready.answers(inputs, self.settings, **self.generation_options)

        return _where_given(inputs, answer)

    def _losses(self, inputs: Sequence[SampleInputs | None]) -> list[float | None]:
        """Return the mean losses of the supervised tokens of rows; None where there is no row."""

        @torch.no_grad()
        def compute(rows: list[SampleInputs]) -> list[float]:
            """Compute the losses of a batch."""
            processor, device = self.ready.processor, self.ready.model.device
            batch = Collator.of(processor)(rows)
            labels = torch.as_tensor(batch["labels"]).to(device)
            read = self.ready.use_cached_features(on_device(batch, processor, device))
            sums, counts = row_losses(self.compute_losses({**read, "labels": labels})[0], labels)
            return (sums / counts).tolist()

        return _where_given(inputs, compute)


def _answer_inputs(item: _Prepared, answer: str | None) -> SampleInputs | None:
    """Return the inputs of a record with an answer in place of its reply; None for one that is empty."""
    text = "" if answer is None else without_thinking(answer)
    return _reply_inputs(item.record, Turn("assistant", (text,)), item.opened, item.sizes) if text.strip() else None


def _reply_inputs(
    record: ComparedRecord, reply: Turn, media: Sequence[Medium], sizes: Sequence[MediaSize]
) -> SampleInputs | None:
    """Return the inputs of a record with a reply as its only supervised one; None where it cannot be encoded so."""
    sample = record.sample
    earlier = (replace(turn, supervised=False) for turn in prompt_turns(sample))
    answered = replace(sample, turns=(*earlier, replace(reply, weight=1.0)))
    encoder = replace(record.encoder, truncate=False, supervise="replies")
    try:
        return model_inputs(encoder.processor, encoder(answered, sizes), media, sizes, answered)
    except BadSample:
        return None


def _describe(record: ComparedRecord) -> Measured:
    """Return what is known of a record before a model is asked."""
    sample = record.sample
    turns = prompt_turns(sample) if sample.turns else ()
    question = next((turn for turn in reversed(turns) if turn.role == "user"), None)
    last = sample.turns[-1] if len(turns) < len(sample.turns) else None
    is_text = last is not None and last.supervised and not isinstance(last, ToolCallTurn)
    reply = [without_thinking(last_reply_text(sample))] if is_text else []
    return Measured(
        sample.id,
        record.dataset,
        dict(record.groups),
        ";".join(map(_name_medium, sample.media)),
        "" if question is None else question_text(question),
        list(sample.references) or reply,
        None if record.check is None else record.check.as_record(),
    )


def _name_medium(medium: ImageRef | VideoRef) -> str:
    """Return the path of an image or video; of an image that the record holds itself, a digest of its bytes."""
    if isinstance(medium, VideoRef):
        return str(medium.path)
    return str(medium) if medium.content is None else f"content:{blake2b(medium.content, digest_size=8).hexdigest()}"


def _describe_bad(record: ComparedRecord | BadSample, problem: _Prepared | BadSample) -> Measured:
    """Return the row of a record that cannot be asked."""
    assert isinstance(problem, BadSample)
    if isinstance(record, BadSample):
        return Measured(record.sample_id, error=record.reason)
    return replace(_describe(record), error=problem.reason)


def _catch(prepare: Callable[[ComparedRecord], _Prepared], record: ComparedRecord | BadSample) -> _Prepared | BadSample:
    if isinstance(record, BadSample):
        return record
    try:
        return prepare(record)
    except BadSample as error:
        return error


def _where_given(items: Sequence[Item | None], run: Callable[[list[Item]], Sequence[Result]]) -> list[Result | None]:
    """Return the result of each item, None for None; `run` takes those that are given at once, if there are any."""
    given = [item for item in items if item is not None]
    results = iter(run(given) if given else ())
    return [None if item is None else next(results) for item in items]
