"""Tools and thinking in conversations: golden texts, of what is rendered and of what is supervised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import CHAT_TEMPLATES, IGNORE_INDEX, runs
from tests.tool_templates import HERMES, QWEN3, WEATHER, make_processor, make_processors
from vlm.data.encoding.labels import encode, encode_prompt
from vlm.data.records.conversations import read_messages
from vlm.data.sample import BadSample, ImageRef, Sample, ToolCallTurn, ToolResultTurn, Turn
from vlm.models import VLMProcessor

TOOL_TEXT = (
    '{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)


@pytest.fixture(scope="module")
def processors(parts) -> dict[str, VLMProcessor]:
    return make_processors(parts.processor().image_processor)


def call(name: str = "weather", number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*tool_calls: dict[str, Any], text: str = "", **keys: Any) -> ToolCallTurn:
    return ToolCallTurn("assistant", (text,), tool_calls=tool_calls, **keys)


def result(*content: Any, number: int = 1) -> ToolResultTurn:
    return ToolResultTurn("tool", content, call_id=f"call{number:05}")


def sample(*turns: Turn, tools: tuple[dict[str, Any], ...] = (WEATHER,)) -> Sample:
    return Sample("x", turns, tools=tools)


AGENT = sample(Turn("user", ("Rain in Bern?",)), calls(call(city="Bern")), result("wet"), Turn("assistant", ("Yes.",)))


def whole_text(processor: VLMProcessor, one: Sample) -> str:
    return processor.tokenizer.decode(encode(processor, one).input_ids, skip_special_tokens=False)


def learned(processor: VLMProcessor, one: Sample) -> list[str]:
    encoded = encode(processor, one)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return [processor.tokenizer.decode(run, skip_special_tokens=False) for run in runs(encoded.labels)]


GOLDEN = {
    "qwen3": (
        f"<|im_start|>system\n# Tools\n\n<tools>\n{TOOL_TEXT}\n</tools><|im_end|>\n"
        "<|im_start|>user\nRain in Bern?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nwet\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n",
        [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>',
            "Yes.<|im_end|>",
        ],
    ),
    "llama3": (
        None,
        ['{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>', "Yes.<|eot_id|>"],
    ),
    "mistral": (
        f"<s>[AVAILABLE_TOOLS][{TOOL_TEXT}][/AVAILABLE_TOOLS][INST] Rain in Bern?[/INST]"
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "call00001"}]</s>'
        '[TOOL_RESULTS]{"content": wet, "call_id": "call00001"}[/TOOL_RESULTS] Yes.</s>',
        ['[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "call00001"}]</s>', " Yes.</s>"],
    ),
    "hermes": (
        None,
        [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>',
            "Yes.<|im_end|>",
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_calls_are_learned_as_the_template_writes_them_and_results_are_read(processors, name: str):
    text, replies = GOLDEN[name]
    processor = processors[name]
    assert learned(processor, AGENT) == replies
    if text is not None:
        assert whole_text(processor, AGENT).removeprefix("<s>") == text.removeprefix("<s>")
    plain = processor.tokenizer.apply_chat_template(
        [turn.as_message("<image>") for turn in AGENT.turns], tools=[WEATHER], tokenize=False, enable_thinking=False
    )
    assert whole_text(processor, AGENT).removeprefix("<s>") == plain.removeprefix("<s>")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_with_tools_ends_where_the_learned_reply_begins(processors, name: str):
    """Of the call, and of the answer behind its result."""
    processor = processors[name]
    encoded = encode(processor, AGENT)
    starts = [place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX
              and encoded.labels[place - 1] == IGNORE_INDEX]  # fmt: skip
    for start, number in zip(starts, (1, 3), strict=True):
        prompt = encode_prompt(processor, AGENT.turns[:number], tools=AGENT.tools)
        empty_block = name == "qwen3" and number == 1  # which the template writes in the prompt, and not behind it
        ids = encoded.input_ids[:start]
        if empty_block:
            block = processor.tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
            ids = [*ids, *block]
        assert prompt == ids


def test_several_calls_with_text_before_them(processors):
    both = calls(call(city="Bern"), call(city="Genf", number=2), text="I look.")
    turns = (Turn("user", ("Rain?",)), both, result("wet"), result("dry", number=2), Turn("assistant", ("In Bern.",)))
    assert learned(processors["qwen3"], sample(*turns)) == [
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Genf"}}\n</tool_call><|im_end|>',
        "In Bern.<|im_end|>",
    ]
    with pytest.raises(BadSample, match="its template refuses it: This model only supports single tool-calls"):
        encode(processors["llama3"], sample(*turns))
    with pytest.raises(BadSample, match=r"its template drops a reply \(turn 2\)"):
        encode(processors["mistral"], sample(*turns))


def test_a_call_that_is_not_learned_is_read(processors):
    turns = list(AGENT.turns)
    turns[1] = replace(turns[1], supervised=False)
    for name in GOLDEN:
        unlearned = replace(AGENT, turns=tuple(turns))
        assert learned(processors[name], unlearned) == GOLDEN[name][1][1:]
        assert encode(processors[name], unlearned).input_ids == encode(processors[name], AGENT).input_ids


@pytest.mark.parametrize("name", GOLDEN)
def test_what_arguments_and_results_spell_is_no_special_token(processors, name: str):
    processor = processors[name]
    spelled = "<|im_end|></s><|eot_id|>[TOOL_CALLS]<image>\n<|im_start|>assistant\n"

    def special(word: str) -> list[int]:
        turns = (Turn("user", ("Rain?",)), calls(call(city=word, place={"names": [word]})), result(word))
        ids = encode(processor, sample(*turns, Turn("assistant", ("Yes.",)))).input_ids
        return [token for token in ids if token in processor.tokenizer.added_tokens_decoder]

    assert special(spelled) == special("words")
    turns = (Turn("user", ("Rain?",)), calls(call(city=spelled)), result("wet"), Turn("assistant", ("Yes.",)))
    assert len(learned(processor, sample(*turns))) == 2


def test_screenshots_stand_in_results(processors):
    picture = ImageRef(Path("screen.png"))
    turns = (
        Turn("user", ("Open it.",)),
        calls(call(city="x")),
        result("Opened:\n", picture),
        Turn("assistant", ("A cat.",)),
    )
    for name in GOLDEN:
        encoded = encode(processors[name], sample(*turns))
        assert encoded.input_ids.count(processors[name].image_token_id) == 3
        assert len(learned(processors[name], sample(*turns))) == 2
        assert encode(processors[name], sample(*turns[:2], result(picture), turns[3])).input_ids.count(
            processors[name].image_token_id
        ) == 3  # fmt: skip


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_that_ignores_tools_is_refused(parts, name: str):
    template = CHAT_TEMPLATES[name]
    processor = make_processor(parts.processor().image_processor, template.text, "</s>")
    with pytest.raises(BadSample, match=r"its template (leaves out the name of the tool weather|drops|refuses)"):
        encode(processor, sample(Turn("user", ("Rain?",)), Turn("assistant", ("Yes.",))))
    with pytest.raises(
        BadSample, match=r"its template (leaves out the call of weather|drops|refuses|leaves out the result)"
    ):
        encode(processor, replace(AGENT, tools=()))
    with pytest.raises(BadSample, match=r"its template (leaves out the name of the tool weather|drops|refuses)"):
        encode_prompt(processor, AGENT.turns[:1], tools=AGENT.tools)


def test_a_template_that_drops_results_or_arguments_is_refused(parts):
    image_processor = parts.processor().image_processor
    without_results = make_processor(image_processor, HERMES.replace("+ message.content + '\\n</tool", "+ '\\n</tool"))
    with pytest.raises(BadSample, match=r"its template leaves out the result of a call \(turn 3\)"):
        encode(without_results, AGENT)
    names_only = make_processor(
        image_processor, HERMES.replace("tool_call.function | tojson", "tool_call.function.name")
    )
    with pytest.raises(BadSample, match=r"its template leaves out an argument of weather \(turn 2\)"):
        encode(names_only, AGENT)
    counted = make_processor(
        image_processor, HERMES.replace("{{- '</tools>", "{{- (tools | tojson | length) ~ '</tools>")
    )
    with pytest.raises(BadSample, match="its template does not copy tools, calls or results as they are"):
        encode(counted, AGENT)


def test_special_tokens_in_the_parameters_of_a_tool_are_refused(processors):
    parameters = {"type": "object", "properties": {"<|im_end|>": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(BadSample, match=r"parameters of its tool f spell <\|im_end\|>"):
        encode(processors["qwen3"], replace(AGENT, tools=(tool,)))
    described = {"type": "function", "function": {"name": "weather", "description": "ends with <|im_end|>"}}
    ids = encode(processors["qwen3"], replace(AGENT, tools=(described,))).input_ids
    end = processors["qwen3"].tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == encode(processors["qwen3"], AGENT).input_ids.count(end)


# Thinking

THINKS = sample(Turn("user", ("1 + 1?",)), Turn("assistant", ("2",), thinking="Easy."), tools=())


def inline(thought: str, text: str, **keys: Any) -> Turn:
    return Turn("assistant", (f"<think>\n{thought}\n</think>\n\n{text}",), **keys)


def test_thinking_is_learned_from_the_mark_that_begins_it(processors):
    expected = ["<think>\nEasy.\n</think>\n\n2<|im_end|>"]
    written = sample(THINKS.turns[0], inline("Easy.", "2"), tools=())
    for name in ("qwen3", "hermes"):
        assert learned(processors[name], THINKS) == expected
        assert learned(processors[name], written) == expected
        assert encode(processors[name], written) == encode(processors[name], THINKS)


def test_a_thinking_prompt_leaves_the_mark_to_the_model(processors):
    processor = processors["qwen3"]
    encoded = encode(processor, THINKS)
    first = next(place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    text = processor.tokenizer.decode(encoded.input_ids[:first], skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\n")


def test_an_empty_block_is_supervised_only_where_the_model_has_to_write_it(processors):
    """Behind a result, in a conversation that thinks, the prompt has no empty block; without thinking it has one."""
    processor = processors["qwen3"]
    turns = list(AGENT.turns)
    assert learned(processor, AGENT)[-1] == "Yes.<|im_end|>"
    turns[1] = replace(turns[1], thinking="I look it up.")
    assert learned(processor, replace(AGENT, turns=tuple(turns))) == [
        "<think>\nI look it up.\n</think>\n\n" + GOLDEN["qwen3"][1][0],
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    empty = sample(THINKS.turns[0], inline("", "2"), tools=())
    assert learned(processor, empty) == ["2<|im_end|>"]


def test_earlier_thinking_is_what_the_template_makes_of_it(processors):
    turns = (*THINKS.turns, Turn("user", ("And 2 + 2?",)), inline("Hm.", "4"))
    both = sample(*turns, tools=())
    last = "<think>\nHm.\n</think>\n\n4<|im_end|>"
    assert learned(processors["qwen3"], both) == ["2<|im_end|>", last]
    assert learned(processors["hermes"], both) == ["<think>\nEasy.\n</think>\n\n2<|im_end|>", last]
    with pytest.raises(BadSample, match=r"its template drops the thinking of turn 2; dataset\.thinking=template"):
        encode(processors["qwen3"], both, keep_thinking=True)
    unlearned = replace(both, turns=(turns[0], replace(turns[1], supervised=False), *turns[2:]))
    assert learned(processors["qwen3"], unlearned) == [last]
    encode(processors["qwen3"], unlearned, keep_thinking=True)
    encode(processors["hermes"], both, keep_thinking=True)


def test_a_template_that_begins_thinking_in_its_prompt_leaves_the_mark_out(parts):
    """As those of models that always think."""
    text = QWEN3.replace(
        "'<|im_start|>assistant\\n' -}}\n    {%- if enable_thinking",
        "'<|im_start|>assistant\\n<think>\\n' -}}\n    {%- if enable_thinking",
    )
    text = text.replace("{%- if enable_thinking is defined and enable_thinking is false -%}", "{%- if false -%}")
    processor = make_processor(parts.processor().image_processor, text)
    assert learned(processor, THINKS) == ["Easy.\n</think>\n\n2<|im_end|>"]


# Weights


def test_tokens_of_a_reply_have_its_weight(processors):
    turns = (*AGENT.turns[:1], replace(AGENT.turns[1], weight=0.5), AGENT.turns[2], replace(AGENT.turns[3], weight=3.0))
    for name in GOLDEN:
        processor = processors[name]
        encoded = encode(processor, replace(AGENT, turns=turns))
        assert encoded.weights is not None
        pairs = list(zip(encoded.labels, encoded.weights, strict=True))
        assert {weight for label, weight in pairs if label == IGNORE_INDEX} == {1.0}
        for weight, text in zip((0.5, 3.0), GOLDEN[name][1], strict=True):
            ids = [label for label, own in pairs if own == weight]
            assert processor.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert encode(processor, AGENT).weights is None


# Long conversations


@pytest.mark.parametrize("name", GOLDEN)
def test_a_long_conversation_is_rendered_in_linear_time(processors, monkeypatch, name: str):
    """The characters that the template is given grow with the conversation, not with its square."""
    processor = processors[name]
    given: list[int] = []
    render = VLMProcessor.apply_chat_template

    def counted(self, conversation, *args, **kwargs):
        given.append(sum(len(str(message)) for message in conversation))
        return render(self, conversation, *args, **kwargs)

    monkeypatch.setattr(VLMProcessor, "apply_chat_template", counted)
    totals = []
    for number in (20, 80):
        picture = ImageRef(Path("screen.png"))
        turns = [Turn("user", ("Go on.",))]
        for place in range(number):
            turns += [calls(call(city="x" * 20, number=place)), result(picture, f"step {place}", number=place)]
        long = sample(*turns, Turn("assistant", ("Done.",)))
        given.clear()
        encoded = encode(processor, long)
        assert encoded.input_ids.count(processor.image_token_id) == 3 * number
        assert len(runs(encoded.labels)) == number + 1
        totals.append(sum(given))
    assert totals[1] < 4.5 * totals[0]


def test_a_record_is_read_and_encoded(processors):
    messages = [
        {"role": "user", "content": "Rain in Bern?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**call(), "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}],
        },
        {"role": "tool", "tool_call_id": "call00001", "content": "wet"},
        {"role": "assistant", "content": "Yes."},
    ]
    read = read_messages({"id": "x", "messages": messages, "tools": [WEATHER]}, Path())
    assert read == AGENT
