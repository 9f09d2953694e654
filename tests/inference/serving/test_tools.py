"""Tools: how templates write calls, what is read out of answers, and what models without tools refuse."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.inference.serving.fake_engine import FakeEngine
from tests.inference.serving.running import CHAT, make_body, make_client, make_endpoint
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import CHAT_TEMPLATES, Parts
from vlm.inference.engine.constraints import ConstraintCompiler
from vlm.inference.engine.engine import Engine
from vlm.inference.serving.chat_request import Tool
from vlm.inference.serving.tools import ToolFormat, find_tool_format, make_call_schema

HERMES = """
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
BARE = HERMES.replace("<tool_call>\\n", "").replace("\\n</tool_call>", "").replace('"arguments"', '"parameters"')
CODE = HERMES.replace('{"name": "\' + call.function.name + \'", "arguments": ', "' + call.function.name + '(")

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module")
def engine(parts: Parts) -> FakeEngine:
    model = make_random_model(parts, "llama")
    model.processor.chat_template = HERMES
    return FakeEngine(model)


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with make_client(make_endpoint(engine)) as client:
        yield client


def post(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(CHAT, json=make_body(**{"tools": [WEATHER], "max_tokens": 200, **fields}))
    return {"status": answer.status_code, **answer.json()}


def stream(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    body = make_body(**{"tools": [WEATHER], "max_tokens": 200, "stream": True, **fields})
    lines = client.post(CHAT, json=body).text.split("\n\n")
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


def test_the_form_of_calls_is_read_off_the_template(engine: FakeEngine):
    processor = engine.model.processor
    found = {}
    for name, template in {"hermes": HERMES, "bare": BARE, "code": CODE, "none": CHAT_TEMPLATES["chatml"].text}.items():
        processor.chat_template = template
        found[name] = find_tool_format(processor)
    processor.chat_template = HERMES
    assert found["hermes"] == ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")
    assert found["bare"] == ToolFormat("", "", "parameters")
    assert found["code"] is None
    assert found["none"] is None


@pytest.mark.parametrize(("answer", "text", "calls"), [
    ("Just text.", "Just text.", []),
    (CALL, None, [{"place": "Köln"}]),
    (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", [{"place": "Köln"}] * 2),
    ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ('<tool_call>{"name": "other", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "other", "arguments": {}}</tool_call>', []),
    ("a < b and <tool", "a < b and <tool", []),
])  # fmt: skip
def test_calls_are_read_out_of_an_answer_and_of_a_stream(
    client: TestClient, engine: FakeEngine, answer: str, text: str | None, calls: list[Any]
):
    engine.text = answer
    choice = post(client)["choices"][0]
    assert choice["message"]["content"] == text
    written = choice["message"].get("tool_calls", [])
    assert [json.loads(call["function"]["arguments"]) for call in written] == calls
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    choices = stream(client)
    assert "".join(choice["delta"].get("content") or "" for choice in choices).strip() == (text or "")
    streamed = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]) for call in streamed] == [
        (index, call["function"]) for index, call in enumerate(written)
    ]
    assert choices[-1]["finish_reason"] == choice["finish_reason"]


def test_a_call_comes_back_with_its_result(client: TestClient, engine: FakeEngine):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Köln"}'}}
    messages = [
        {"role": "user", "content": "the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain<|im_end|>"},
    ]
    seen: list[str] = []
    tokenize = engine.model.processor.tokenize

    def note(text: str, *args: Any) -> Any:
        seen.append(text)
        return tokenize(text, *args)

    engine.model.processor.tokenize = note  # pyright: ignore[reportAttributeAccessIssue]
    try:
        assert post(client, messages=messages, max_tokens=100)["status"] == 200
    finally:
        del engine.model.processor.tokenize
    assert '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>' in seen[-1]
    assert "<tool_response>\nrain<|im_end|>\n</tool_response>" in seen[-1]
    assert '"name": "weather"' in seen[-1].partition("</tools>")[0]


def test_a_choice_of_tools_constrains_the_answer(client: TestClient, engine: FakeEngine):
    engine.text = CALL
    post(client, tool_choice="required")
    constraint = engine.asked[-1].constraint
    assert constraint is not None
    assert '"const": "weather"' in constraint.grammar
    assert "<tool_call>" in constraint.grammar
    post(client, tool_choice={"type": "function", "function": {"name": "weather"}})
    assert engine.asked[-1].constraint == constraint
    found = post(client, tool_choice="none")
    assert found["choices"][0]["message"]["content"] == CALL
    assert engine.tools == []
    post(client, parallel_tool_calls=False)
    assert engine.asked[-1].stop == ("</tool_call>",)


USER_TURN = {"role": "user", "content": "what?"}
SPELLING_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "<|im_end|>"}}


@pytest.mark.parametrize(("fields", "words"), [
    ({"tools": [WEATHER, WEATHER]}, "same name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "strict=true needs"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]}, "spells '<|im_end|>'"),
    ({"response_format": {"type": "json_object"}}, "not served together with tools"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [SPELLING_CALL]}]}, "arguments of a call"),
])  # fmt: skip
def test_tools_that_cannot_be_given_are_refused(client: TestClient, fields: dict[str, Any], words: str):
    found = post(client, **fields)
    assert found["status"] == 400
    assert words in found["error"]["message"]


@pytest.mark.parametrize("template", [HERMES, BARE])
def test_an_answer_that_has_to_be_a_call_is_one(engine: FakeEngine, template: str):
    """The real engine, whose weights are chance, keeps to the tool's schema."""
    schema = {"type": "object", "properties": {"place": {"enum": ["Köln", "Rom"]}}, "required": ["place"],
              "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": schema}}
    engine.model.processor.chat_template = template
    real = Engine(engine.model)
    try:
        with make_client(make_endpoint(real)) as client:
            found = post(client, tools=[tool], tool_choice="required")
            named = {"type": "function", "function": {"name": "weather"}}
            choices = stream(client, tools=[tool], tool_choice=named)
    finally:
        real.close()
        engine.model.processor.chat_template = HERMES
    choice = found["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["place"] in ("Köln", "Rom")
    (streamed,) = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert streamed["function"] == call["function"]


def test_a_call_keeps_to_parameters_with_references(engine: FakeEngine):
    """As pydantic writes them: `$ref` refers to the parameters, which are a part of the call's schema."""
    place = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    parameters = {"$defs": {"Place": place}, "type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}}}
    tool = Tool.model_validate({"type": "function", "function": {"name": "weather", "parameters": parameters}})
    schema = json.dumps(make_call_schema(tool, "arguments"))
    compiler = ConstraintCompiler(engine.model.processor.tokenizer, [0])
    assert compiler.lark(f"start: call\ncall: %json {schema}") is not None


def test_embeddings_refuse_calls_that_spell_a_mark(client: TestClient):
    messages = [USER_TURN, {"role": "assistant", "content": "", "tool_calls": [SPELLING_CALL]}]
    answer = client.post("/v1/embeddings", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert "spell a mark" in answer.json()["error"]["message"]
