"""`plain` and `v1` give the ids and labels that LLaVA-1.5 was trained with, by a reference written from its definition.

The reference knows nothing of ours: it calls SentencePiece itself, piece by piece.
"""

import json
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from vlm.data.encoding.labels import encode, read_template
from vlm.data.records.conversations import read_llava
from vlm.models import VLMProcessor

BOS, EOS, IMAGE, IGNORE_INDEX = 1, 2, -1, -100
TOKENS_PER_IMAGE = 4
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
TALK = "a chat between a user and an assistant what is in the picture two cats on a red sofa yes they are sleeping "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama tokenizer as Vicuna ships it: nothing but `tokenizer.model`, trained here."""
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "corpus.txt").write_text("\n".join([TALK, SYSTEM, TALK.title(), "USER: ASSISTANT: \n"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1,
        split_digits=True, add_dummy_prefix=True, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def processor(folder: Path, template: str) -> VLMProcessor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.unk_token
    return VLMProcessor(
        CLIPImageProcessor(), tokenizer, chat_template=read_template(template), tokens_per_image=TOKENS_PER_IMAGE
    )


def sample(tmp_path: Path, *turns: str, images: int = 1):
    """A record of human and gpt turns, read as training reads it."""
    names = [f"{number}.png" for number in range(images)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return read_llava({"id": "1", "image": names, "conversations": conversations}, tmp_path)


def reference(pieces: sentencepiece.SentencePieceProcessor, segments: list[tuple[str, bool]]):
    """Ids and labels of `(text, supervised)` segments.

    LLaVA tokenises the text between two images at a stretch, so neighbouring segments are joined; a token is
    supervised where its text reaches into a supervised segment. `</s>` is a token of its own, and what follows it
    begins without a word-start mark (`legacy: false`); what follows an image begins with one.
    """
    text = "".join(part for part, _ in segments)
    marks = [supervised for part, supervised in segments for _ in part]
    ids, labels = [BOS], [IGNORE_INDEX]
    position = 0
    for number, stretch in enumerate(text.split("<image>")):
        if number:
            ids += [IMAGE] * TOKENS_PER_IMAGE
            labels += [IGNORE_INDEX] * TOKENS_PER_IMAGE
            position += len("<image>")
        for index, run in enumerate(stretch.split("</s>")):
            if index:
                ids.append(EOS)
                labels.append(EOS if marks[position] else IGNORE_INDEX)
                position += len("</s>")
            for token, start, end in tokens(pieces, run, word_start=index == 0):
                ids.append(token)
                labels.append(token if any(marks[position + start : position + end]) else IGNORE_INDEX)
            position += len(run)
    return ids, labels


def tokens(pieces: sentencepiece.SentencePieceProcessor, run: str, *, word_start: bool):
    """(id, start, end) of a run of text; without a word start it is encoded behind a token, which is taken off."""
    if not run:
        return
    lead = "" if word_start else "<unk>"
    found = list(pieces.encode(lead + run, return_type="proto").pieces)
    for piece in found[len(pieces.encode(lead)) if lead else 0 :]:
        start, end = (len((lead + run).encode()[:at].decode(errors="ignore")) for at in (piece.begin, piece.end))
        yield piece.id, max(start - len(lead), 0), max(end, start + 1) - len(lead)


def ours(folder: Path, template: str, record):
    made = processor(folder, template)
    encoded = encode(made, record)
    return [IMAGE if token == made.image_token_id else token for token in encoded.input_ids], encoded.labels


def test_a_folder_of_a_tokenizer_model_alone_loads_as_sentencepiece_reads_it(folder: Path, pieces):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    for text in (SYSTEM, TALK, "Two cats\non a sofa.", "naïve 数 🙂"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_plain(folder: Path, pieces, tmp_path: Path):
    record = sample(tmp_path, "Describe it.\n<image>", "two cats on a sofa")
    expected = reference(pieces, [("<image>", False), ("two cats on a sofa\n", True)])
    assert ours(folder, "plain", record) == expected


@pytest.mark.parametrize(
    "answers",
    [["two cats"], ["two cats", "yes"], ["Yes.", "on a red\nsofa", "naïve 数 🙂"]],
    ids=["one turn", "two turns", "awkward"],
)
def test_v1(folder: Path, pieces, tmp_path: Path, answers: list[str]):
    questions = ["<image>\nwhat is in the picture?", "are they sleeping?", "where?"][: len(answers)]
    record = sample(tmp_path, *[text for pair in zip(questions, answers, strict=True) for text in pair])
    segments = [(f"{SYSTEM} ", False)]
    for question, answer in zip(questions, answers, strict=True):
        segments += [(f"USER: {question} ASSISTANT:", False), (f" {answer}</s>", True)]
    assert ours(folder, "v1", record) == reference(pieces, segments)


def test_v1_moves_a_lone_image_to_the_start_of_its_turn(folder: Path, pieces, tmp_path: Path):
    record = sample(tmp_path, "what is in the picture?\n<image>", "two cats")
    segments = [(f"{SYSTEM} USER: <image>\nwhat is in the picture? ASSISTANT:", False), (" two cats</s>", True)]
    assert ours(folder, "v1", record) == reference(pieces, segments)


def test_v1_without_an_image(folder: Path, pieces, tmp_path: Path):
    record = sample(tmp_path, "what is red?", "a sofa", images=0)
    segments = [(f"{SYSTEM} USER: what is red? ASSISTANT:", False), (" a sofa</s>", True)]
    assert ours(folder, "v1", record) == reference(pieces, segments)


def test_where_ours_differs_a_spelled_special_token_stays_text(folder: Path, tmp_path: Path):
    """LLaVA itself reads a `</s>` that somebody wrote as the end of a turn; ours never does."""
    made = processor(folder, "v1")
    record = sample(tmp_path, "<image>\nwhat does </s> mean?", "the end </s> of a turn")
    encoded = encode(made, record)
    assert encoded.input_ids.count(EOS) == 1
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert made.tokenizer.decode(supervised[:-1]).replace(" ", "") == "theend</s>ofaturn"
