"""Calls of a family's own processor: how an image stands in a text, and ids that have to agree."""

import re
from collections.abc import Callable

import pytest
from PIL import Image
from transformers.models.qwen2_vl import Qwen2VLProcessor

from tests.families.tiny_families import gemma3, llava, phi4, qwen
from vlm.families.native import (
    CallForm,
    NativeProcessor,
    ProcessorMismatchError,
    find_call_form,
    find_video_text,
    image_inputs_of,
)
from vlm.families.processing import FamilyProcessor
from vlm.families.table import Family
from vlm.models.text_processing import special_token_pattern

BLANK = Image.new("RGB", (64, 64))


def render_with(image: str) -> Callable[[list[dict[str, object]]], str]:
    """A template that writes this for an image."""

    def render(messages: list[dict[str, object]]) -> str:
        """Render one message."""
        (message,) = messages
        items = message["content"]
        assert isinstance(items, list)
        return "user:" + "".join(image if item["type"] == "image" else item["text"] for item in items)

    return render


def render_tightly(messages: list[dict[str, object]]) -> str:
    """A template whose image stands before another special token, so that the text may be read in two ways."""
    return render_with("<|image_pad|>")(messages).replace("user:", "").replace("words", "<|end|>")


class Nameless:
    """A processor without a token for an image."""

    def __init__(self, native: Qwen2VLProcessor):
        self.tokenizer = native.tokenizer


def test_an_image_is_what_the_template_writes_for_it():
    native = qwen(Qwen2VLProcessor)
    framed = f"<|vision_start|>{native.image_token}<|vision_end|>"
    assert find_call_form(native, render_with(framed)) == (native.image_token, CallForm(framed))
    assert find_call_form(native, render_with("<picture>\n")) == ("<picture>", CallForm("<picture>"))
    assert find_call_form(native, None) == (native.image_token, CallForm(native.image_token))
    nameless = Nameless(native)
    assert find_call_form(nameless, render_with("<img>"))[0] == "<img>"  # pyright: ignore[reportArgumentType]
    assert find_call_form(nameless, render_tightly)[0] == "<|image_pad|>"  # pyright: ignore[reportArgumentType]
    assert find_call_form(native, render_tightly) == (native.image_token, CallForm(native.image_token))
    with pytest.raises(ProcessorMismatchError, match="Nameless names no image_token"):
        find_call_form(nameless, render_with(""))  # pyright: ignore[reportArgumentType]


def test_a_video_is_what_the_template_writes_for_it():
    def render(messages: list[dict[str, object]]) -> str:
        items = messages[0]["content"]
        assert isinstance(items, list)
        return "user:" + "".join("<start><video><end>" if item["type"] == "video" else item["text"] for item in items)

    assert find_video_text("<video>", render) == "<start><video><end>"
    assert find_video_text("<video>", None) == find_video_text("<video>", render_with("x")) == "<video>"


def test_a_template_of_strings_says_nothing_of_images():
    native = phi4()
    assert find_call_form(native, lambda messages: str(messages[0]["content"]))[0] == native.image_token


class Framed(Qwen2VLProcessor):
    """A processor that takes the images of a text as one list, and its token between two others."""

    def __call__(self, images: object = None, text: object = None, **options: object) -> object:
        """The outputs of a call in the right form."""
        assert isinstance(images, list)
        assert isinstance(text, list)
        if isinstance(images[0], list) or "<|vision_start|>" not in text[0]:
            raise ValueError("not so")
        return super().__call__(images=[images], text=text, **options)  # pyright: ignore[reportArgumentType]


