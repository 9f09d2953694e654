"""The processor: pixels, placeholders, and what travels with a checkpoint."""

import base64
import copy
import json
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from torchvision.transforms.functional import pil_to_tensor
from transformers import AddedToken, AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlamaConfig

from tests.tiny_parts import (
    ENCODERS,
    LANGUAGE_MODELS,
    PATCHES,
    PREFIX_TOKENS,
    Parts,
    byte_tokenizer,
    picture,
    save_sentencepiece,
)
from vlm.assembly.compose import compose
from vlm.models import VLMProcessor
from vlm.models.configuration_vlm import FEATURE_STRATEGIES
from vlm.models.pixels import as_rgb, pad_to_square
from vlm.models.processing_messages import FIXED_DATE, images_in_conversation
from vlm.models.processing_vlm import IMAGE_MODES
from vlm.models.text_processing import read_prepend_scheme

POINTWISE = ("identity", "linear", "mlp")
"""Connectors that take features of any number and keep it; `test_connectors.py` composes models with all others."""

FITTING = [
    (encoder, strategy, connector)
    for encoder, strategy, connector in product(ENCODERS, FEATURE_STRATEGIES, POINTWISE)
    if not ("cls" in strategy and PREFIX_TOKENS[encoder] == 0)  # refused: there is no CLS token
    and not (connector == "identity" and encoder == "timm_convnet")  # refused: the widths differ
]


@pytest.fixture(scope="module")
def processor(parts: Parts) -> VLMProcessor:
    """CLIP at 24 pixels (9 patches), Llama, ChatML."""
    return parts.processor()


# The count


@pytest.mark.parametrize(("encoder", "strategy", "connector"), FITTING)
def test_an_image_has_as_many_placeholders_as_the_model_gives_features(
    parts: Parts, encoder: str, strategy: str, connector: str
):
    model, processor = parts.model(encoder, connector=connector, strategy=strategy)
    expected = {
        "patch": PATCHES[encoder],
        "cls+patch": PATCHES[encoder] + 1,
        "cls": 1,
        "full": PATCHES[encoder] + PREFIX_TOKENS[encoder],
    }
    with torch.no_grad():
        features = model.get_image_features(processor.pixel_values([picture(0), picture(1, (20, 50))]))
    assert features.shape == (2, expected[strategy], model.config.text_config.hidden_size)
    assert processor.tokens_per_image == expected[strategy]
    ids = processor.tokenize("a <image> b")[0]
    assert ids.count(processor.image_token_id) == expected[strategy]


# Pixels


@pytest.mark.parametrize("mode", [mode for mode in IMAGE_MODES if mode != "native"])  # see test_native_encoders.py
def test_pixels_have_the_encoders_shape(parts: Parts, mode: str):
    processor = parts.processor(image_mode=mode)
    assert processor.pixel_values([picture(0, (50, 20)), picture(1, (7, 70))]).shape == (2, 3, 24, 24)


def test_square_is_what_the_image_processor_does(processor: VLMProcessor):
    one = picture(0, (50, 20))
    expected = processor.image_processor([one], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixel_values([one]), expected)


@pytest.mark.parametrize(("size", "corner"), [((50, 20), (0, 15)), ((20, 51), (15, 0)), ((30, 30), (0, 0))])
def test_padding_puts_the_image_in_the_middle_of_a_square_of_its_colour(size, corner):
    colour = (122, 116, 104)
    one = picture(0, size)
    padded = pad_to_square(one, colour)
    assert padded.size == (max(size),) * 2
    assert padded.crop((*corner, corner[0] + size[0], corner[1] + size[1])).tobytes() == one.tobytes()
    blank = Image.new("RGB", size, colour)
    padded.paste(blank, corner)
    assert padded.tobytes() == Image.new("RGB", padded.size, colour).tobytes()


