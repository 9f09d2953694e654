"""The official client of OpenAI against the endpoint with the real engine: what is sent, and what is read."""

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.inference.serving.running import listen, make_endpoint, to_part
from tests.tiny_parts import picture
from vlm.config.schema import InferenceConfig
from vlm.data.sample import ImageRef, Turn
from vlm.inference.engine.engine import Engine
from vlm.inference.generate import VisionLanguageModel

CONVERSATION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": [to_part(picture(0)), {"type": "text", "text": "what is this?"}]},  # pyright: ignore[reportAssignmentType]
    {"role": "assistant", "content": "a thing"},
    {"role": "user", "content": [{"type": "text", "text": "and"}, to_part(picture(1)), {"type": "text", "text": "?"}]},  # pyright: ignore[reportAssignmentType]
]
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "what?"}]


@pytest.fixture(scope="module")
def client(model: VisionLanguageModel) -> Iterator[OpenAI]:
    with listen(make_endpoint(Engine(model), key="key")) as port:
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0)


@pytest.fixture(scope="module")
def expected(model: VisionLanguageModel) -> str:
    turns = [
        Turn("user", (ImageRef(), "\nwhat is this?")), Turn("assistant", ("a thing",)),
        Turn("user", ("and", ImageRef(), "?")),
    ]  # fmt: skip
    return model.answer([turns], [[picture(0), picture(1)]], InferenceConfig(max_new_tokens=12))[0]


def test_a_conversation_with_images_gets_the_answer_of_generate(client: OpenAI, expected: str):
    found = client.chat.completions.create(model="tiny", messages=CONVERSATION, max_tokens=12)
    assert (found.choices[0].message.content or "").strip() == expected
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    again = client.chat.completions.create(
        model="tiny", messages=[*ASKED, found.choices[0].message, *ASKED], max_tokens=1
    )  # pyright: ignore[reportArgumentType]
    assert again.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_answer(client: OpenAI, expected: str):
    text, usage = "", None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model="tiny", messages=CONVERSATION, max_tokens=12, stream=True, stream_options=options
    ):  # pyright: ignore[reportCallIssue, reportArgumentType]
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text.strip() == expected
    assert usage is not None
    assert 0 < usage.completion_tokens <= 12
    with client.chat.completions.stream(model="tiny", messages=CONVERSATION, max_tokens=12) as stream:
        stream.until_done()
        assert (stream.current_completion_snapshot.choices[0].message.content or "").strip() == expected


def test_seeds_penalties_and_stops_are_honoured(client: OpenAI):
    def ask(**options: object) -> str:
        found = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=12, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return found.choices[0].message.content or ""

    drawn = [ask(temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    end = next(letter for letter in drawn[0][2:] if letter != "\ufffd")
    assert ask(temperature=1.5, seed=1, stop=[end]) == drawn[0][: drawn[0].index(end)]
    assert ask(presence_penalty=2, frequency_penalty=2) != ask(presence_penalty=-2, frequency_penalty=-2)


def test_log_probabilities_are_those_of_the_tokens(client: OpenAI):
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=4, n=2, logprobs=True, top_logprobs=3, temperature=1.0, seed=3
    )
    assert len(found.choices) == 2
    for choice in found.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert 0 < len(tokens) <= 4
        for token in tokens:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob
    first = found.choices[0].logprobs.content[0]  # pyright: ignore[reportOptionalMemberAccess, reportOptionalSubscript]
    banned = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=1, logprobs=True, logit_bias={str(5): 100}
    )
    assert first.bytes is not None
    assert banned.choices[0].logprobs is not None


def test_a_schema_is_kept_to(client: OpenAI):
    schema = {
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=400, response_format=form)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert found.choices[0].finish_reason == "stop"
    value = json.loads(found.choices[0].message.content or "")
    assert value.keys() == {"a", "b"}
    assert value["b"] in ("x", "y")


def test_models_are_listed_and_retrieved(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_refusals_are_the_clients_own_errors(client: OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="another", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=ASKED, reasoning_effort="high")
    assert refused.value.param == "reasoning_effort"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=4000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_embeddings_have_the_form_of_openai(client: OpenAI):
    found = client.embeddings.create(model="tiny", input=["a dog", "a dog", "an aeroplane in the sky"])
    first, second, third = (item.embedding for item in found.data)
    assert first == pytest.approx(second, abs=1e-5)
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-4)
    assert first != pytest.approx(third, abs=1e-2)
    plain = client.embeddings.create(model="tiny", input="a dog", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(first, abs=1e-4)
