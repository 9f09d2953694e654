"""Requests as pydantic and the limits see them: which field is named, and how."""

from typing import Any

import pytest

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.chat_request import UNSERVED_FIELDS, ChatRequest
from vlm.inference.serving.errors import RequestError
from vlm.inference.serving.validation import check_texts, parse_request

USER = {"role": "user", "content": "what?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(**fields: Any) -> ChatRequest:
    request = parse_request(ChatRequest, {"model": "m", "messages": [USER], **fields}, ServingConfig())
    check_texts(request, ServingConfig())
    return request


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        parse(**fields)
    assert refused.value.status == 400
    return refused.value


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(("fields", "param", "code"), [
    ({"foo": 1}, "foo", "unknown_parameter"),
    ({"mm_processor_kwargs": {}}, "mm_processor_kwargs", "unknown_parameter"),
    ({"x" * 300: 1}, "x" * 60 + "…", "unknown_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_type"),
    ({"messages": ["hello"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [USER, {"role": "function", "content": "a", "name": "f"}]}, "messages[1].role", "invalid_value"),
    ({"messages": [{**USER, "name": "me"}]}, "messages[0].name", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "assistant"}]}, "messages[0]", "invalid_value"),
    ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "b"}}]}, "messages[0].audio", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    (content("a"), "messages[0].content[0]", "invalid_type"),
    (content({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type", "invalid_value"),
    (content({"text": "a"}), "messages[0].content[0].type", "invalid_value"),
    (content({"type": "text", "text": 5}), "messages[0].content[0].text", "invalid_type"),
    (content({"type": "text", "text": "a", "foo": 1}), "messages[0].content[0].foo", "unknown_parameter"),
    (content({"type": "text"}), "messages[0].content[0].text", "missing_required_parameter"),
    (content({"type": "image_url"}), "messages[0].content[0].image_url", "missing_required_parameter"),
    (content({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url",
     "missing_required_parameter"),
    (content({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}),
     "messages[0].content[0].image_url.detail", "invalid_value"),
    (content({"type": "image_url", "image_url": "data:"}), "messages[0].content[0].image_url", "invalid_type"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": 1e-9}, "temperature", "invalid_value"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"n": 1.5}, "n", "invalid_type"),
    ({"n": 0}, "n", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stop": [""]}, "stop[0]", "invalid_value"),
    ({"stop": [5]}, "stop[0]", "invalid_type"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "unknown_parameter"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation",
     "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"logit_bias": []}, "logit_bias", "invalid_type"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format.json_schema.name",
     "invalid_value"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "invalid_value"),
    ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
    ({"modalities": []}, "modalities", "invalid_value"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    ({"service_tier": "flex"}, "service_tier", "invalid_value"),
    ({"user": 5}, "user", "invalid_type"),
    *(({name: {}}, name, "unsupported_parameter") for name in UNSERVED_FIELDS),
])  # fmt: skip
def test_the_field_at_fault_is_named(fields: dict[str, Any], param: str, code: str):
    error = refusal(**fields)
    assert (error.param, error.code) == (param, code)
    assert error.message.startswith(f"{param}: ")
    assert len(error.to_dict()["error"]["message"]) < 300


def test_the_model_is_needed():
    with pytest.raises(RequestError, match="model: is missing"):
        parse_request(ChatRequest, {"messages": [USER]}, ServingConfig())


def test_what_clients_send_is_taken():
    """Null leaves a field unused; a message of an answer comes back as it was given out."""
    names = {*ChatRequest.model_fields, *UNSERVED_FIELDS} - {"model", "messages"}
    assert parse(**dict.fromkeys(names)).n is None
    answer = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None,
              "function_call": None, "tool_calls": None}  # fmt: skip
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    parse(messages=[USER, answer, USER, called, {"role": "tool", "tool_call_id": "c1", "content": "5"}])
    parse(user="me", metadata={"a": "b"}, store=True, safety_identifier="x", prompt_cache_key="y",
          service_tier="auto", modalities=["text"], temperature=0, top_p=1, n=1)  # fmt: skip


def test_characters_of_tools_and_schemas_count():
    schema = {"type": "object", "description": "x" * 500_000}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert "serving.max_characters" in refusal(response_format=form).message


def test_messages_of_refusals_are_short_and_printable():
    error = RequestError("a\x1b[31m\u202e\ud83d" + "x" * 10_000, param="\x00").to_dict()["error"]
    assert len(error["message"]) < 600
    assert error["message"].startswith("a\\x1b[31m\\u202e\\ud83d")
    assert error["param"] == "\\x00"


@pytest.mark.parametrize("message", [
    {"role": "assistant", "refusal": "no " * 200_000},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no " * 200_000}]},
])  # fmt: skip
def test_refusals_count_as_characters(message: dict[str, Any]):
    assert refusal(messages=[USER, message]).code == "context_length_exceeded"


def test_what_is_kept_of_a_request_is_small():
    kept = parse(user="u" * 1000, seed=3).without_contents()
    assert (kept.user, list(kept.messages), kept.seed) == (None, [], 3)
