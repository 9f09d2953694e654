"""Tools: whether a chat template has them, how it writes calls, and reading calls out of answers.

The form of a call is read off the template: it renders a call of a tool of ours, and what it writes around the JSON of
that call is what the model was trained to write. Forms other than a JSON object, within a tag or alone, are not served.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import meta

from vlm.data.encoding.markers import MARKERS
from vlm.data.processor import Processor
from vlm.inference.serving.chat_request import AssistantMessage, ChatRequest, Message, NamedToolChoice, Tool
from vlm.inference.serving.errors import RequestError, show

PROBE_NAME, PROBE_ARGUMENTS = "probe_tool", {"probe_key": "probe_value"}
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": True,
}
"""How llguidance reads a schema: white space as templates write it, and what it does not know is refused."""
PARAMETERS_ID = "urn:vlm:parameters"
OPENING_TAG = re.compile(r"<(\w+)>\s*$")
"""A tag in front of a call, such as `<tool_call>`."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call: JSON of `name` and arguments, between two tags or alone.

    Attributes:
        begin: the opening tag with the white space behind it; empty: the JSON is the whole answer.
        end: the closing tag with the white space before it.
        arguments_key: the key of the arguments.
    """

    begin: str
    end: str
    arguments_key: str

    @property
    def opening(self) -> str:
        """The opening tag alone."""
        return self.begin.strip()


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: the name of the function.
        arguments: its arguments, as JSON.
    """

    name: str
    arguments: str

    def to_dict(self) -> dict[str, object]:
        """Return the call as OpenAI writes it, with an id of its own."""
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def find_tool_format(processor: Processor) -> ToolFormat | None:
    """Return how the model writes calls of tools; None where its template has no tools, or another form of calls."""
    if not _names_tools(processor.chat_template or ""):
        return None
    call = {"type": "function", "id": "call00001", "function": {"name": PROBE_NAME, "arguments": PROBE_ARGUMENTS}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        text = processor.apply_chat_template(messages, tools=[PROBE_TOOL])
    except Exception:  # a template may do anything with a call
        return None
    for match in reversed([*re.finditer(r"\{", text)]):
        found = _read_object(text, match.start())
        key = next((key for key, value in found[0].items() if value == PROBE_ARGUMENTS), None) if found else None
        if found and key and found[0].get("name") == PROBE_NAME:
            return _read_surroundings(processor, text[: match.start()], text[found[1] :], key)
    return None


def _names_tools(template: str) -> bool:
    """Return whether a template reads the variable `tools`."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return "tools" in meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError:
        return False


def _read_object(text: str, start: int) -> tuple[dict[str, object], int] | None:
    """Return the JSON object at a place of a text, and where it ends; None where there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def _read_surroundings(processor: Processor, before: str, after: str, key: str) -> ToolFormat | None:
    """Return the form of a call out of what stands around its JSON."""
    tag = OPENING_TAG.search(before)
    if tag is not None:
        closing = re.match(rf"\s*</{re.escape(tag[1])}>", after)
        if closing is None or processor.special_tokens.search(f"{tag[0]}{closing[0]}"):
            return None  # special tokens are no part of an answer's text
        return ToolFormat(tag[0], closing[0], key)
    ends_at_once = processor.special_tokens.match(after.lstrip()) is not None or not after.strip()
    return ToolFormat("", "", key) if ends_at_once else None


def make_call_schema(tool: Tool, arguments_key: str) -> dict[str, object]:
    """Return the JSON schema of a call; references within the parameters' schema hold as they did."""
    parameters = tool.function.parameters or {"type": "object"}
    parameters = {"$id": PARAMETERS_ID, **parameters}  # `#/$defs/…` in it refers to it, not to the whole
    return {
        "x-guidance": JSON_STYLE,
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, arguments_key: parameters},
        "required": ["name", arguments_key],
        "additionalProperties": False,
    }