def test_pad_pads_in_the_mean_colour(parts: Parts):
    """`int(mean * 255)`, for CLIP (122, 116, 104): what is padded is all but zero behind the normalisation."""
    processor = parts.processor(image_mode="pad")
    white = Image.new("RGB", (240, 80), "white")
    assert tuple(int(mean * 255) for mean in processor.image_processor.image_mean) == (122, 116, 104)
    square = pad_to_square(white, (122, 116, 104))
    expected = processor.image_processor([square], return_tensors="pt")["pixel_values"]
    pixels = processor.pixel_values([white])
    assert torch.equal(pixels, expected)
    assert pixels[..., :6, :].abs().max() < 0.04  # above the picture
    assert pixels[..., 11:13, :].min() > 1.5


def test_a_rotated_photograph_is_turned_upright(processor: VLMProcessor, tmp_path: Path):
    """Cameras store how they were held (EXIF 6: turn by 90 degrees)."""
    upright = picture(0, (30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.size == (40, 30)
        assert torch.equal(processor.pixel_values([stored]), processor.pixel_values([upright]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_colour_mode_are_read(processor: VLMProcessor, mode: str):
    assert processor.pixel_values([picture().convert(mode)]).shape == (1, 3, 24, 24)


RAMP = np.linspace(0, 1, 64)[None].repeat(8, axis=0)


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The image, as it comes back from a file."""
    file = BytesIO()
    image.save(file, kind, **options)
    opened = Image.open(file)
    opened.load()
    return opened


DEEP: dict[str, Callable[[], Image.Image]] = {
    "floats to 1": lambda: saved(Image.fromarray(RAMP.astype("float32")), "TIFF"),
    "floats to 3000": lambda: Image.fromarray((RAMP * 3000).astype("float32")),
    "floats around 0": lambda: Image.fromarray((RAMP - 0.5).astype("float32")),
    "32 bits to 255": lambda: saved(Image.fromarray((RAMP * 255).astype("int32")), "TIFF"),
    "32 bits to 65535": lambda: Image.fromarray((RAMP * 65535).astype("int32")),
    "32 bits to a million": lambda: Image.fromarray((RAMP * 1e6).astype("int32")),
    "32 bits below zero": lambda: Image.fromarray((RAMP * 4000 - 1000).astype("int32")),
    "12 of 16 bits": lambda: saved(Image.fromarray((RAMP * 4095).astype("uint16")), "PNG"),
    "12 of 16 bits, TIFF": lambda: saved(Image.fromarray((RAMP * 4095).astype("uint16")), "TIFF"),
    "12 of 16 bits, PGM": lambda: saved(Image.fromarray((RAMP * 4095).astype("uint16")), "PPM"),
    "12 of 16 bits, big-endian": lambda: Image.frombytes("I;16B", (64, 8), (RAMP * 4095).astype(">u2").tobytes()),
    "16 bits": lambda: saved(Image.fromarray((RAMP * 65535).astype("uint16")), "PNG"),
    "12 bits, PGM": lambda: Image.open(BytesIO(b"P5 64 8 4095\n" + (RAMP * 4095).astype(">u2").tobytes())),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_levels_are_scaled_by_their_range(kind: str):
    """A ramp from black to white stays one, to a level."""
    grey = np.asarray(as_rgb(DEEP[kind]())).astype(int)
    assert np.abs(grey - np.rint(RAMP * 255)[..., None]).max() <= 1
    assert (grey.min(), grey.max()) == (0, 255)


def test_levels_below_the_range_stay_dark():
    """The scale is that of the bits, not of the lightest pixel: of one camera, a darker image is darker."""
    half = np.asarray(as_rgb(Image.fromarray((RAMP * 30_000).astype("uint16")))).max()
    assert half == round(30_000 / 65535 * 255)
    assert np.asarray(as_rgb(Image.fromarray((RAMP * 0.5).astype("float32")))).max() == 128
    assert np.asarray(as_rgb(Image.fromarray((RAMP * 100).astype("int32")))).max() == 100
    assert np.asarray(as_rgb(Image.fromarray(np.full((8, 8), 77, "int32")))).max() == 77


def test_what_is_no_number_is_black():
    levels = RAMP.astype("float32")
    levels[0, -1] = np.nan
    assert np.asarray(as_rgb(Image.fromarray(levels)))[0, -1].tolist() == [0, 0, 0]


def test_a_tiff_in_which_zero_is_white_is_seen_so():
    inverted = saved(Image.fromarray((RAMP * 65535).astype("uint16")), "TIFF", tiffinfo={262: 0})
    assert np.asarray(as_rgb(inverted))[0, 0].tolist() == [255, 255, 255]


def ink() -> Image.Image:
    """A black stroke on nothing, as formulas and logos are saved."""
    pixels = np.zeros((20, 30, 4), "uint8")
    pixels[5:10, 5:25, 3] = 255
    return Image.fromarray(pixels)


TRANSPARENT: dict[str, Callable[[], Image.Image]] = {
    "RGBA": lambda: saved(ink(), "PNG"),
    "WebP": lambda: saved(ink(), "WEBP", lossless=True),
    "LA": lambda: saved(ink().convert("LA"), "PNG"),
    "palette": lambda: saved(ink().quantize(4), "PNG"),
    "GIF": lambda: saved(ink(), "GIF"),
    "a grey level": lambda: saved(Image.fromarray(np.asarray(ink())[..., 3] // 255 * 9), "PNG", transparency=0),
    "a deep grey level": lambda: saved(
        Image.fromarray(np.asarray(ink())[..., 3].astype("uint16")), "PNG", transparency=0
    ),
    "a colour": lambda: saved(
        Image.fromarray(np.stack([np.asarray(ink())[..., 3] // 255 * 9] * 3, axis=-1)), "PNG", transparency=(0, 0, 0)
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_parts_show_the_background(kind: str):
    image = TRANSPARENT[kind]()
    corners = {name: np.asarray(as_rgb(image, name))[0, 0].tolist() for name in ("white", "black", "grey")}
    assert corners == {"white": [255] * 3, "black": [0] * 3, "grey": [128] * 3}
    assert np.asarray(as_rgb(image)).min() < 128 or "deep" in kind
    assert np.asarray(as_rgb(image, "drop"))[0, 0].tolist() == [0, 0, 0] or kind == "palette"


def test_half_transparent_parts_are_mixed_and_opaque_ones_stay():
    pixels = np.zeros((1, 2, 4), "uint8")
    pixels[0, :, 3] = (255, 51)
    assert np.asarray(as_rgb(Image.fromarray(pixels)))[0, :, 0].tolist() == [0, 204]
    opaque = picture().convert("RGBA")
    assert as_rgb(opaque).tobytes() == as_rgb(opaque, "drop").tobytes() == picture().tobytes()


def test_the_background_is_saved_and_reloaded(processor: VLMProcessor, tmp_path: Path):
    """Training, inference and serving see the same; a file that is given by its path too."""
    ink().save(tmp_path / "ink.png")
    with Image.open(tmp_path / "ink.png") as image:
        white = processor.pixel_values([image])
        assert torch.equal(processor(images=str(tmp_path / "ink.png"))["pixel_values"], white)
        other = copy.copy(processor)
        other.alpha_background = "black"
        other.save_pretrained(tmp_path)
        again = VLMProcessor.from_pretrained(tmp_path)
        assert again.alpha_background == "black"
        assert torch.equal(again.pixel_values([image]), other.pixel_values([image]))
        assert not torch.equal(again.pixel_values([image]), white)


def test_an_unknown_background_names_the_choices(processor: VLMProcessor):
    with pytest.raises(ValueError, match=r"dataset\.alpha_background=pink: allowed are white, black, grey, drop"):
        VLMProcessor(processor.image_processor, processor.tokenizer, alpha_background="pink")


# Calling it


def test_texts_are_padded_on_the_left_with_their_mask(processor: VLMProcessor):
    inputs = processor(text=["a cat", "<image> and <image>"], images=[picture(0), picture(1)])
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["pixel_values"].shape == (2, 3, 24, 24)
    for row, text in enumerate(["a cat", "<image> and <image>"]):
        mask = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][mask].tolist() == processor.tokenize(text)[0]
        assert mask.tolist() == sorted(mask.tolist())
    right = processor(text=["a cat", "<image>"], images=[picture()], padding_side="right")["attention_mask"][0].tolist()
    assert right == sorted(right, reverse=True)


def test_a_text_or_an_image_alone(processor: VLMProcessor):
    assert "pixel_values" not in processor(text="a cat")
    assert set(processor(images=picture())) == {"pixel_values"}


@pytest.mark.parametrize(("text", "images", "slots"), [("a cat", 1, 0), ("<image> <image>", 1, 2), (["<image>"], 0, 1)])
def test_texts_and_images_that_do_not_match_are_an_error(processor: VLMProcessor, text, images: int, slots: int):
    with pytest.raises(ValueError, match=f"{images} images given, but the text has {slots} <image>"):
        processor(text=text, images=[picture(n) for n in range(images)] or None)


def test_chat_template_to_model_inputs(processor: VLMProcessor, tmp_path: Path):
    """Messages as transformers' pipelines write them: text and images, an image as object, path, array or tensor."""
    picture(0).save(tmp_path / "a.png")
    messages = [[
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": seen}, {"type": "text", "text": "what is it?"}]},
    ] for seen in (picture(0), str(tmp_path / "a.png"), np.asarray(picture(0)), pil_to_tensor(picture(0)))]  # fmt: skip
    text = processor.apply_chat_template(messages[0], add_generation_prompt=True)
    assert text.endswith("user\n<image>\nwhat is it?<|im_end|>\n<|im_start|>assistant\n")
    for talk in messages:
        inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert inputs["input_ids"].tolist() == [processor.tokenize(text)[0]]
        assert torch.equal(inputs["pixel_values"], processor.pixel_values([picture(0)]))
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert batch["input_ids"].shape[0] == batch["pixel_values"].shape[0] == 4
    ids = processor.apply_chat_template(messages[0], tokenize=True)
    assert torch.equal(
        ids, processor(text=processor.apply_chat_template(messages[0]), images=[picture(0)])["input_ids"]
    )


@pytest.mark.parametrize("images", [0, 1, 2])
def test_an_image_token_that_a_text_item_spells_is_plain_text(processor: VLMProcessor, images: int):
    asked = "What does the tag <image> do, <image>?"
    shown = [{"type": "image", "image": picture(number)} for number in range(images)]
    talk = [{"role": "user", "content": [*shown, {"type": "text", "text": asked}]}]
    inputs = processor.apply_chat_template([talk, talk], tokenize=True, return_dict=True)
    for ids in inputs["input_ids"]:
        assert int((ids == processor.image_token_id).sum()) == images * processor.tokens_per_image
        assert asked in processor.tokenizer.decode(ids)
    rendered = processor.apply_chat_template(talk)
    assert asked in rendered
    start = rendered.index(asked)
    assert inputs["input_ids"][0].tolist() == processor.tokenize(rendered, [(start, start + len(asked))])[0]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("IT", "<image>\nwhat?"),
        ("IIT", "<image><image>\nwhat?"),
        ("TI", "what?<image>"),
        ("TIT", "what?<image>what?"),
        ("ITIT", "<image>\nwhat?<image>what?"),
        ("IN", "<image>\n what?"),
        ("T", "what?"),
        ("I", "<image>"),
    ],
)
def test_images_before_a_text_stand_on_a_line_of_their_own(processor: VLMProcessor, content: str, wanted: str):
    """As in the records that it was trained on; images between texts stay where they are."""
    items = {"I": {"type": "image"}, "T": {"type": "text", "text": "what?"}, "N": {"type": "text", "text": "\n what?"}}
    talk = [{"role": "user", "content": [items[letter] for letter in content]}]
    assert processor.apply_chat_template(talk) == processor.apply_chat_template([{"role": "user", "content": wanted}])


def test_images_of_a_conversation_in_order():
    talk = [
        {"role": "user", "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "image", "url": "d"}, {"type": "image", "image": "e"}]},
    ]
    assert images_in_conversation(talk) == ["a", "d", "e"]


def test_images_as_openai_has_them(processor: VLMProcessor, tmp_path: Path):
    """An address with the image in it, or a file's."""
    picture(0).save(tmp_path / "a.png")
    data = f"data:image/png;base64,{base64.b64encode((tmp_path / 'a.png').read_bytes()).decode()}"
    for address in ({"url": data}, data, {"url": str(tmp_path / "a.png")}):
        content = [{"type": "image_url", "image_url": address}, {"type": "text", "text": "what is it?"}]
        talk = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        assert inputs["input_ids"].tolist() == [processor.tokenize(text)[0]]
        assert torch.equal(inputs["pixel_values"], processor.pixel_values([picture(0)]))


def test_dates_and_thinking_are_the_same_every_day(parts: Parts):
    processor = parts.processor()
    dates = "{{ date_string }}|{{ strftime_now('%d %b %Y') }}"
    processor.chat_template = f"{dates}|{{{{ enable_thinking }}}}|{{{{ image_token }}}}"
    frozen = f"{FIXED_DATE}|{FIXED_DATE}"
    assert processor.apply_chat_template([{"role": "user", "content": "?"}]) == f"{frozen}|False|<image>"
    asked = processor.apply_chat_template([{"role": "user", "content": "?"}], enable_thinking=True)
    assert asked == f"{frozen}|True|<image>"
    processor.chat_template = "\n {{ strftime_now('%d') }} \n"  # nothing else of the template changes
    assert processor.apply_chat_template([{"role": "user", "content": "?"}]) == f"\n {FIXED_DATE} "


# What it is made of


def test_offsets_are_where_each_token_stands_in_the_text(processor: VLMProcessor):
    text = "one <image> twö </s> <image>three"
    ids, spans = processor.tokenize(text)
    assert len(ids) == len(spans)
    assert spans == sorted(spans)
    assert "".join(dict.fromkeys(text[a:b] for a, b in spans if text[a:b] == "<image>")) == "<image>"
    covered = {position for a, b in spans for position in range(a, b)}
    assert covered == set(range(len(text)))


@pytest.mark.parametrize("language_model", [*LANGUAGE_MODELS, "vicuna"])
def test_saved_and_reloaded_it_is_the_same(parts: Parts, language_model: str, tmp_path: Path):
    template = "v1" if language_model == "vicuna" else None
    processor = parts.processor(
        "clip", language_model, template=template, image_mode="pad", start="<im_start>", end="<im_end>"
    )
    processor.save_pretrained(tmp_path)
    text = "<image>\nUSER: a</s>b<|im_end|> 12 猫\n<image>"
    seen = [picture(0), picture(1, (30, 60))]
    for loaded in (VLMProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, VLMProcessor)
        assert isinstance(loaded.image_processor, CLIPImageProcessor)
        for name in ("image_token", "image_start", "image_end", "tokens_per_image", "image_mode", "chat_template"):
            assert getattr(loaded, name) == getattr(processor, name), name
        assert loaded.image_token_id == processor.image_token_id
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert loaded.tokenize(text) == processor.tokenize(text)
        assert loaded.tokenize(text, [(8, 40)]) == processor.tokenize(text, [(8, 40)])
        assert torch.equal(loaded.pixel_values(seen), processor.pixel_values(seen))


def test_an_unknown_image_mode_names_the_choices(processor: VLMProcessor):
    with pytest.raises(ValueError, match=r"dataset.image_mode=stretch: allowed are square, pad"):
        VLMProcessor(processor.image_processor, processor.tokenizer, image_mode="stretch")


def test_a_slow_tokenizer_is_refused(processor: VLMProcessor):
    with pytest.raises(ValueError, match="fast tokenizer"):
        VLMProcessor(processor.image_processor, None)


def test_tokens_that_the_tokenizer_knows_are_not_added_again(parts: Parts, tmp_path: Path):
    """A tokenizer that brings `<image>` keeps its id; one that does not gets the missing tokens alone."""
    folder = tmp_path / "language_model"
    shutil.copytree(parts.language_model("llama"), folder)
    tokenizer = byte_tokenizer("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<other>"]})
    tokenizer.save_pretrained(folder)
    recipe = parts.recipe(end="<|im_end|>", start="<im_start>")
    recipe.language_model.hf_name = str(folder)
    processor = compose(recipe, None, None)[1]
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert len(processor.tokenizer) == len(tokenizer) + 1
    assert {"<image>", "<other>", "<im_start>"} <= set(processor.tokenizer.all_special_tokens)
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


# The starts of words, as SentencePiece itself has them

CHUNKS = [
    "two cats",
    " two cats",
    "  two cats",
    "\n two",
    " \n",
    " ",
    "   ",
    "▁two",
    " 3",
    "3",
    " ▁ é",
    "\tcat",
    "cat ",
    " <",
    " 猫",
    "\u00a0cat",
    "\u3000cat",
    " two </s> cats </s>  on</s>a",
    "</s> mat",
    "</s>cat",
    " <unk> ",
]
"""Texts as they stand between two images; special tokens in them are a template's."""


def slow_ids(folder: Path, text: str, *, legacy: bool) -> list[int]:
    """The ids that `LlamaTokenizer` of SentencePiece gives a text, without BOS.

    `legacy: true`: the text behind each special token is encoded on its own, as SentencePiece does it. `legacy: false`:
    only what stands in front begins with a word start, and blanks are word starts wherever they are: texts are encoded
    behind `<unk>`, which is taken off.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = legacy
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    mark = "" if legacy else "<unk>"
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids: list[int] = []
    for number, part in enumerate(re.split(f"({'|'.join(special)})", text)):
        if part in special:
            ids.append(special[part])
        elif part:
            word_start = "" if legacy or number else "▁"
            ids += pieces.encode(mark + word_start + part.replace("▁", " "))[len(pieces.encode(mark)) :]
    return ids


@pytest.fixture(scope="module", params=[False, True], ids=["legacy false", "legacy true"])
def of_sentencepiece(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VLMProcessor, bool]:
    """A tokenizer's folder, its processor, and whether it is a legacy one."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece(folder)
    LlamaConfig(vocab_size=480).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "legacy": request.param}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return folder, VLMProcessor(CLIPImageProcessor(), tokenizer, tokens_per_image=2), request.param


