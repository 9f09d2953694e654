"""Tokenizers in llama.cpp's form: pieces with their types, merges or scores, special tokens, the chat template.

llama.cpp has two kinds that matter here: byte-level BPE (`gpt2`), which cuts texts by a pattern that it knows by a
name, and SentencePiece's BPE with byte fallback (`llama`).
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NotRequired, TypedDict, cast

import gguf
from gguf import TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers

from vlm.data.encoding.labels import reply_ending
from vlm.models import VLMProcessor
from vlm.models.processing_messages import thinks

Step = dict[str, Any]
"""One step of a normaliser or pre-tokenizer, or a sequence of steps, as `tokenizers` writes it."""


class AddedTokenSettings(TypedDict):
    """A token beside those of the model."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool


class ModelSettings(TypedDict):
    """The BPE model of a tokenizer."""

    type: str
    vocab: dict[str, int]
    merges: list[str] | list[list[str]]
    byte_fallback: bool
    unk_token: NotRequired[str | None]
    ignore_merges: NotRequired[bool]


class Settings(TypedDict):
    """What is read of a tokenizer's own JSON."""

    normalizer: Step | None
    pre_tokenizer: Step | None
    model: ModelSettings
    added_tokens: list[AddedTokenSettings]


WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%DIGITS%| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How the tokenizers of Llama 3 and Qwen2 cut a text; they differ in how many digits stay together."""

PATTERN_NAMES = {
    ("bytes", False): "gpt-2",
    ("digits", "bytes", False): "smollm",
    (WORD_PATTERN.replace("%DIGITS%", ""), "bytes", False): "qwen2",
    (WORD_PATTERN.replace("%DIGITS%", "{1,3}"), "bytes", True): "llama-bpe",
    (WORD_PATTERN.replace("%DIGITS%", "{1,3}"), "bytes", False): "dbrx",
}
"""The steps of a pre-tokenizer, and whether whole words are looked up before merging -> llama.cpp's name for them."""

TEMPLATE_HEADER = """\
{#- vlm: contents as strings, the images of a turn on a line before its text. -#}
{%- set enable_thinking = %THINKS% -%}
{%- set strings = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set turn = namespace(text='', lead=true) -%}
  {%- if message['content'] is string -%}
    {%- for piece in message['content'].split('__>') -%}
      {%- if turn.lead and piece.startswith('<__media') and not loop.last -%}
        {%- set turn.text = turn.text + piece + '__>' -%}
      {%- else -%}
        {%- if turn.lead and turn.text and piece and not piece.startswith('\\n') -%}
          {%- set turn.text = turn.text + '\\n' -%}
        {%- endif -%}
        {%- set turn.lead = false -%}
        {%- set turn.text = turn.text + piece + ('' if loop.last else '__>') -%}
      {%- endif -%}
    {%- endfor -%}
  {%- else -%}
    {%- for item in message['content'] -%}
      {%- if item['type'] == 'text' -%}
        {%- if turn.lead and turn.text and not item['text'].startswith('\\n') -%}
          {%- set turn.text = turn.text + '\\n' -%}
        {%- endif -%}
        {%- set turn.lead = false -%}
      {%- endif -%}
      {%- set turn.text = turn.text + item['text'] -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set strings.messages = strings.messages + [{'role': message['role'], 'content': turn.text}] -%}
{%- endfor -%}
{%- set messages = strings.messages -%}
"""
"""The beginning of an exported template, before ours; llama.cpp writes a mark for an image, and no line break."""

TEXTS = (
    "What is this?",
    " two  blanks and\n\nnew lines\t",
    "It's 1234567 o'clock, isn't it? (3.14)",
    "naïve café 你好 🙂",
    "  ",
    "I'LL SEE x=y_z;",
    "a\r\nb",
)
"""Texts that the exported tokenizer is asked."""


