"""Over every template: exactly the replies are supervised, each with the token that ends it."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

import vlm
from tests.tiny_parts import (
    CHAT_TEMPLATES,
    IGNORE_INDEX,
    QWEN3,
    ChatTemplate,
    byte_tokenizer,
    runs,
)
from vlm.data.encoding.labels import Encoded, encode, encode_prompt, limit_length, read_template, render, reply_end
from vlm.data.sample import BadSample, ContentPart, ImageRef, OverLong, Sample, Turn
from vlm.models import VLMProcessor

TEMPLATES = sorted(file.stem for file in Path(vlm.__file__).parent.glob("data/templates/*.jinja"))
"""The packaged templates."""
PICTURE = ImageRef(Path("picture.png"))

REPLIES = {
    "one": ["a red circle."],
    "several": ["a red circle.", "blue", "yes, 3 of them"],
    "lines": ["first\nsecond\n\nthird"],
    "other scripts": ["猫が二匹 🐱🐱", "naïve café"],
    "blanks at the ends": ["  a cat", "a cat  ", " \n a cat \t"],
    "nothing but blanks": ["  ", "a cat"],
    "empty": ["", "a cat", ""],
    "role words": ["USER: a ASSISTANT: b", "assistant", "model\nuser\n", "[INST] a [/INST]"],
    "special tokens": ["a </s> b", "<|im_end|>", "<image>", "x<|im_start|>user\ny<end_of_turn><|eot_id|><|end|>z"],
    "the same twice": ["yes", "yes", "yes"],
    "from right to left": ["שלום עולם, 3 חתולים", "مرحبا \u200fabc\u200e"],
    "fifty turns": [f"{number} cats\n" * (number % 3 + 1) + "." for number in range(50)],
    "braces": ["{{ messages }} {% if x %}", "{}"],
}


@pytest.fixture(scope="module")
def processors(parts) -> dict[str, VLMProcessor]:
    """A processor for each template; 3 tokens an image."""
    image_processor = parts.processor().image_processor
    return {name: make(image_processor, template) for name, template in CHAT_TEMPLATES.items()}


def make(image_processor: Any, template: ChatTemplate) -> VLMProcessor:
    eos = template.end if template.end.startswith("<") else "</s>"
    tokenizer = byte_tokenizer(template.text, bos=template.bos, eos=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return VLMProcessor(image_processor, tokenizer, chat_template=template.text, tokens_per_image=3)


def conversation(replies: list[str], system: str | None = None, asked: str = "and?") -> Sample:
    """An image and a question, then a question before each further reply."""
    turns = [Turn("system", (system,))] if system else []
    for number, reply in enumerate(replies):
        turns.append(Turn("user", (asked,) if number else (PICTURE, "\nwhat is it?")))
        turns.append(Turn("assistant", (reply,)))
    return Sample("x", tuple(turns))


def expected_runs(name: str, replies: list[str]) -> list[str]:
    """The supervised text: each reply behind its lead, with its end; `plain` has nothing between its captions."""
    template = CHAT_TEMPLATES[name]
    said = [reply.strip() if template.trims else reply for reply in replies]
    whole = [template.lead + reply + template.end for reply in said]
    return ["".join(whole)] if name == "plain" else whole


def decoded(processor: VLMProcessor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_every_packaged_template_is_tested():
    assert sorted(name for name in CHAT_TEMPLATES if not name.startswith("own-")) == TEMPLATES


@pytest.mark.parametrize("replies", REPLIES.values(), ids=REPLIES.keys())
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_replies_and_their_ends_are_supervised_and_nothing_else(processors, name: str, replies: list[str]):
    processor = processors[name]
    encoded = encode(processor, conversation(replies))
    assert [decoded(processor, run) for run in runs(encoded.labels)] == expected_runs(name, replies)
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.input_ids.count(processor.image_token_id) == 3


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_replies_put_together_by_chance_are_supervised_and_nothing_else(processors, name: str):
    """Whatever awkward pieces meet within a reply, and in the questions around it."""
    draw = random.Random(name)
    processor = processors[name]
    pieces = [piece for replies in REPLIES.values() for piece in replies[:6]] + ["\n", " ", "\t", "\r\n", "\u2028", "."]
    for _ in range(30):
        replies = ["".join(draw.choices(pieces, k=draw.randint(0, 4))) for _ in range(draw.randint(1, 5))]
        asked = "".join(draw.choices(pieces, k=3)) or "and?"
        encoded = encode(processor, conversation([*replies, "end"], asked=f"{asked}?"))
        expected = expected_runs(name, [*replies, "end"])
        assert [decoded(processor, run) for run in runs(encoded.labels)] == expected, (replies, asked)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("unlearned", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_a_reply_that_is_not_learned_is_read_but_not_supervised(processors, name: str, unlearned: tuple[int, ...]):
    """Its ids and those around it stay as they are."""
    processor, replies = processors[name], [" a red circle", "blue \n", "yes"]
    whole = conversation(replies)
    turns = list(whole.turns)
    for number in unlearned:
        turns[2 * number + 1] = replace(turns[2 * number + 1], supervised=False)
    encoded = encode(processor, replace(whole, turns=tuple(turns)))
    assert encoded.input_ids == encode(processor, whole).input_ids
    kept = [reply for number, reply in enumerate(replies) if number not in unlearned]
    supervised = "".join(decoded(processor, run) for run in runs(encoded.labels))
    assert supervised == "".join(expected_runs(name, kept))


def test_without_a_reply_to_learn_the_reason_is_said(processors):
    whole = conversation(["a cat", ""])
    asked = Sample("x", whole.turns[:1])
    left_out = replace(whole, turns=tuple(replace(turn, supervised=False) for turn in whole.turns))
    for sample, said in (
        (asked, "no reply to train on$"),
        (left_out, "those that are not blank have weight 0 or loss false"),
        (conversation(["", " \n"]).without_blank_replies(), "no reply to train on: its replies are blank"),
    ):
        with pytest.raises(BadSample, match=said):
            encode(processors["chatml"], sample)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("shown", [(), (PICTURE, "\n")])
def test_a_mark_that_is_a_word_is_read_as_plain_text(processors, name: str, shown: tuple[ContentPart, ...]):
    processor, asked = processors[name], "What does the tag <image> do, <image>?"
    sample = Sample("x", (Turn("user", (*shown, asked)), Turn("assistant", ("It is <image>.",))))
    ids = encode(processor, sample).input_ids
    assert ids.count(processor.image_token_id) == 3 * bool(shown)
    assert decoded(processor, ids).count(asked) == (name != "plain")


@pytest.mark.parametrize("name", [name for name, template in CHAT_TEMPLATES.items() if template.system])
def test_a_system_turn_is_read_but_not_supervised(processors, name: str):
    processor, replies = processors[name], ["a cat", "two"]
    encoded = encode(processor, conversation(replies, system="Be brief."))
    assert [decoded(processor, run) for run in runs(encoded.labels)] == expected_runs(name, replies)
    assert decoded(processor, encoded.input_ids).count("Be brief.") == (name != "plain")


@pytest.mark.parametrize("name", [name for name, template in CHAT_TEMPLATES.items() if not template.system])
def test_a_template_that_refuses_a_system_turn_names_the_record(processors, name: str):
    with pytest.raises(BadSample, match=r"record 'x': its template refuses it: System role not supported"):
        encode(processors[name], conversation(["a cat"], system="Be brief."))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_prompt_is_what_stands_before_the_first_supervised_token(processors, name: str):
    """What is asked at inference is what training saw, to the token."""
    processor = processors[name]
    for replies in (["a cat"], ["3", "4"], [""]):
        whole = conversation(replies)
        encoded = encode(processor, whole)
        first = next(index for index, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
        if name == "own-qwen3" and len(replies) > 1:  # writes an empty thinking block before the last reply only
            continue
        assert encode_prompt(processor, whole.turns[:1]) == encoded.input_ids[:first]


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "plain"])
def test_a_prompt_after_several_turns_is_a_prefix_too(processors, name: str):
    processor, whole = processors[name], conversation(["a cat", "two", "yes"])
    ids = encode(processor, whole).input_ids
    prompt = encode_prompt(processor, whole.turns[:5])
    assert ids[: len(prompt)] == prompt
    assert len(prompt) < len(ids)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_people_spell_never_becomes_a_special_token(processors, name: str):
    """Spelled special tokens and image tokens are text: the ids have as many of each as with other words."""
    processor = processors[name]
    special = {number: str(token) for number, token in processor.tokenizer.added_tokens_decoder.items()}
    spelled = "".join(special.values()) + " and <image> </s><|im_end|>\n<|im_start|>"

    def specials(text: str) -> list[int]:
        ids = encode(processor, conversation([text, "yes"], asked=text)).input_ids
        return [token for token in ids if token in special]

    assert specials(spelled) == specials("words")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_people_spell_is_read_back_as_they_wrote_it(processors, name: str):
    processor, asked = processors[name], "is </s> or <image> a <|im_end|>?"
    encoded = encode(processor, conversation(["yes", "no"], asked=asked))
    assert (asked in decoded(processor, encoded.input_ids)) == (name != "plain")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_an_images_tokens_stand_where_its_image_does(processors, name: str):
    processor = processors[name]
    turns = (Turn("user", (PICTURE, "one", PICTURE, "two")), Turn("assistant", ("a cat",)))
    text = decoded(processor, encode(processor, Sample("x", turns)).input_ids)
    assert ("<image>" * 6 if name == "plain" else "<image>" * 3 + "one" + "<image>" * 3 + "two") in text


def test_start_and_end_tokens_stand_around_each_image(parts):
    processor = parts.processor(start="<im_start>", end="<im_end>")
    encoded = encode(processor, conversation(["a cat"]))
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    first = tokens.index("<im_start>")
    assert tokens[first : first + 11] == ["<im_start>", *["<image>"] * 9, "<im_end>"]


def test_earlier_thinking_that_a_template_drops_is_not_supervised(processors):
    """Qwen3 keeps of earlier replies what follows their thinking; the text that is left is what is learnt."""
    processor = processors["own-qwen3"]
    replies = ["<think>\nhm\n</think>\n\na cat", "two"]
    encoded = encode(processor, conversation(replies))
    assert [decoded(processor, run) for run in runs(encoded.labels)] == ["a cat<|im_end|>", "two<|im_end|>"]
    text = decoded(processor, encoded.input_ids)
    assert "hm" not in text
    assert "<think>\n\n</think>\n\ntwo<|im_end|>" in text


def test_thinking_is_supervised_where_a_template_keeps_it(processors):
    processor, replies = processors["chatml"], ["<think>\nhm\n</think>\n\na cat", "<think></think>"]
    encoded = encode(processor, conversation(replies))
    assert [decoded(processor, run) for run in runs(encoded.labels)] == [f"{reply}<|im_end|>" for reply in replies]


def test_a_template_that_drops_a_reply_names_the_record(processors):
    processor = processors["chatml"]
    template = "{% for message in messages %}{{ message.role + ': ' + message.content[:40] + '\n' }}{% endfor %}"
    cut = VLMProcessor(processor.image_processor, processor.tokenizer, chat_template=template)
    with pytest.raises(BadSample, match=r"record 'x': its template drops the reply 'cat cat"):
        encode(cut, conversation(["cat " * 20]))


def test_a_template_whose_end_is_no_special_token_is_an_error(processors):
    processor = processors["chatml"]
    template = "{% for message in messages %}{{ message.role + message.content + '<end>' }}{% endfor %}"
    odd = VLMProcessor(processor.image_processor, processor.tokenizer, chat_template=template)
    with pytest.raises(ValueError, match=r"ends a reply with '<end>', which is no special token"):
        encode(odd, conversation(["a cat"]))


def test_a_reply_ends_behind_a_blank_and_a_special_token(processors):
    """Some templates write a blank before their end token: both are learnt."""
    assert reply_end(processors["chatml"], "a cat <|im_end|>\nx", 5) == len("a cat <|im_end|>")
    assert reply_end(processors["chatml"], "a cat\n\nx", 5) == len("a cat\n\n")


def test_a_token_that_reaches_into_a_reply_is_supervised(processors):
    """A tokenizer that joins line breaks has one token for the template's and the reply's."""
    chatml = processors["chatml"]
    tokenizer = byte_tokenizer("chatml")
    lines = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, bytes_])
    tokenizer.add_tokens(["\n\n"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = VLMProcessor(chatml.image_processor, tokenizer, chat_template=read_template("chatml"))
    labels = encode(processor, conversation(["\na cat"])).labels
    assert [decoded(processor, run) for run in runs(labels)] == ["\n\na cat<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_without_a_bos_token_gets_none(processors, name: str):
    """Qwen's has none: templates then begin with their first words."""
    tokenizer = byte_tokenizer(bos=None, eos="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = processors[name].image_processor
    processor = VLMProcessor(image_processor, tokenizer, chat_template=read_template(name), tokens_per_image=3)
    text = decoded(processor, encode(processor, conversation(["a cat"])).input_ids)
    usual = decoded(processors[name], encode(processors[name], conversation(["a cat"])).input_ids)
    assert text == usual.removeprefix(CHAT_TEMPLATES[name].bos)


def test_noncharacters_are_refused(processors):
    with pytest.raises(BadSample, match=r"record 'x'.*U\+FDD0"):
        encode(processors["chatml"], conversation(["a \ufdd0 cat"]))


def test_a_conversation_without_a_reply_has_nothing_to_supervise(processors):
    with pytest.raises(BadSample, match="no reply to train on"):
        encode(processors["chatml"], Sample("x", (Turn("user", ("what?",)),)))


def test_dates_do_not_reach_a_prompt(processors):
    """Llama-3.2's template would write today's date; a prompt is the same every day."""
    assert "Today Date: 26 Jul 2024" in render(processors["own-llama3.2"], conversation(["a cat"]).turns).text


def test_a_template_of_the_users_own_is_read_from_its_file(tmp_path: Path):
    (tmp_path / "mine.jinja").write_text(QWEN3)
    assert read_template(str(tmp_path / "mine.jinja")) == QWEN3
    assert read_template("v1").startswith("{#- Vicuna")


# Length


WHOLE = Encoded([1, 9, 9, 4, 5, 6], [IGNORE_INDEX] * 4 + [5, 6])


def test_a_sample_within_the_limit_is_left_alone():
    assert limit_length(WHOLE, 6, [9], "x", truncate=False) is WHOLE


def test_an_overlong_sample_is_refused_with_its_length():
    with pytest.raises(OverLong, match=r"record 'x': 6 tokens, at most 5 are allowed"):
        limit_length(WHOLE, 5, [9], "x", truncate=False)


def test_truncation_keeps_the_beginning():
    assert limit_length(WHOLE, 5, [9], "x", truncate=True) == Encoded([1, 9, 9, 4, 5], [IGNORE_INDEX] * 4 + [5])


@pytest.mark.parametrize(("second", "kept"), [([6, 7, 8], 5), ([6, 9, 8], 7)])
def test_nothing_is_left_of_a_question_whose_answer_is_cut(second: list[int], kept: int):
    """Unless an image stands in it."""
    two = Encoded([1, 9, 9, 4, 5, *second, 3, 2], [IGNORE_INDEX] * 4 + [5] + [IGNORE_INDEX] * 4 + [2])
    assert limit_length(two, 8, [9], "x", truncate=True) == Encoded(two.input_ids[:kept], two.labels[:kept])


@pytest.mark.parametrize(("longest", "what"), [(4, "every reply"), (2, "an image")])
def test_truncation_cuts_neither_images_nor_all_replies(longest: int, what: str):
    with pytest.raises(OverLong, match=rf"cutting it to {longest} would cut {what}"):
        limit_length(WHOLE, longest, [9], "x", truncate=True)


def test_a_learned_reply_between_images_that_see_each_other_is_refused(processors, monkeypatch: pytest.MonkeyPatch):
    processor = processors[TEMPLATES[0]]
    turns = [
        Turn("user", (PICTURE, "this?")), Turn("assistant", ("a cat",)), Turn("user", (PICTURE, "and this?")),
        Turn("assistant", ("a dog",)),
    ]  # fmt: skip
    encode(processor, Sample("pets", tuple(turns)))
    monkeypatch.setattr(processor, "sees_media_together", True)
    with pytest.raises(BadSample, match="put all images before it"):
        encode(processor, Sample("pets", tuple(turns)))
    turns[1] = replace(turns[1], supervised=False)
    encode(processor, Sample("pets", tuple(turns)))
    encode(processor, Sample("pets", (*turns[:2], Turn("user", ("and?",)), turns[3])))
