"""What processors, tokenizers and templates raise on a sample is a bad sample; errors of our own code are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import encode_sample, load_dataset
from vlm.data.encoding.labels import encode, encode_prompt, render
from vlm.data.encoding.processor_errors import describe_error, is_refusal, processor_errors
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, ImageRef, Sample, Turn
from vlm.data.skipped import Skipped
from vlm.data.stream import open_stream
from vlm.inference.generate import VisionLanguageModel
from vlm.models import VLMProcessor
from vlm.models.processing_messages import MediaMismatchError

ASKED = Sample("7", (Turn("user", ("what?",)), Turn("assistant", ("a thing",))))

TEMPLATES = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0]['content'] + 1 }}": "TypeError: can only concatenate str",
    "{{ messages[0].nothing.more }}": "has no attribute 'nothing'",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ messages[9]['content'] }}": "has no element 9",
}
"""A template that raises -> words of the reason."""


@pytest.fixture
def processor(parts: Parts) -> VLMProcessor:
    return parts.processor()


@pytest.mark.parametrize("template", TEMPLATES)
def test_whatever_a_template_raises_is_about_the_sample(processor: VLMProcessor, template: str):
    processor.chat_template = template
    with pytest.raises(BadSample, match="record '7': its template refuses it: ") as raised:
        encode(processor, ASKED)
    assert TEMPLATES[template] in raised.value.reason
    assert raised.value.__cause__ is not None
    with pytest.raises(BadSample) as again:
        encode(processor, ASKED)
    assert again.value.reason == raised.value.reason


def test_a_template_that_writes_half_of_a_pair_makes_bad_samples(processor: VLMProcessor):
    processor.chat_template = f"{processor.chat_template}{{{{ '\\ud83d' }}}}"
    sample = Sample("torn", (Turn("user", ("what?",)), Turn("assistant", ("a",))))
    with pytest.raises(
        BadSample, match="record 'torn': what the chat template writes has half of a surrogate"
    ) as raised:
        encode(processor, sample)
    assert raised.value.file is None
    with pytest.raises(BadSample, match="record 'p'"):
        encode_prompt(processor, sample.turns[:1], sample_id="p")


def test_an_error_of_our_own_code_is_none_of_the_sample(processor: VLMProcessor):
    processor.tokens_per_image = "three"  # pyright: ignore[reportAttributeAccessIssue] - a mistake of ours
    shown = Sample("7", (Turn("user", (ImageRef(Path("a.png")), "what?")), Turn("assistant", ("a",))))
    with pytest.raises(TypeError, match="can't multiply sequence"):
        encode(processor, shown)


def raised_by(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_whose_an_error_is():
    nothing: Any = (None, None)
    assert is_refusal(raised_by(lambda: json.loads("{")))  # by this file, which is none of the package
    assert is_refusal(MediaMismatchError("2 images given, but the text has 1"))
    assert not is_refusal(raised_by(lambda: __import__("no_such_module")))  # missing for every sample
    assert not is_refusal(raised_by(lambda: Skipped.from_error(*nothing)))  # innermost in ours
    with pytest.raises(BadSample, match="as it was"), processor_errors("the processor", "x"):
        raise BadSample("y", "as it was")


def test_an_error_is_described_in_a_line():
    assert describe_error(ValueError("the aspect ratio is too large\nsecond line")) == "the aspect ratio is too large"
    assert describe_error(ZeroDivisionError("division by zero")) == "ZeroDivisionError: division by zero"
    assert describe_error(KeyError()) == "KeyError"
    assert len(describe_error(ValueError("x" * 10_000))) == 300


class Picky:
    """An image processor that refuses images taller than wide, as some library's might."""

    def __init__(self, processor: VLMProcessor):
        self.processor = processor

    def __getattr__(self, name: str):
        return getattr(self.processor, name)

    def image_inputs(self, images, sizes=()):
        if any(image.height > image.width for image in images):
            raise RuntimeError("too tall at <Image at 0x7f00>")
        return self.processor.image_inputs(images, sizes)

    accepts_tensors = False


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Three records; the second image of the second one is tall."""
    for name, size in (("wide", (40, 20)), ("tall", (20, 40))):
        picture(1, size).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "yes"}]
    shown = [["wide.png"] * 2, ["wide.png", "tall.png"], ["wide.png"] * 2]
    lines = [{"id": f"r{i}", "image": images, "conversations": turns} for i, images in enumerate(shown)]
    (tmp_path / "records.json").write_text(json.dumps(lines))
    return tmp_path / "records.json"


def test_the_image_at_fault_is_named_and_the_record_left_out(processor: VLMProcessor, records: Path, tmp_path: Path):
    encoder = SampleEncoder(Picky(processor), 500, truncate=False)  # pyright: ignore[reportArgumentType]
    data = load_dataset(DatasetConfig(path=str(records), cache_dir=str(tmp_path / "cache")), encoder)
    found = [data[index] for index in range(3)]
    assert [isinstance(item, Skipped) for item in found] == [False, True, False]
    skipped = found[1]
    assert isinstance(skipped, Skipped)
    assert (skipped.record, skipped.id, skipped.file) == (1, "r1", str(tmp_path / "tall.png"))
    assert skipped.reason.startswith(f"the processor refuses image {tmp_path / 'tall.png'}: RuntimeError: too tall")
    assert str(skipped.as_error()).startswith(f"{records}, record 1: record 'r1': the processor refuses image")
    with pytest.raises(BadSample) as raised:
        encode_sample(data.sources[0], data.sample(1))
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_stream_goes_on_behind_a_first_record_that_a_template_refuses(processor: VLMProcessor, tmp_path: Path):
    turns = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]
    lines = [{"id": str(i), "conversations": turns[i == 0 :]} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    processor.chat_template = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + str(
        processor.chat_template
    )
    encoder = SampleEncoder(processor, 100, truncate=False)
    config = DatasetConfig(path=str(tmp_path / "a.jsonl"), streaming=True, cache_dir=str(tmp_path / "cache"))
    config.on_bad_sample = "error"
    with pytest.raises(ValueError, match=r"record '0': .*dataset.on_bad_sample=skip"):
        open_stream(config, encoder, seed=0, rank=0, world_size=1)
    config.on_bad_sample = "skip"
    stream = iter(open_stream(config, encoder, seed=0, rank=0, world_size=1))
    assert sum(isinstance(next(stream), Skipped) for _ in range(3)) == 1


def test_a_prompt_is_refused_in_a_sentence_without_a_record(parts: Parts):
    model, processor = parts.model("clip", "llama")
    ours = VisionLanguageModel(model, Picky(processor))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^the processor refuses image .*: RuntimeError: too tall"):
        ours.generate("what?", [picture(0, (20, 40))])


# Text of a megabyte


LONG_TEXTS = {
    "words": "word " * 200_000,
    "one word": "w" * 1_000_000,
    "blanks within": "a" + " " * 1_000_000 + "b",
    "lines": "\n" * 1_000_000 + "b",
    "digits": "1" * 1_000_000,
    "thinking that does not end": "<think>" * 140_000,
    "thinking that ends often": "</think>" * 120_000 + "b",
    "spelled images": "<image>" * 10_000,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_a_megabyte_is_rendered_at_once(processor: VLMProcessor, text: str):
    """Steps that grow with the square of a text's length would take from ten minutes to hours here."""
    for reply in (f"a{text}b", f" a{text}b "):
        rendered = render(processor, [Turn("user", (text,)), Turn("assistant", (reply,))])
        ((start, end),) = rendered.replies
        assert rendered.text[start:end] == reply


@pytest.mark.parametrize("name", ["words", "spelled images"])
def test_a_megabyte_is_tokenized_in_seconds(processor: VLMProcessor, name: str):
    asked = Sample("x", (Turn("user", (LONG_TEXTS[name],)), Turn("assistant", ("a",))))
    encoded = encode(processor, asked)
    assert len(encoded.labels) > 50_000
    assert sum(label != -100 for label in encoded.labels) == 2


def test_many_turns_take_seconds(processor: VLMProcessor):
    turns = (Turn("user", ("what? </s>",)), Turn("assistant", ("a thing",)))
    encoded = encode(processor, Sample("x", turns * 10_000))
    assert len(encoded.labels) > 10_000 * 10