def find_incompatibilities(processor: VLMProcessor) -> Iterator[str]:
    """Yield why llama.cpp cannot tokenise as the processor does."""
    settings = _read_settings(processor)
    model = settings["model"]
    if model["type"] != "BPE":
        yield f"a tokenizer of type {model['type']}: possible are byte-level BPE and BPE with byte fallback"
    elif is_byte_level(settings):
        if (normalizer := settings["normalizer"]) not in (None, {"type": "NFC"}):
            yield f"a tokenizer that normalises texts by {normalizer['type']}: llama.cpp does not"
        steps = describe_steps(settings)
        if steps not in PATTERN_NAMES:
            yield f"a tokenizer that cuts texts in a way that llama.cpp has no name for: {_shorten(repr(steps))}"
    elif not model["byte_fallback"]:
        yield "a BPE tokenizer that is neither byte-level nor has byte fallback: llama.cpp has no such one"
    elif not _is_sentencepiece(settings):
        yield "a BPE tokenizer with byte fallback that is not SentencePiece's: its blanks are not written as ▁"
    if processor.chat_template is None:
        yield "no chat template: llama.cpp would choose one"


def find_differences(processor: VLMProcessor) -> Iterator[str]:
    """Yield where llama.cpp's ids differ from the processor's although the pieces are the same."""
    settings = _read_settings(processor)
    if settings["normalizer"] == {"type": "NFC"}:
        yield "texts that are not in Unicode's composed form (NFC) become other tokens: llama.cpp does not compose them"
    stripping = [token["content"] for token in settings["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripping:
        yield f"blanks beside {', '.join(stripping[:3])} are kept: llama.cpp does not take them into the token"
    if not is_byte_level(settings) and processor.prepend_scheme == "first":
        yield (
            "texts directly behind a special token become other tokens: llama.cpp begins a word there, this tokenizer "
            "does not"
        )


def add_tokenizer(writer: gguf.GGUFWriter, processor: VLMProcessor, num_rows: int) -> None:
    """Write the vocabulary, one piece for each row of the embeddings, and what belongs to it."""
    tokenizer = processor.tokenizer
    settings = _read_settings(processor)
    pieces, types = _list_pieces(settings, num_rows)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    if is_byte_level(settings):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PATTERN_NAMES[describe_steps(settings)])
        writer.add_token_merges([" ".join(merge) for merge in read_merges(settings)])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_score_pieces(settings, pieces))
        writer.add_add_space_prefix(begins_words(processor, settings))
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if (ending := _ending_token(processor)) is not None:
        writer.add_eot_token_id(ending)
    writer.add_add_bos_token(False)  # the template writes it where there is one
    writer.add_add_eos_token(False)
    header = TEMPLATE_HEADER.replace("%THINKS%", str(thinks(tokenizer)).lower())
    writer.add_chat_template(header + str(processor.chat_template))


def _ending_token(processor: VLMProcessor) -> int | None:
    """Return the token that the template writes behind a reply; None where it writes another text."""
    token = processor.tokenizer.convert_tokens_to_ids(reply_ending(processor).strip())
    return token if isinstance(token, int) and token != processor.tokenizer.unk_token_id else None


def _read_settings(processor: VLMProcessor) -> Settings:
    return cast(Settings, json.loads(processor.tokenizer.backend_tokenizer.to_str()))


def is_byte_level(settings: Settings) -> bool:
    """Return whether pieces are made of bytes, each written as a letter."""
    return any(step["type"] == "ByteLevel" for step in _steps(settings["pre_tokenizer"]))


def _is_sentencepiece(settings: Settings) -> bool:
    steps = [*_steps(settings["pre_tokenizer"]), *_steps(settings["normalizer"])]
    kinds = {step["type"] for step in steps}
    return kinds <= {"Metaspace", "Prepend", "Replace", "Split"} and bool(kinds & {"Metaspace", "Replace"})


def begins_words(processor: VLMProcessor, settings: Settings) -> bool:
    """Return whether a SentencePiece tokenizer puts the start of a word before a text."""
    prepends = any(step["type"] == "Prepend" for step in _steps(settings["normalizer"]))
    return prepends or processor.prepend_scheme != "never"