def test_the_form_of_a_call_is_found():
    native = qwen(Framed)
    calls = NativeProcessor(native, native.image_token, CallForm(f"<|vision_start|>{native.image_token}<|vision_end|>"))
    calls.find_form(BLANK)
    assert not calls.form.nests_images
    (expansion,) = calls.expand([BLANK])
    assert expansion == native.image_token * (len(expansion) // len(native.image_token))
    calls = NativeProcessor(native, native.image_token, CallForm(native.image_token))
    with pytest.raises(ProcessorMismatchError, match="Framed cannot be called for one image: ValueError: not so"):
        calls.find_form(BLANK)


class Silent(Qwen2VLProcessor):
    """A processor that does not say what it writes for an image, and may write a blank behind it."""

    behind = ""

    def __call__(self, images: object = None, text: object = None, **options: object) -> object:
        """The outputs without replacements."""
        assert isinstance(text, list)
        written = [one.replace(self.image_token, self.image_token + self.behind) for one in text]
        outputs = super().__call__(images=images, text=written, **options)  # pyright: ignore[reportArgumentType]
        outputs.pop("text_replacement_offsets", None)
        return outputs


def test_what_a_processor_writes_is_read_from_its_ids():
    processor = FamilyProcessor(qwen(Silent), Family("silent"))
    assert not processor.inputs.form.replaces_tokens
    other = FamilyProcessor(qwen(Qwen2VLProcessor), Family("other"))
    text = f"a {processor.image_token} b <|end|>"
    spelled = [(text.index("<|end|>"), len(text))]
    sizes = [(64, 80)]
    assert processor.tokenize(text, spelled, sizes) == other.tokenize(text, spelled, sizes)


class Parting(Qwen2VLProcessor):
    """A processor that says nothing of what it writes: marks around images, once between two, and a blank for words."""

    def __call__(self, images: object = None, text: object = None, **options: object) -> object:
        """The outputs without replacements."""
        assert isinstance(text, list)
        mark = "<|turn|>"
        framed = [one.replace(self.image_token, f"{mark}{self.image_token}{mark}") for one in text]
        joined = [one.replace(mark * 2, mark) for one in framed]
        parted = [re.sub(rf"(?<={re.escape(self.image_token + mark)})(?=[^\s<])", " ", one) for one in joined]
        outputs = super().__call__(images=images, text=parted, **options)  # pyright: ignore[reportArgumentType]
        outputs.pop("text_replacement_offsets", None)
        return outputs


def test_what_a_call_writes_where_an_image_meets_another_or_words_is_written_here_too():
    processor = FamilyProcessor(qwen(Parting), Family("parting"))
    form, token = processor.inputs.form, processor.image_token
    assert (form.parts_words, form.shared_end) == (True, "<|turn|>")
    text = f"a{token}{token}b {token} c{token}"
    ids, spans = processor.tokenize(text, (), [(64, 80)] * 4)
    processor.calls.check_ids(ids, text, [Image.new("RGB", (80, 64))] * 4)
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|turn|>")) == 7
    assert text[slice(*spans[-1])] == token


def test_a_text_whose_ids_are_others_is_refused():
    native = qwen(Silent)
    processor = FamilyProcessor(native, Family("silent"))
    native.behind = "!"
    with pytest.raises(ProcessorMismatchError, match=r"Silent has \d+ ids for a text of 1 images, which has \d+ here"):
        processor.tokenize(f"a {processor.image_token} b", (), [(64, 64)])
    with pytest.raises(ProcessorMismatchError, match="the first that differ"):
        processor.check_chat()


def test_the_id_of_features_is_no_line_break():
    """Gemma 3 writes as many of them around a small image as soft tokens."""
    native = gemma3()
    calls = NativeProcessor(native, native.image_token, CallForm(native.image_token))
    assert calls.most_frequent_id(calls.expand([BLANK])[0]) == native.tokenizer.image_token_id


def test_a_bos_that_only_the_processor_writes_is_written_here_too():
    native = llava()
    native.tokenizer.chat_template = native.chat_template
    processor = FamilyProcessor(native, Family("llava"))
    assert not processor.inputs.form.prepends_bos
    calls = NativeProcessor(native, native.image_token, CallForm(native.image_token))
    ids = calls("what?<image>", [BLANK])["input_ids"][0].tolist()  # pyright: ignore[reportIndexIssue]
    calls.check_ids(ids[1:], "what?<image>", [BLANK])
    assert calls.form.prepends_bos


def test_an_output_that_is_no_tensor_is_refused():
    assert image_inputs_of({"input_ids": 1, "num_crops": [2, 3]}, ["input_ids"])["num_crops"].tolist() == [2, 3]
    with pytest.raises(ProcessorMismatchError, match="its output names is not a tensor: list"):
        image_inputs_of({"names": ["a"]}, [])


def test_an_image_of_several_tokens_that_a_user_spells_is_text():
    processor = FamilyProcessor(qwen(Qwen2VLProcessor), Family("other"))
    token, several = processor.image_token, processor.image_token * 3
    processor.media_tokens, processor.special_tokens = [several], special_token_pattern(processor.tokenizer, several)
    text = f"a {several} b"
    ids, spans = processor.tokenize(text, [(0, len(text))])
    assert processor.tokenizer.convert_tokens_to_ids(token) not in ids
    assert "".join(text[start:end] for start, end in spans) == text