class Toolbox:
    """The tools of one request.

    Args:
        request: the request; its tools are used unless it chooses `none`.
        tool_format: how the model writes calls.
        processor: the model's.

    Raises:
        RequestError: the model has no tools, or these cannot be given to it.
    """

    def __init__(self, request: ChatRequest, tool_format: ToolFormat | None, processor: Processor):
        calls = any(message.role == "tool" or getattr(message, "tool_calls", None) for message in request.messages)
        param = "tools" if request.tools else "messages"
        if tool_format is None and (request.tools or calls):
            message = "the chat template of this model has no tools, or writes calls in a form that is not served"
            raise RequestError(f"{param}: {message}", param=param, code="unsupported_parameter")
        tools = request.tools or []
        self.choice = request.tool_choice or "auto"
        self.is_used = bool(tools) and self.choice != "none"
        self.tools = tools if self.is_used else []
        self.format = tool_format or ToolFormat("", "", "arguments")
        self.is_single = request.parallel_tool_calls is False
        for tool in self.tools:
            self._check(tool, processor)

    def _check(self, tool: Tool, processor: Processor) -> None:
        name = tool.function.name
        text = json.dumps(tool.model_dump(), ensure_ascii=False)
        spelled = processor.special_tokens.search(text)
        if spelled or any(marker in text for marker in MARKERS):
            reason = f"it spells {show(spelled[0]) if spelled else 'a Unicode noncharacter'}, a mark of the model's"
            raise RequestError(f"tools: function {name}: {reason}", param="tools", code="invalid_value")
        if tool.function.strict and not self.must_call:
            reason = "strict=true needs tool_choice=required, or the name of a function"
            raise RequestError(f"tools: function {name}: {reason}", param="tools", code="unsupported_parameter")

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.is_used and self.choice != "auto"

    def to_template(self) -> list[dict[str, object]]:
        """Return the tools as the chat template reads them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def grammar(self) -> str:
        """Return the grammar of an answer that has to be a call, in Lark's form with JSON schemas."""
        if isinstance(self.choice, NamedToolChoice):
            tools = [tool for tool in self.tools if tool.function.name == self.choice.function.name]
        else:
            tools = self.tools
        schemas = [make_call_schema(tool, self.format.arguments_key) for tool in tools]
        begin, end = (json.dumps(text) if text else "" for text in (self.format.begin, self.format.end))
        calls = " | ".join(f"call_{number}" for number in range(len(schemas)))
        rules = [f"call_{number}: %json {json.dumps(schema)}" for number, schema in enumerate(schemas)]
        return "\n".join([f"start: {begin} ({calls}) {end}", *rules])

    def read(self, answer: str) -> tuple[str, list[Call]]:
        """Return an answer's text, and the calls in it; what is no call of a known tool stays text."""
        if not self.is_used:
            return answer, []
        if not self.format.begin:
            call = self._read_call(answer.strip())
            return ("", [call]) if call else (answer, [])
        text, *written = answer.split(self.format.opening)
        calls: list[Call] = []
        for piece in written:
            inner, _, behind = piece.partition(self.format.end.strip())
            call = self._read_call(inner.strip())
            if call is None:
                text += f"{self.format.opening}{piece}"
            else:
                calls.append(call)
                text += behind if behind.strip() else ""
        return (text.strip() if calls else answer), calls[:1] if self.is_single else calls

    def _read_call(self, text: str) -> Call | None:
        found = _read_object(text, 0) if text.startswith("{") else None
        if found is None or text[found[1] :].strip():
            return None
        name, arguments = found[0].get("name"), found[0].get(self.format.arguments_key, {})
        known = [tool.function.name for tool in self.tools]
        if not isinstance(name, str) or name not in known or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))


class ToolStream:
    """Splits an answer that arrives in pieces: text goes on at once, what may be a call is kept until the end.

    Args:
        toolbox: the request's tools.
    """

    def __init__(self, toolbox: Toolbox):
        self.toolbox = toolbox
        self._held = ""
        self._is_text = not toolbox.is_used

    def push(self, text: str) -> str:
        """Return what of the answer so far is text for certain, without what was returned before."""
        self._held += text
        if not self.toolbox.format.begin and self._held.strip() and not self._held.lstrip().startswith("{"):
            self._is_text = True
        if self._is_text:
            return self._release(len(self._held))
        opening = self.toolbox.format.opening or "{"
        if (place := self._held.find(opening)) >= 0:
            return self._release(place)
        kept = next((n for n in range(len(opening) - 1, 0, -1) if self._held.endswith(opening[:n])), 0)
        return self._release(len(self._held) - kept)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def finish(self) -> tuple[str, list[Call]]:
        """Return the rest of the text, and the calls."""
        text, calls = self.toolbox.read(self._held)
        self._held = ""
        return text, calls


def read_arguments(arguments: str) -> Mapping[str, object] | str:
    """Return the arguments of an earlier call as a mapping where they are JSON of one, else as they are."""
    found = _read_object(arguments, 0) if arguments.startswith("{") else None
    return found[0] if found and not arguments[found[1] :].strip() else arguments


def check_earlier_calls(messages: Sequence[Message], processor: Processor) -> None:
    """Refuse arguments of earlier calls that spell a special token: templates write them as they are."""
    for message in messages:
        for call in message.tool_calls or () if isinstance(message, AssistantMessage) else ():
            text = call.function.arguments
            if processor.special_tokens.search(text) or any(marker in text for marker in MARKERS):
                reason = "the arguments of a call spell a mark of the model's"
                raise RequestError(f"messages: {reason}", param="messages", code="invalid_value")
