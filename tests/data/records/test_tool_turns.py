"""Records of agents and reasoners, in the forms of OpenAI, ShareGPT, LLaMA-Factory and ms-swift: one sample."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import picture
from vlm.data.records.conversations import read_llava, read_messages
from vlm.data.sample import BadSample, ImageRef, Sample, ToolCallTurn, ToolResultTurn, Turn
from vlm.data.tools.forms import FORMS

FUNCTION = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TURNS = (
    Turn("user", ("Rain?",)),
    ToolCallTurn("assistant", ("",), tool_calls=(CALL,)),
    ToolResultTurn("tool", ("wet",)),
    Turn("assistant", ("Yes.",)),
)
WRITTEN_CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'


def messages(*middle: dict[str, Any], tools: Any = (TOOL,), **keys: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "Rain?"}, *middle, {"role": "assistant", "content": "Yes."}]
    return {"id": "x", "tools": list(tools) if isinstance(tools, tuple) else tools, "messages": turns, **keys}


def llava(*middle: tuple[str, str]) -> dict[str, Any]:
    turns = [("human", "Rain?"), *middle, ("gpt", "Yes.")]
    return {"id": "x", "tools": json.dumps([FUNCTION]), "conversations": [{"from": a, "value": b} for a, b in turns]}


FORMS_OF_AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "OpenAI": (read_messages, messages(
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
        ]},
        {"role": "tool", "content": "wet"},
    )),
    "OpenAI, formerly": (read_messages, messages(
        {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Bern"}'}},
        {"role": "function", "content": "wet"},
        tools=[FUNCTION],
    )),
    "Hugging Face": (read_messages, messages(
        {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": [{"type": "text", "text": "wet"}]},
    )),
    "ms-swift": (read_messages, messages(
        {"role": "tool_call", "content": WRITTEN_CALL}, {"role": "tool_response", "content": "wet"},
        tools=json.dumps([TOOL]),
    )),
    "ShareGPT": (read_llava, llava(("function_call", WRITTEN_CALL), ("observation", "wet"))),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS_OF_AGENTS)
def test_every_form_of_a_call_is_read(name: str, tmp_path: Path):
    read, record = FORMS_OF_AGENTS[name]
    assert read(record, tmp_path) == Sample("x", TURNS, tools=(TOOL,))


def test_calls_that_follow_each_other_are_one_reply(tmp_path: Path):
    record = llava(("gpt", "I look."), ("function_call", WRITTEN_CALL), ("function_call", f"[{WRITTEN_CALL}]"),
                   ("observation", "wet"), ("observation", "dry"))  # fmt: skip
    turns = read_llava(record, tmp_path).turns
    assert turns[1] == ToolCallTurn("assistant", ("I look.",), tool_calls=(CALL, CALL))
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]


def test_names_and_ids_are_read(tmp_path: Path):
    call = {"id": "a", **CALL}
    record = messages(
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "name": "weather", "content": "wet"},
    )
    turns = read_messages(record, tmp_path).turns
    assert turns[1] == ToolCallTurn("assistant", ("",), tool_calls=(call,))
    assert turns[2] == ToolResultTurn("tool", ("wet",), call_id="a", name="weather")
    assert turns[2].as_message("<image>") == {
        "role": "tool", "content": "wet", "tool_call_id": "a", "name": "weather",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["<image>done", [{"type": "image"}, {"type": "text", "text": "done"}]])
def test_results_show_images(content: Any, tmp_path: Path):
    picture().save(tmp_path / "a.png")
    record = messages(
        {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": content}, images=["a.png"]
    )
    assert read_messages(record, tmp_path).turns[2].content == (ImageRef(tmp_path / "a.png"), "done")
    words = messages({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "<image>\ndone"})
    assert read_messages(words, tmp_path).turns[2].content == ("<image>\ndone",), "without images it is a word"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_a_reply_is_read(key: str, tmp_path: Path):
    record = messages({"role": "assistant", "content": "No.", key: "Hm."}, {"role": "user", "content": "Sure?"})
    assert read_messages(record, tmp_path).turns[1] == Turn("assistant", ("No.",), thinking="Hm.")
    record = messages({"role": "assistant", "content": "No.", key: ""}, {"role": "user", "content": "Sure?"})
    assert read_messages(record, tmp_path).turns[1] == Turn("assistant", ("No.",))


def test_a_key_of_an_agent_can_be_ignored(tmp_path: Path):
    record = messages({"role": "assistant", "content": "No.", "thinking": "Hm."}, {"role": "user", "content": "?"})
    sample = read_messages(record, tmp_path, ignore_keys=["tools", "thinking"])
    assert sample.tools == ()
    assert sample.turns[1] == Turn("assistant", ("No.",))


def bad_call(**call: Any) -> dict[str, Any]:
    return messages({"role": "assistant", "tool_calls": [call]})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tools that are no list": (messages(tools={"a": 1}), "`tools` must be a list of functions"),
    "tools that are no JSON": (messages(tools="[weather"), "`tools` must be a list of functions, or JSON of one"),
    "a tool without a name": (messages(tools=[{"type": "function"}]), "a tool must be a function with a name"),
    "a call without a name": (bad_call(arguments={"a": 1}), "message 2: a call must be"),
    "arguments that are a list": (bad_call(name="f", arguments=[1]), "`arguments` must be an object, or JSON of one"),
    "a call that is no JSON": (messages({"role": "tool_call", "content": "weather()"}), "message 2: a call must be"),
    "a call of the user": (
        messages({"role": "assistant", "content": "?"}, {"role": "user", "content": "a", "tool_calls": [CALL]}),
        "message 3: the user's turn has calls of tools",
    ),
    "thinking of the user": (
        messages({"role": "assistant", "content": "?"}, {"role": "user", "content": "a", "thinking": "b"}),
        "message 3: `thinking` of the user's turn; only the assistant thinks",
    ),
    "two thoughts": (
        messages({"role": "assistant", "content": "?", "thinking": "b", "reasoning": "c"}), "differ; leave one of them",
    ),
    "a result to learn": (messages({"role": "tool", "content": "a", "loss": True}), "only replies are trained on"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path):
    record, said = BAD[name]
    with pytest.raises(BadSample) as caught:
        read_messages(record, tmp_path)
    assert said in caught.value.reason
    assert caught.value.sample_id == "x"


@pytest.mark.parametrize("form", ["messages", "llava"])
@pytest.mark.parametrize("name", FORMS_OF_AGENTS)
def test_what_is_written_is_read_back(name: str, form: str, tmp_path: Path):
    """With thinking, weights and several references."""
    read, record = FORMS_OF_AGENTS[name]
    record = {**record, "references": ["Yes.", "yes"]}
    turns = record.get("messages") or record["conversations"]
    turns[-1] |= {"reasoning_content": "Hm.", "weight": 0.5}
    sample = read(record, tmp_path)
    assert sample.references == ("Yes.", "yes")
    assert (sample.turns[-1].thinking, sample.turns[-1].weight) == ("Hm.", 0.5)
    written = json.loads(json.dumps(FORMS[form](sample, tmp_path)))
    assert {"messages": read_messages, "llava": read_llava}[form](written, tmp_path) == sample
