"""Renders conversations with tools or thinking, checks that the template writes them, and finds whole replies.

A reply with a tool call is more than its text: what the template writes around the call's name and arguments is also
trained on, and so are the marks around thinking. A reply begins where a prompt ends: the text before it is compared
with what the template writes before a requested answer. It ends at the token that ends every reply. So an empty
thinking block is supervised if the template leaves it to the model, and not if the prompt already contains it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm.data.encoding.markers import (
    MARKERS,
    NUMBERED,
    Rendered,
    Span,
    add_markers,
    break_media_tokens,
    reply_end,
    strip_markers,
)
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.encoding.thinking import find_thinking, has_thinking, is_thinking_asked, place_thinking
from vlm.data.processor import Processor
from vlm.data.sample import BadSample, Record, Sample, ToolCallTurn, Turn

DESCRIBED = ("name", "description")
"""Keys of a tool whose texts people write; templates copy these, and may look at others, such as `type`."""


def needs_whole_turns(turns: Sequence[Turn], tools: Sequence[object]) -> bool:
    """Return whether a conversation has tools, calls, results or thinking."""
    return bool(tools) or any(
        turn.role == "tool" or isinstance(turn, ToolCallTurn) or has_thinking(turn) for turn in turns
    )


class _MarkedMessages:
    """Messages with numbered markers around all of their texts, and the owner of each number.

    Attributes:
        messages: the messages for the template.
        owners: number -> (the index of the turn, None for a tool; what the text is, in words).
    """

    def __init__(self, processor: Processor, turns: Sequence[Turn], tools: Sequence[Record], *, numbered: bool = True):
        self.tokens = (processor.image_token, processor.video_token)
        self.numbered = numbered
        self.owners: dict[int, tuple[int | None, str]] = {}
        self.tools = [self._mark_tool(tool) for tool in tools]
        self.messages = [self._mark_turn(turn, index) for index, turn in enumerate(turns)]

    def _mark(self, text: str, turn: int | None, name: str) -> str:
        if not self.numbered:
            return break_media_tokens(text, self.tokens)
        number = len(self.owners)
        self.owners[number] = turn, name
        return add_markers(text, number, self.tokens)

    def _mark_turn(self, turn: Turn, index: int) -> Record:
        kind = "the result of a call" if turn.role == "tool" else "a reply" if turn.role == "assistant" else "a text"
        keeps_blanks = isinstance(turn, ToolCallTurn) or bool(turn.thinking)  # templates ask whether there is a text
        content = tuple(
            part if not isinstance(part, str) or (keeps_blanks and not part.strip()) else self._mark(part, index, kind)
            for part in turn.content
        )
        marked = replace(turn, content=content)
        if turn.thinking:
            marked = replace(marked, thinking=self._mark(turn.thinking, index, "thinking"))
        if isinstance(marked, ToolCallTurn):
            calls = tuple(self._mark_call(call, index) for call in marked.tool_calls)
            marked = replace(marked, tool_calls=calls)
        return marked.as_message(*self.tokens)

    def _mark_call(self, call: Record, turn: int) -> Record:
        function = call["function"]
        name = self._mark(function["name"], turn, f"the call of {function['name']}")
        arguments = self._mark_values(function["arguments"], turn, f"an argument of {function['name']}")
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _mark_values(self, value: object, turn: int, name: str) -> object:
        """Return arguments with markers around all strings that are not blank."""
        if isinstance(value, str):
            return self._mark(value, turn, name) if value.strip() else value
        if isinstance(value, Mapping):
            return {key: self._mark_values(item, turn, name) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._mark_values(item, turn, name) for item in value]
        return value

    def _mark_tool(self, tool: Record) -> Record:
        function = dict(tool["function"])
        for key in DESCRIBED:
            if isinstance(text := function.get(key), str) and text.strip():
                function[key] = self._mark(text, None, f"the {key} of the tool {tool['function']['name']}")
        return {**tool, "function": function}


def render_whole_turns(
    processor: Processor, sample: Sample, *, prompt: bool = False, thinking: bool | None = None, keep: bool = False
) -> Rendered:
    """Render a conversation with tools or thinking.

    Args:
        processor: the run's.
        sample: the conversation, and its tools.
        prompt: whether to add the text that precedes an answer; no reply is then looked for.
        thinking: what the template reads as `enable_thinking`; None: for a prompt the processor's own setting, else
            whether a reply after the last question has thinking.
        keep: whether a template that drops the thinking of a trained reply is refused.

    Raises:
        BadSample: the template refuses the conversation, or leaves out a tool, a call, a result or a reply.
    """
    if thinking is None and not prompt:
        thinking = is_thinking_asked(sample.turns)
    _check_texts(processor, sample)
    turns = place_thinking(sample.turns, processor.chat_template or "")
    text, spans, owners = _render(processor, turns, sample, prompt=prompt, thinking=thinking)
    _check_complete(text, spans, owners, sample.id)
    spoken = sorted(spans.values())
    if prompt:
        return Rendered(text, spoken, [])
    learned = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.supervised]
    finder = _ReplyFinder(processor, turns, sample, text, _spans_of_turns(spans, owners), thinking=bool(thinking))
    replies = [finder.find(index) for index in learned]
    if keep:
        _check_thinking(text, sample.turns, learned, replies, sample.id)
    weights = [turns[index].weight for index in learned]
    return Rendered(text, spoken, replies, tuple(weights) if any(weight != 1 for weight in weights) else ())


def _render(
    processor: Processor, turns: Sequence[Turn], sample: Sample, *, prompt: bool, thinking: bool | None
) -> tuple[str, dict[int, Span], dict[int, tuple[int | None, str]]]:
    """Return the conversation, the span of each marked text, and its owner.

    Raises:
        BadSample: the template refuses it, or treats marked texts differently from others.
    """
    marked = _MarkedMessages(processor, turns, sample.tools)
    plain = _MarkedMessages(processor, turns, sample.tools, numbered=False)
    written = []
    for messages in (marked, plain):
        with processor_errors("its template", sample.id):
            written.append(
                processor.apply_chat_template(
                    messages.messages,
                    add_generation_prompt=prompt,
                    tools=messages.tools or None,
                    enable_thinking=thinking,
                )
            )
    text, spans = strip_markers(written[0])
    if text != written[1].replace(NUMBERED, ""):
        problem = "its template does not copy tools, calls or results as they are; dataset.template names another"
        raise BadSample(sample.id, problem)
    return text, spans, marked.owners


def _check_texts(processor: Processor, sample: Sample) -> None:
    """Raise BadSample for markers in texts, and for special tokens in texts that cannot have markers."""
    calls = [turn.tool_calls for turn in sample.turns if isinstance(turn, ToolCallTurn)]
    texts = [part for turn in sample.turns for part in (*turn.content, turn.thinking) if isinstance(part, str)]
    if any(marker in text for text in [*texts, *map(repr_json, (*calls, *sample.tools))] for marker in MARKERS):
        raise BadSample(sample.id, "contains one of the Unicode noncharacters U+FDD0 to U+FDD2")
    for tool in sample.tools:
        function = {key: value for key, value in tool["function"].items() if key not in DESCRIBED}
        if spelled := processor.special_tokens.search(repr_json(function)):
            name = tool["function"]["name"]
            raise BadSample(
                sample.id, f"the parameters of its tool {name} spell {spelled[0]}, a special token of the model"
            )


def repr_json(value: object) -> str:
    """Return all keys and texts of nested values as one text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return " ".join(f"{key} {repr_json(item)}" for key, item in value.items())
    if isinstance(value, Sequence):
        return " ".join(map(repr_json, value))
    return ""


