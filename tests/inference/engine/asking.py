"""Asking an engine: one question or several at once, to the last piece of each answer."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.tiny_parts import picture
from vlm.config.schema import InferenceConfig
from vlm.inference.engine.engine import Engine
from vlm.inference.engine.options import Piece, SamplingOptions
from vlm.inference.engine.row import Prepared
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn


@dataclass(frozen=True)
class Question:
    """A question about some images, by their seeds."""

    text: str
    images: tuple[int, ...] = ()
    max_new_tokens: int = 8


QUESTIONS = (
    Question("what?", (0,), 5),
    Question("a much longer question about this: what is it, and why is it so?", (1,), 24),
    Question("no image here", (), 12),
    Question("see <image> and <image>", (2, 3), 17),
    Question("and this?", (4,), 9),
)
"""Questions of unequal lengths, whose answers have unequal lengths."""


def prepare(engine: Engine, question: Question) -> Prepared:
    turns = [user_turn(question.text, len(question.images))]
    return engine.prepare(turns, [picture(seed) for seed in question.images])


async def ask(engine: Engine, question: Question, prepared: Prepared | None = None, **options: Any) -> list[Piece]:
    prepared = prepared or prepare(engine, question)
    options = {"max_new_tokens": question.max_new_tokens, **options}
    return [piece async for piece in engine.generate(prepared, SamplingOptions(**options))]


def ask_all(engine: Engine, questions: Sequence[Question], **options: Any) -> list[list[Piece]]:
    prompts = [prepare(engine, question) for question in questions]

    async def gather() -> list[list[Piece]]:
        asked = zip(questions, prompts, strict=True)
        return await asyncio.gather(*(ask(engine, question, prompt, **options) for question, prompt in asked))

    return asyncio.run(gather())


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def answer_alone(model: VisionLanguageModel, question: Question) -> tuple[list[int], str]:
    """The ids and the text that `vlm generate` answers."""
    inputs = model.inputs(
        [[user_turn(question.text, len(question.images))]], [[picture(seed) for seed in question.images]]
    )
    options = model.generation_options(InferenceConfig(max_new_tokens=question.max_new_tokens))
    network: Any = model.model
    ids = network.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), str(model.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@contextmanager
def running(model: VisionLanguageModel, max_batch: int = 4) -> Iterator[Engine]:
    engine = Engine(model, max_batch)
    try:
        yield engine
    finally:
        engine.close()
