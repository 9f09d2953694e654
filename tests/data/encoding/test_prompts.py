"""Prompts: what a head reads ends where the reply would begin, and no token of the reply stands in it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import CHAT_TEMPLATES, IGNORE_INDEX, Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import load_dataset
from vlm.data.encoding.labels import Encoded, encode, encode_prompt
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, ImageRef, Sample, Turn
from vlm.data.sources import Source
from vlm.models import VLMProcessor

SEEN = ImageRef(Path("a.png"))
ASKED = Turn("user", (SEEN, "\nwhat is it?"))
SECRET = "ÆØÅßð"  # no template has such letters
TALKS = {
    "a question": (ASKED,),
    "a question and its answer": (ASKED, Turn("assistant", (SECRET,))),
    "two answers": (ASKED, Turn("assistant", ("a cat",)), Turn("user", ("sure?",)), Turn("assistant", (SECRET,))),
    "an answer with blanks": (ASKED, Turn("assistant", (f"  {SECRET} \n",))),
}
THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that puts an empty thinking block before the last reply, as Qwen3's does."""


@pytest.fixture(scope="module")
def processor(parts: Parts) -> VLMProcessor:
    return parts.processor()


def with_template(processor: VLMProcessor, text: str) -> VLMProcessor:
    own = copy.copy(processor)
    own.chat_template = text
    return own


def encoder(processor: VLMProcessor, longest: int = 999, **options: Any) -> PromptEncoder:
    return PromptEncoder(processor, longest, truncate=False, **options)


# The prompt alone


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_a_prompt_ends_before_its_last_reply(processor: VLMProcessor, name: str, talk: str):
    own, turns = with_template(processor, CHAT_TEMPLATES[name].text), TALKS[talk]
    asked = turns[:-1] if turns[-1].role == "assistant" else turns
    encoded = encoder(own).encode(Sample("1", turns))
    assert encoded.input_ids == encode_prompt(own, asked)
    assert encoded.labels == [IGNORE_INDEX] * len(encoded.input_ids)
    assert not set(SECRET) & set(own.tokenizer.decode(encoded.input_ids))


def test_what_a_reply_says_changes_nothing(processor: VLMProcessor):
    for template in CHAT_TEMPLATES.values():
        made = encoder(with_template(processor, template.text))
        found = [
            made(Sample("1", (ASKED, Turn("assistant", (text,))))) for text in ("yes", "no, it is not", " ", "<s>")
        ]
        assert all(one == found[0] for one in found)
        assert made(Sample("1", (ASKED,))) == found[0]


def test_a_suffix_stands_behind_every_prompt(processor: VLMProcessor):
    sample = Sample("1", TALKS["two answers"])
    bare, longer = encoder(processor).encode(sample), encoder(processor, suffix=(5, 7)).encode(sample)
    assert longer == Encoded([*bare.input_ids, 5, 7], [*bare.labels, IGNORE_INDEX, IGNORE_INDEX])


def test_a_prompt_is_never_cut(processor: VLMProcessor):
    sample = Sample("r1", (ASKED,))
    length = len(encoder(processor, suffix=(5,)).encode(sample).input_ids)
    assert encoder(processor, suffix=(5,)).min_length(Encoded([1] * 9, [IGNORE_INDEX] * 9)) == 9
    assert len(encoder(processor, length, suffix=(5,))(sample).input_ids) == length
    with pytest.raises(BadSample, match=rf"record 'r1': {length} tokens, at most {length - 1} are allowed"):
        encoder(processor, length - 1, suffix=(5,))(sample)
    with pytest.raises(ValueError, match=r"dataset.over_length=truncate: a head reads .* never cut"):
        PromptEncoder(processor, 99, truncate=True)


def test_a_sample_without_a_prompt_is_refused(processor: VLMProcessor):
    with pytest.raises(BadSample, match="record 'r1': there is nothing before its reply"):
        encoder(processor)(Sample("r1", (Turn("assistant", ("yes",)),)))
    plain = with_template(processor, CHAT_TEMPLATES["plain"].text)
    plain.tokenizer.bos_token = None
    with pytest.raises(BadSample, match="record 'r1': its template drops the whole prompt"):
        encoder(plain, suffix=(5,))(Sample("r1", (Turn("user", ("what?",)),)))
    with pytest.raises(BadSample, match="record 'r1': contains one of the Unicode noncharacters"):
        encoder(processor)(Sample("r1", (Turn("user", ("\ufdd0",)),)))