def _check_complete(
    text: str, spans: Mapping[int, Span], owners: Mapping[int, tuple[int | None, str]], sample_id: str
) -> None:
    """Raise BadSample if the template leaves out more than thinking."""
    for number, (turn, name) in owners.items():
        if number in spans or name == "thinking":
            continue
        place = "" if turn is None else f" (turn {turn + 1})"
        if turn is not None and name in ("a text", "a reply"):
            raise BadSample(sample_id, f"its template drops {name}{place}")
        advice = "choose a template that renders tools (dataset.template), or records without them"
        raise BadSample(sample_id, f"its template leaves out {name}{place}; {advice}")


def _check_thinking(
    text: str, turns: Sequence[Turn], learned: Sequence[int], replies: Sequence[Span], sample_id: str
) -> None:
    """Raise BadSample if the thinking of a trained reply is not part of it."""
    for index, (start, end) in zip(learned, replies, strict=True):
        thought = find_thinking(turns[index])
        if thought and thought not in text[start:end]:
            raise BadSample(
                sample_id,
                f"its template drops the thinking of turn {index + 1}; dataset.thinking=template trains on what it "
                "keeps; or end the record with this reply",
            )


def _spans_of_turns(spans: Mapping[int, Span], owners: Mapping[int, tuple[int | None, str]]) -> dict[int, Span]:
    """Return, for each turn, where its first text begins and its last one ends."""
    found: dict[int, Span] = {}
    for number, (start, end) in spans.items():
        turn, _ = owners[number]
        if turn is not None:
            before = found.get(turn, (start, end))
            found[turn] = min(before[0], start), max(before[1], end)
    return found


