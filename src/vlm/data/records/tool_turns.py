"""Records of agents and reasoners: tools, calls of tools, their results, and thinking, as the many forms write them.

Imports siblings and the standard library only. Every function raises `BadSample` for a value of another form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm.data.records.fields import first_present, is_empty
from vlm.data.records.text import text_from_value
from vlm.data.sample import BadSample, ContentPart, Record, ToolCallTurn, ToolResultTurn, Turn

TOOL_ROLES = ("tool", "function", "observation", "tool_response", "ipython")
"""Roles of the result of a call: of OpenAI's messages, ShareGPT's records, ms-swift's and Llama's."""
CALL_ROLES = ("tool_call", "function_call")
"""Roles of a turn whose text is a call as JSON: of ms-swift's messages and ShareGPT's records."""
_TOOL_ROLES = dict.fromkeys(TOOL_ROLES, "tool") | dict.fromkeys(CALL_ROLES, "assistant")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks in a turn that is no call and no result -> the role of the turn."""
LLAVA_ROLES = {**SPEAKERS, **_TOOL_ROLES}
"""Who speaks in a turn of LLaVA's and ShareGPT's records -> the role of the turn."""
MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", **_TOOL_ROLES}
"""Role of a message -> that of its turn."""
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a reply that hold what was thought before it."""
TOOL_KEYS = ("tools", "functions")
"""Keys of a record that list tools."""
TOOL_TURN_KEYS = (*THINKING_KEYS, "tool_calls", "function_call", "tool_call_id", "name")
"""Keys of a turn that are read here."""
_TOOL_TURN_KEY_SET = frozenset(TOOL_TURN_KEYS)


def read_tools(record: Record, sample_id: str) -> tuple[Record, ...]:
    """Read the tools of a record, a list or JSON of one, in OpenAI's form: `{"type": "function", "function": {…}}`.

    A function that stands by itself (`{"name", "description", "parameters"}`) is put into that form.
    """
    value = first_present(record, *TOOL_KEYS)
    if is_empty(value):
        return ()
    tools = _from_json(value)
    if not isinstance(tools, list):
        raise BadSample(sample_id, f"`tools` must be a list of functions, or JSON of one, got {value!r:.60}")
    return tuple(_read_tool(tool, sample_id) for tool in tools)


def _read_tool(tool: object, sample_id: str) -> Record:
    tool = _from_json(tool)
    function = tool.get("function") if isinstance(tool, dict) and "function" in tool else tool
    if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        form = '{"type": "function", "function": {"name", "description", "parameters"}}'
        raise BadSample(sample_id, f"a tool must be a function with a name, {form}, got {tool!r:.60}")
    if not function["name"].strip():
        raise BadSample(sample_id, "a tool has an empty name")
    return tool if function is not tool else {"type": "function", "function": function}


def read_calls(turn: Record, where: str, sample_id: str) -> tuple[Record, ...]:
    """Read the calls of a reply: `tool_calls`, or OpenAI's former `function_call`; () if there are none."""
    value = turn.get("tool_calls")
    if is_empty(value):
        value = turn.get("function_call")
    return () if is_empty(value) else _parse_calls(value, where, sample_id)


def with_call_text(turn: Record, role: str, text: object, where: str, sample_id: str) -> Record:
    """Return a turn whose text is a call as JSON, or a list of calls, with these under `tool_calls`.

    Turns of roles that are not among `CALL_ROLES` are returned unchanged.
    """
    if role not in CALL_ROLES:
        return turn
    if not isinstance(text, str):
        raise BadSample(sample_id, f"{where}: the text of a turn from {role} must be a call as JSON, got {text!r:.60}")
    return {**turn, "tool_calls": list(_parse_calls(text, where, sample_id))}