# With the reply behind it


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("talk", list(TALKS)[1:])
def test_with_answers_the_last_reply_alone_is_learnt(processor: VLMProcessor, name: str, talk: str):
    own = with_template(processor, CHAT_TEMPLATES[name].text)
    sample = Sample("1", TALKS[talk])
    whole, prompt = encode(own, sample), encoder(own).encode(sample).input_ids
    found = encoder(own, answers=True).encode(sample)
    assert found.input_ids == whole.input_ids
    assert found.input_ids[: len(prompt)] == prompt
    assert found.labels == [IGNORE_INDEX] * len(prompt) + whole.labels[len(prompt) :]
    assert SECRET in own.tokenizer.decode([label for label in found.labels if label != IGNORE_INDEX])
    assert next(place for place, label in enumerate(found.labels) if label != IGNORE_INDEX) == len(prompt)


def test_with_answers_a_sample_may_have_none(processor: VLMProcessor):
    sample = Sample("1", (ASKED,))
    assert encoder(processor, answers=True)(sample) == encoder(processor)(sample)


OTHERWISE = {
    "more before a reply": THINKS,
    "more before a prompt": "{{ messages | length }}" + CHAT_TEMPLATES["chatml"].text,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_template_that_renders_a_prompt_otherwise_once_it_is_answered_is_refused(processor: VLMProcessor, name: str):
    own = with_template(processor, OTHERWISE[name])
    sample = Sample("r1", (ASKED, Turn("assistant", ("yes",))))
    encoder(own).encode(sample)
    with pytest.raises(BadSample, match="record 'r1': its template renders a prompt differently once it is answered"):
        encoder(own, answers=True).encode(sample)


def test_a_reply_stands_behind_no_suffix(processor: VLMProcessor):
    with pytest.raises(
        ValueError, match=r"suffix=\(5,\), answers=True: a reply follows its prompt directly, so no suffix"
    ):
        encoder(processor, suffix=(5,), answers=True)


# Labels


@pytest.mark.parametrize("label", [None, 0, "x", [], ["a"], {"a": 1.5, "b": [True]}])
def test_labels_are_handed_on_as_json(processor: VLMProcessor, label: Any):
    text, group = encoder(processor).label_and_group(Sample("1", (ASKED,), label, "g"))
    assert (label if text is None else json.loads(text)) == label
    assert group == "g"
    assert SampleEncoder(processor, 9, truncate=False).label_and_group(Sample("1", (ASKED,), label, "g")) == (
        None,
        None,
    )


def test_a_label_that_json_cannot_hold_is_its_records_trouble(processor: VLMProcessor):
    with pytest.raises(BadSample, match=r"record 'r1': its label b'x' cannot be written as JSON"):
        encoder(processor).label_and_group(Sample("r1", (ASKED,), b"x"))


# Counts


def test_counts_of_another_encoder_are_not_taken(processor: VLMProcessor, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    config = DatasetConfig(path=str(tmp_path / "a.jsonl"))
    encoders = [
        SampleEncoder(processor, 99, truncate=False), encoder(processor), encoder(processor, suffix=(5,)),
        encoder(processor, suffix=(7,)), encoder(processor, answers=True),
    ]  # fmt: skip
    prints = [Source("a", config, tmp_path, one, 8).fingerprint for one in encoders]
    assert len(set(prints)) == len(prints)
    assert prints[1] == Source("a", config, tmp_path, encoder(processor, 55), 8).fingerprint


def test_prompts_are_counted_as_they_are_encoded(processor: VLMProcessor, tmp_path: Path):
    picture().save(tmp_path / "a.png")
    records = [{"image": "a.png", "prompt": "what?", "label": 1}, {"prompt": "what is it?"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = DatasetConfig(path=str(tmp_path / "a.json"), format="labelled")
    data = load_dataset(config, encoder(processor, suffix=(5,)))
    items = [data[index] for index in range(2)]
    assert [len(item["input_ids"]) for item in items] == data.lengths.tolist()
    assert data.contributions[0].truncated == 0
    assert [item["input_ids"][-1] for item in items] == [5, 5]
    assert items[0]["pixel_values"].shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match=r"record 0: no reply to train on"):
        load_dataset(config, SampleEncoder(processor, 99, truncate=False))