@pytest.mark.parametrize("chunk", CHUNKS)
def test_text_around_images_has_the_slow_tokenizers_ids(of_sentencepiece: tuple[Path, VLMProcessor, bool], chunk: str):
    """In front, behind BOS, behind an image and between two; every id lies within the text that it comes from."""
    folder, processor, legacy = of_sentencepiece
    image = [processor.image_token_id] * 2
    expected = slow_ids(folder, chunk, legacy=legacy)
    for text, ids in (
        (chunk, expected),
        (f"<s>{chunk}", [1, *expected]),
        (f"<s><image>{chunk}<image>{chunk}", [1, *image, *expected, *image, *expected]),
    ):
        found, spans = processor.tokenize(text)
        assert found == ids, text
        assert all(0 <= a < b <= len(text) for a, b in spans)
        assert spans == sorted(spans)


def test_saving_keeps_the_ids(of_sentencepiece: tuple[Path, VLMProcessor, bool], tmp_path: Path):
    """`legacy` too, which transformers does not write into a tokenizer's files."""
    _, processor, _ = of_sentencepiece
    processor.save_pretrained(tmp_path)
    again = VLMProcessor.from_pretrained(tmp_path)
    again.tokenizer.save_pretrained(tmp_path / "tokenizer")
    alone = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for chunk in CHUNKS:
        text = f"<s>a<image>{chunk}</s>{chunk}"
        assert again.tokenize(text) == processor.tokenize(text)
        assert alone.tokenize(text) == processor.tokenizer.tokenize(text)


def test_a_blank_that_a_special_token_swallows_starts_no_word(of_sentencepiece: tuple[Path, VLMProcessor, bool]):
    tokenizer = AutoTokenizer.from_pretrained(of_sentencepiece[0])
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<sep>", rstrip=True, special=True)], special_tokens=True)
    swallowing = VLMProcessor(CLIPImageProcessor(), tokenizer)
    assert swallowing.tokenize("<sep>  cat")[0] == tokenizer("<sep>  cat", add_special_tokens=False)["input_ids"]


def test_where_words_start(parts: Parts):
    assert read_prepend_scheme(parts.processor("clip", "vicuna", template="v1").tokenizer) == "first"
    assert read_prepend_scheme(byte_tokenizer("chatml")) == "never"
