"""Ids and labels of `plain` and `v1` are LLaVA-1.5's, computed here a second time with sentencepiece itself."""

import json
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaConfig

from tests.tiny_parts import IGNORE_INDEX, Parts, picture, runs, save_sentencepiece
from vlm.data.encoding.labels import encode, encode_prompt
from vlm.data.records.conversations import read_llava
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.models import VLMProcessor

BOS, EOS = 1, 2
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

V1 = {
    "one turn": [("<image>\nwhat is in this picture?", "a red circle")],
    "several turns": [("<image>\nwhat is it?", "a cat"), ("where?", "on the mat"), ("how many?", "12 of them")],
    "text only": [("what is a cat?", "an animal"), ("and a mat?", "no animal")],
    "a digit, which stands alone behind its word start": [("<image>\nhow many?", "3"), ("and?", "1 red, 2 blue")],
    "characters that fall to bytes": [("<image>\nwas ist das?", "猫 und é 😀"), ("\n", "\n猫\n")],
    "blanks at the ends": [("<image>\n what? ", "  a cat  "), (" so ", " yes")],
    "an empty answer": [("<image>\nwhat?", ""), ("and now?", "a cat")],
    "two images in a turn": [("<image>\n<image>\nwhat differs?", "the circle"), ("so?", "yes")],
    "an image in a later turn": [("hello", "what is it?"), ("<image>\nthis", "a mat")],
    "blanks behind images": [("<image> and <image>  differ? <image>", " yes"), ("<image> so? <image>\n so", "3")],
    "words that roles use": [("USER: a ASSISTANT: b", "USER: c ASSISTANT: d")],
}

PLAIN = [
    " a red circle",
    "  two cats ",
    " 3",
    " ",
    "▁a cat",
    "\n a",
    "a red circle",
    "12 cats on 3 mats",
    "猫 😀",
    "a cat \n on the mat",
    "",
    "a cat\n",
]


class Reference:
    """LLaVA's text, tokenised by sentencepiece as `LlamaTokenizer(legacy=False)` does it."""

    def __init__(self, folder: Path, image: list[int]):
        model = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        model.normalizer_spec.add_dummy_prefix = False  # word starts are written out below
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.image = image

    def v1(self, turns: list[tuple[str, str]], system: str = SYSTEM) -> tuple[list[int], list[int]]:
        """`{system} USER: {question} ASSISTANT: {answer}</s>USER: …`: all that follows `ASSISTANT:` is learnt."""
        ids, labels = [BOS], [IGNORE_INDEX]
        word_start, text = "▁", f"{system} "
        for question, answer in turns:
            *before, last = f"{text}USER: {question} ASSISTANT:".split("<image>")
            for chunk in before:
                new = [*(self.pieces.encode(word_start + chunk) if chunk else []), *self.image]
                ids, labels, word_start = ids + new, labels + [IGNORE_INDEX] * len(new), "▁"
            asked = self.pieces.encode(word_start + last)
            whole = self.pieces.encode(f"{word_start}{last} {answer}")
            assert whole[: len(asked)] == asked
            ids += [*whole, EOS]
            labels += [IGNORE_INDEX] * len(asked) + [*whole[len(asked) :], EOS]
            word_start, text = "", ""  # no word start behind </s>
        return ids, labels

    def plain(self, caption: str) -> tuple[list[int], list[int]]:
        """`<s><image>{caption}\\n`: caption and line break are learnt."""
        said = self.pieces.encode(f"▁{caption}\n")
        return [BOS, *self.image, *said], [IGNORE_INDEX] * (1 + len(self.image)) + said


def sample(turns: list[tuple[str, str]], system: str | None = None) -> Sample:
    """Questions with `<image>` and answers as a `Sample`."""
    made = [Turn("system", (system,))] if system else []
    for question, answer in turns:
        texts = question.split("<image>")
        content = [texts[0], *(part for text in texts[1:] for part in (ImageRef(Path("x.png")), text))]
        made += [Turn("user", tuple(part for part in content if part != "")), Turn("assistant", (answer,))]
    return Sample("x", tuple(made))


