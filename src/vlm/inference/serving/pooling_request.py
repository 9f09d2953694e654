"""Requests to `/v1/classify` and `/v1/embeddings`: texts, or a conversation with its images."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator
from transformers import PreTrainedConfig

from vlm.assembly.language_models import max_positions
from vlm.config.serving_schema import ServingConfig
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, Turn
from vlm.data.vision.images import Medium
from vlm.inference.generate import prompt_inputs
from vlm.inference.serving.chat_request import FieldsWithoutEffect, Message, Text
from vlm.inference.serving.errors import RequestError
from vlm.inference.serving.images import ImageReader
from vlm.inference.serving.messages import read_messages
from vlm.inference.serving.service import Call
from vlm.inference.serving.tools import check_earlier_calls
from vlm.inference.serving.validation import check_messages, parse_request, refuse_beyond, refuse_characters


def _tag_input(value: object) -> str:
    return "(text)" if isinstance(value, str) else "(texts)"


Input = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[Annotated[list[Text], Field(min_length=1)], Tag("(texts)")],
    Discriminator(_tag_input),
]


class PoolingRequest(FieldsWithoutEffect):
    """A request that is answered by one pass of the model: texts, each a question by itself, or a conversation."""

    model: str
    input: Input | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: give a text or a list of texts, or else messages, which may have images")
        return self

    @property
    def texts(self) -> list[str]:
        """The texts of `input`."""
        return [self.input] if isinstance(self.input, str) else self.input or []


class ClassifyRequest(PoolingRequest):
    """A request for the predictions of all heads."""


class EmbeddingsRequest(PoolingRequest):
    """A request for embeddings."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """How many numbers each embedding keeps; for heads that embed alone."""
    input_type: Literal["query", "document"] | None = None
    """The side, which decides the system turn; for heads that embed alone, where it is `document` by default."""


Request = TypeVar("Request", bound=PoolingRequest)


def parse_inputs(kind: type[Request], call: Call) -> Request:
    """Return the request of a body. CPU work: call it in a worker thread.

    Raises:
        RequestError: it is refused; names the field.
    """
    body, config = call.parse(), call.service.config
    value = body.get("input")
    if isinstance(value, list) and len(value) > config.max_inputs:
        refuse_beyond("input", f"{len(value):,} texts", "max_inputs", config.max_inputs)
    request = parse_request(kind, body, config)
    call.service.check_model(request.model)
    return request


def prepare_inputs(
    request: PoolingRequest,
    processor: Processor,
    model_config: PreTrainedConfig,
    config: ServingConfig,
    suffix: Sequence[int] = (),
    system_prompt: str = "",
) -> list[SampleInputs]:
    """Return the model's inputs for each prompt of a request. CPU work: call it in a worker thread.

    `system_prompt` is the system turn of prompts that have none; empty: there is none.

    Raises:
        RequestError: a limit is passed, or a prompt or an image is refused.
    """
    conversations: list[tuple[list[Turn], list[Medium], str]] = []
    if request.messages is not None:
        check_messages(request.messages, config)
        check_earlier_calls(request.messages, processor)
        turns, images = read_messages(request.messages, ImageReader(processor, config).read)
        conversations.append((turns, images, "messages"))
    if sum(map(len, request.texts)) > config.max_characters:
        refuse_characters("input", config.max_characters)
    conversations += [([Turn("user", (text,))], [], f"input[{place}]") for place, text in enumerate(request.texts)]
    rows: list[SampleInputs] = []
    positions = max_positions(model_config)
    for turns, images, param in conversations:
        if system_prompt and turns[0].role != "system":
            turns = [Turn("system", (system_prompt,)), *turns]
        try:
            rows.append(prompt_inputs(processor, turns, images, suffix))
        except BadSample as error:
            raise RequestError(f"{param}: {error.reason}", param=param, code="invalid_prompt") from None
        if (length := len(rows[-1]["input_ids"])) > positions:
            message = f"{param}: {length:,} tokens, and the model reads at most {positions:,}"
            raise RequestError(message, param=param, code="context_length_exceeded")
    return rows


def count_tokens(rows: Sequence[SampleInputs]) -> int:
    """Return the number of tokens of prompts, those of images included."""
    return sum(len(row["input_ids"]) for row in rows)