def _cut_at_thinking(prompt_end: str) -> str:
    """Return the end of a prompt up to its thinking mark, or all of it if there is none."""
    place = prompt_end.lower().find("think")
    start = max((prompt_end.rfind(mark, 0, place) for mark in "<[◁"), default=-1) if place >= 0 else -1
    return prompt_end if start < 0 else prompt_end[:start]


class _ReplyFinder:
    """Finds replies in a rendered conversation.

    Args:
        processor: the run's.
        turns: the turns, with thinking where the template reads it.
        sample: their sample, for its tools and name.
        text: the rendered conversation.
        spans: of each turn with a text, where its first text begins and its last one ends.
        thinking: what the template reads as `enable_thinking`.
    """

    def __init__(
        self,
        processor: Processor,
        turns: Sequence[Turn],
        sample: Sample,
        text: str,
        spans: Mapping[int, Span],
        *,
        thinking: bool,
    ):
        self.processor, self.turns, self.sample, self.text = processor, turns, sample, text
        self.spans, self.thinking = spans, thinking
        self._ending: str | None = None
        ordered = sorted(spans.values())
        self._next_start = dict(zip(ordered, [start for start, _ in ordered[1:]] + [len(text)], strict=True))
        self._previous_end = dict(zip(ordered, [0, *(end for _, end in ordered)], strict=False))

    def find(self, index: int) -> Span:
        """Return where a reply begins, and where it ends, before the token that ends it.

        Raises:
            BadSample: the template writes no reply there as it writes a prompt.
        """
        if index not in self.spans:
            raise BadSample(self.sample.id, f"its template drops the reply of turn {index + 1}")
        first, last = span = self.spans[index]
        before = self._previous_end[span]
        written, asked = self.text[before:first], self._prompt_end(index)
        if not written.startswith(asked):
            asked = _cut_at_thinking(asked)  # a template may write earlier replies without the mark
        if not written.startswith(asked):
            problem = f"its template writes {written[-60:]!r} before the reply of turn {index + 1}"
            raise BadSample(self.sample.id, f"{problem}, and {asked[-60:]!r} at the end of a prompt")
        return before + len(asked), self._find_end(index, last, self._next_start[span])

    def _prompt_end(self, index: int) -> str:
        """Return what the template writes after the last text of a prompt that ends before a turn.

        It renders the turns before it only from the last question, reply or call on, so that all replies together take
        linear time.
        """
        first = index - 1
        while first > 0 and (self.turns[first].role == "tool" or not self._has_text(self.turns[first])):
            first -= 1
        window = list(self.turns[max(first, 0) : index])
        if window and window[0].role == "assistant":
            window.insert(0, Turn("user", ("?",)))
        text, spans, _ = _render(self.processor, window, self.sample, prompt=True, thinking=self.thinking)
        return text[max(end for _, end in spans.values()) :]

    def _has_text(self, turn: Turn) -> bool:
        return isinstance(turn, ToolCallTurn) or any(isinstance(part, str) for part in turn.content)

    def _find_end(self, index: int, last: int, following: int) -> int:
        """Return where a reply ends whose last text ends at `last`, before the text at `following`."""
        turn = self.turns[index]
        ending = self._get_ending()
        if ending.strip():
            end = self.text.find(ending, last, following)
            if end >= 0:
                return end
        if isinstance(turn, ToolCallTurn):
            written = self.text[last : last + 40]
            problem = f"its template ends a call with {written!r}, but a reply with {ending!r}"
            raise BadSample(self.sample.id, f"{problem}; calls of this form cannot be trained on")
        return last

    def _get_ending(self) -> str:
        """Return what ends every reply: a special token or white space."""
        if self._ending is None:
            turns = [Turn("user", ("?",)), Turn("assistant", ("!",))]
            plain = Sample(self.sample.id, tuple(turns))
            text, spans, _ = _render(self.processor, turns, plain, prompt=False, thinking=False)
            end = max(end for _, end in spans.values())
            self._ending = text[end : reply_end(self.processor, text, end)].lstrip(" ")
        return self._ending