@pytest.fixture(scope="module", params=[False, True], ids=["fresh", "reloaded"])
def processors(request, parts: Parts, tmp_path_factory) -> dict[str, VLMProcessor]:
    """Processors of both templates on Vicuna's kind of folder; as composed, and out of a checkpoint."""
    made = {name: parts.processor("clip", "vicuna", template=name) for name in ("v1", "plain")}
    if request.param:
        folder = tmp_path_factory.mktemp("processors")
        for name, processor in made.items():
            processor.save_pretrained(folder / name)
        made = {name: VLMProcessor.from_pretrained(folder / name) for name in made}
    return made


@pytest.fixture(scope="module")
def reference(parts: Parts, processors: dict[str, VLMProcessor]) -> Reference:
    return Reference(parts.language_model("vicuna"), [processors["v1"].image_token_id] * 9)


@pytest.mark.parametrize("name", V1)
def test_v1_is_llavas(processors: dict[str, VLMProcessor], reference: Reference, name: str):
    encoded = encode(processors["v1"], sample(V1[name]))
    ids, labels = reference.v1(V1[name])
    assert encoded.input_ids == ids
    assert encoded.labels == labels


def test_v1_takes_a_system_text_of_the_record(processors: dict[str, VLMProcessor], reference: Reference):
    turns = V1["several turns"]
    encoded = encode(processors["v1"], sample(turns, system="Answer in one word."))
    assert (encoded.input_ids, encoded.labels) == reference.v1(turns, system="Answer in one word.")


@pytest.mark.parametrize("asked", ["what is it?\n<image>", "<image>\nwhat is it?", "<image> what is it?"])
def test_a_records_lone_image_stands_at_the_start_of_its_turn(
    processors: dict[str, VLMProcessor], reference: Reference, tmp_path: Path, asked: str
):
    """Out of LLaVA's own form of a record."""
    picture().save(tmp_path / "a.png")
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "a cat"}]
    encoded = encode(processors["v1"], read_llava({"image": "a.png", "conversations": turns}, tmp_path))
    assert (encoded.input_ids, encoded.labels) == reference.v1([("<image>\nwhat is it?", "a cat")])


@pytest.mark.parametrize("caption", PLAIN)
def test_plain_is_llavas(processors: dict[str, VLMProcessor], reference: Reference, caption: str):
    encoded = encode(processors["plain"], sample([("<image>\nDescribe the picture.", caption)]))
    assert (encoded.input_ids, encoded.labels) == reference.plain(caption)


@pytest.mark.parametrize("name", V1)
def test_v1_prompt_is_where_training_begins_to_learn(processors: dict[str, VLMProcessor], name: str):
    """What a model is asked at inference is what stood before the first supervised token."""
    whole = sample(V1[name])
    encoded = encode(processors["v1"], whole)
    first = next(index for index, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encode_prompt(processors["v1"], whole.turns[:1]) == encoded.input_ids[:first]


@pytest.mark.parametrize("said", ["a</s>b", "</s>", "is <s> or </s>?", "<image>", " <unk>\n</s></s> "])
def test_spelled_special_tokens_are_text_and_nothing_is_added_to_them(processors: dict[str, VLMProcessor], said: str):
    """LLaVA itself reads a `</s>` that somebody wrote as the end of a turn; ours never does."""
    processor = processors["v1"]
    encoded = encode(processor, sample([("<image>\nwhat?", said), ("so?", "yes")]))
    assert encoded.input_ids.count(EOS) == 2
    assert encoded.input_ids.count(processor.image_token_id) == 9
    first, last = runs(encoded.labels)
    assert processor.tokenizer.decode(first) == f"{said}</s>"
    assert processor.tokenizer.decode(last) == "yes</s>"


def test_image_tokens_and_padding_stand_behind_the_vocabulary(processors: dict[str, VLMProcessor]):
    """The image token is new; padding is `<unk>`, id 0."""
    tokenizer = processors["v1"].tokenizer
    assert processors["v1"].image_token_id == tokenizer.vocab_size == 480
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)


def test_a_folder_with_only_a_sentencepiece_model_loads(tmp_path: Path):
    """`tokenizer.model` beside `config.json`; with `tokenizer_config.json` word starts are marked."""
    save_sentencepiece(tmp_path)
    LlamaConfig(vocab_size=480).save_pretrained(tmp_path)
    settings = (tmp_path / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.is_fast, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (True, 480, BOS, EOS)
    assert tokenizer.tokenize("a cat")[0] == "▁a"
    assert json.loads(settings)["tokenizer_class"] == type(tokenizer).__name__
    (tmp_path / "tokenizer_config.json").unlink()
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 480
