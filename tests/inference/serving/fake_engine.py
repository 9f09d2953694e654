"""An engine that answers with a fixed text, a token for each character, so that HTTP is tested without chance."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from vlm.data.sample import Turn
from vlm.data.vision.images import Medium
from vlm.inference.engine.constraints import Constraint
from vlm.inference.engine.engine import Engine
from vlm.inference.engine.options import Piece, SamplingOptions, TokenAlternative, TokenLogprob
from vlm.inference.engine.row import Prepared
from vlm.inference.generate import VisionLanguageModel


def make_constraint(grammar: str) -> Constraint:
    """A constraint that nothing keeps to."""
    return Constraint(grammar, None)  # pyright: ignore[reportArgumentType]


class FakeConstraints:
    """Remembers what was compiled."""

    def json_object(self) -> Constraint:
        return make_constraint("object")

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Constraint:
        if isinstance(schema, Mapping) and schema.get("type") == "nonsense":
            raise ValueError("type nonsense is not known")
        return make_constraint(f"schema {schema}")

    def lark(self, grammar: str) -> Constraint:
        return make_constraint(grammar)


class FakeEngine(Engine):
    """Answers with `text`; prompts are prepared as by the real one.

    Attributes:
        text: the answer to every request.
        asked: the settings of every answer.
        prompt: the last prompt.
        gate: answers wait for it after their first piece.
        error: raised by `generate`, if set.
        num_open: the number of answers that were begun and are not closed.
    """

    def __init__(self, model: VisionLanguageModel, text: str = "Hello there."):
        self.model = model
        self.text, self.asked, self.num_open = text, list[SamplingOptions](), 0
        self.tools: Sequence[Mapping[str, Any]] = ()
        self.prompt = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.constraints: Any = FakeConstraints()

    @property
    def is_closed(self) -> bool:
        return False

    @property
    def num_waiting(self) -> int:
        return 0

    @property
    def num_running(self) -> int:
        return self.num_open

    def prepare(
        self, turns: Sequence[Turn], images: Sequence[Medium], tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> Prepared:  # fmt: skip
        self.tools = tools
        inputs = self.model.inputs([turns], [images], tools=tools, thinking=thinking)
        self.prompt = str(self.model.processor.tokenizer.decode(inputs["input_ids"][0]))
        return Prepared(inputs, inputs["input_ids"].shape[1])

    async def generate(self, prepared: Prepared, options: SamplingOptions) -> AsyncGenerator[Piece]:
        self.asked.append(options)
        self.num_open += 1
        try:
            text = self.text[: options.max_new_tokens]
            for place, letter in enumerate(text):
                ended = place == len(text) - 1
                reason = None if not ended else "stop" if text == self.text else "length"
                token = ord(letter)
                top = tuple(TokenAlternative(token, letter, (token,), -0.5) for _ in range(options.top_logprobs or 0))
                logprobs = (TokenLogprob(token, letter, (token,), -0.5, top),)
                yield Piece(letter, (token,), logprobs if options.top_logprobs is not None else (), reason)
                if self.error is not None:
                    raise self.error
                await self.gate.wait()
        finally:
            self.num_open -= 1

    def close(self) -> None:
        self.gate.set()