def _steps(part: Step | None) -> list[Step]:
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def describe_steps(settings: Settings) -> tuple[object, ...]:
    """Return how a byte-level tokenizer cuts texts, as a key of `PATTERN_NAMES`."""
    words: list[object] = []
    for step in _steps(settings["pre_tokenizer"]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(cuts)}:
                words.append("bytes")
                if cuts == any(isinstance(word, str) and word.startswith("(") for word in words):
                    words.append("cut twice or never")
            case {"type": "Digits", "individual_digits": True}:
                words.append("digits")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                words.append(pattern)
            case _:
                words.append(json.dumps(step))
    return (*words, bool(settings["model"].get("ignore_merges")))


def read_merges(settings: Settings) -> list[tuple[str, str]]:
    """Return the pairs of pieces that are merged, the first ones first."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in settings["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _list_pieces(settings: Settings, num_rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and the type of each row; rows without a token are unused."""
    pieces = [f"[PAD{number}]" for number in range(num_rows)]
    types = [TokenType.UNUSED] * num_rows
    unknown, bytes_apart = settings["model"].get("unk_token"), settings["model"]["byte_fallback"]
    for piece, number in settings["model"]["vocab"].items():
        pieces[number] = piece
        is_byte = bytes_apart and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        types[number] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in settings["added_tokens"]:
        pieces[token["id"]] = token["content"]
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        types[token["id"]] = TokenType.UNKNOWN if token["content"] in (unknown, "<unk>") else kind
    return pieces, types


def _score_pieces(settings: Settings, pieces: list[str]) -> list[float]:
    """Return what llama.cpp merges by: the piece with the highest score first, as the first merge."""
    merges = read_merges(settings)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(piece, len(merges))) for piece in pieces]


def rebuild_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Return the byte-level tokenizer that a GGUF file describes, by what llama.cpp's names stand for."""
    from tokenizers import AddedToken, decoders, models

    pieces: list[str] = _contents(reader, gguf.Keys.Tokenizer.LIST)
    types: list[int] = _contents(reader, gguf.Keys.Tokenizer.TOKEN_TYPE)
    merges = [tuple(merge.split(" ")) for merge in _contents(reader, gguf.Keys.Tokenizer.MERGES)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    pattern = _contents(reader, gguf.Keys.Tokenizer.PRE)
    *steps, whole_words = next(steps for steps, name in PATTERN_NAMES.items() if name == pattern)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(whole_words)))
    parts: list[pre_tokenizers.PreTokenizer] = []
    for step in steps:
        if step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step == "bytes":
            has_pattern = any(step not in ("digits", "bytes") for step in steps)
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not has_pattern))
        else:
            parts.append(pre_tokenizers.Split(Regex(str(step)), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    special = [piece for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    defined = [piece for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    return tokenizer


def merge_by_score(reader: gguf.GGUFReader, text: str) -> list[int]:
    """Return the ids that llama.cpp's `llama` tokenizer gives for a text without special tokens."""
    pieces: list[str] = _contents(reader, gguf.Keys.Tokenizer.LIST)
    scores: list[float] = _contents(reader, gguf.Keys.Tokenizer.SCORES)
    numbers = {piece: number for number, piece in enumerate(pieces)}
    lead = " " if _contents(reader, gguf.Keys.Tokenizer.ADD_PREFIX) else ""
    symbols = list((lead + text).replace(" ", "▁"))
    while True:
        pairs = [
            (scores[numbers[left + right]], -place)
            for place, (left, right) in enumerate(pairwise(symbols))
            if left + right in numbers
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    spelled = [[symbol] if symbol in numbers else [f"<0x{byte:02X}>" for byte in symbol.encode()] for symbol in symbols]
    return [numbers[piece] for word in spelled for piece in word]


def _contents(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None
    return field.contents()


def _shorten(text: str) -> str:
    return text if len(text) < 120 else f"{text[:117]}..."