def _parse_calls(value: object, where: str, sample_id: str) -> tuple[Record, ...]:
    parsed = _from_json(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    return tuple(_read_call(call, f"{where}: a call", sample_id) for call in calls)


def _read_call(call: object, where: str, sample_id: str) -> Record:
    """Return a call in OpenAI's form, its arguments as a mapping where they are JSON of one."""
    call = _from_json(call)
    function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
        form = '{"name": …, "arguments": {…}}'
        raise BadSample(sample_id, f"{where} must be {form}, by itself or under `function`, got {call!r:.80}")
    arguments = _from_json(first_present(function, "arguments", "parameters"))
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict | str):
        problem = f"{where} of {name}: `arguments` must be an object, or JSON of one, got {arguments!r:.60}"
        raise BadSample(sample_id, problem)
    call_id = {} if call.get("id") is None else {"id": str(call["id"])}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _from_json(value: object) -> object:
    """Return what a text is as JSON, where it is JSON of an object or a list; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed


def read_thinking(turn: Record, role: str, where: str, sample_id: str) -> str | None:
    """Read what was thought before a reply, where the record has it apart from the reply; None if it has not."""
    given = {key: turn[key] for key in THINKING_KEYS if not is_empty(turn.get(key))}
    if not given:
        return None
    key, value = next(iter(given.items()))
    text = text_from_value(value)
    if text is None:
        raise BadSample(sample_id, f"{where}: `{key}` must be a string, got {value!r:.60}")
    if role != "assistant":
        raise BadSample(sample_id, f"{where}: `{key}` of the {role}'s turn; only the assistant thinks")
    if any(text_from_value(other) != text for other in given.values()):
        raise BadSample(sample_id, f"{where}: {' and '.join(given)} differ; leave one of them out")
    return text


def make_turn(
    role: str, content: tuple[ContentPart, ...], learned: tuple[bool, float], turn: Record, where: str, sample_id: str
) -> Turn:
    """Make a turn with its calls, the call that it is the result of, and its thinking.

    Args:
        role: one of `ROLES`.
        content: texts, images and videos in order.
        learned: whether it is trained on, and the weight of its loss.
        turn: the turn as the record has it.
        where: its place, for messages.
        sample_id: the name of the record.
    """
    if role != "tool" and _TOOL_TURN_KEY_SET.isdisjoint(turn):  # as nearly always
        return Turn(role, content, *learned)
    thinking = read_thinking(turn, role, where, sample_id)
    calls = read_calls(turn, where, sample_id)
    if calls and role != "assistant":
        raise BadSample(sample_id, f"{where}: the {role}'s turn has calls of tools; only the assistant calls tools")
    if calls:
        return ToolCallTurn(role, content, *learned, thinking, calls)
    if role == "tool":
        call_id, name = (None if turn.get(key) is None else str(turn[key]) for key in ("tool_call_id", "name"))
        return ToolResultTurn(role, content, *learned, thinking, call_id, name)
    return Turn(role, content, *learned, thinking)


def join_calls(turns: Sequence[Turn]) -> list[Turn]:
    """Return turns in which a call that stood in a turn of its own belongs to the reply before it.

    So ms-swift and ShareGPT write a reply with a call, or with several calls at once. Turns that are trained on
    otherwise stay apart.
    """
    if not any(isinstance(turn, ToolCallTurn) for turn in turns):
        return list(turns)
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.role == "assistant"
            and isinstance(turn, ToolCallTurn)
            and not turn.content
            and (last.supervised, last.weight) == (turn.supervised, turn.weight)
        ):
            before = last.tool_calls if isinstance(last, ToolCallTurn) else ()
            joined[-1] = ToolCallTurn(
                "assistant", last.content, last.supervised, last.weight, last.thinking, (*before, *turn.tool_calls)
            )
        else:
            joined.append(turn)
    return [
        replace(turn, content=("",)) if isinstance(turn, ToolCallTurn) and not turn.content else turn for turn in joined
    ]


def is_call(turn: Mapping[str, object], role: object) -> bool:
    """Return whether a turn calls tools, so that its text may be missing."""
    return role in CALL_ROLES or any(not is_empty(turn.get(key)) for key in ("tool_calls", "function_call"))
