"""A tokenizer made on the spot, with the special tokens that a class of processors asks for."""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
TURN = "<|turn|>"
LITERALS = re.compile(r"<[\w|/\-]+>|<｜[^\"'{}<>]+｜>|\[[A-Z][A-Z0-9_]+\]|\|[A-Z]+\||\]<\][\w ]+\[>\[")
"""Special tokens, where they are between quotation marks in a class's source."""
DOCSTRINGS = re.compile(r'r?"""(.|\n)*?"""')
STRINGS = re.compile(r"""f?("[^"\n]*"|'[^'\n]*')""")
NAMED = re.compile(r"tokenizer\.([a-z_]+_token)(?:_id)?\b")
"""Special tokens that a class asks its tokenizer for by name."""
OPTIONAL = re.compile(r"""(?:has|get)attr\((?:self\.)?tokenizer, ["']([a-z_]+_token)""")
"""Special tokens that a class does without where its tokenizer has none."""
STANDARD = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
MAX_LENGTH = 100_000


@dataclass(frozen=True)
class FurtherTokens:
    """Special tokens in addition to those that a class of processors asks for.

    Attributes:
        names: their names, such as `image_token`.
        tokens: tokens without a name.
        named: names with their tokens, where those are not made of the name.
    """

    names: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()


def make_tokenizer(kind: type[ProcessorMixin], further: FurtherTokens) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with every special token that a class of processors asks for, and further ones."""
    literals, named = read_special_tokens(kind)
    names = (*named, *further.names)
    made = {name: f"<|{name.removesuffix('_token')}|>" for name in names}
    return build_tokenizer((*literals, *further.tokens), made | dict(further.named))


def find_special_tokens(text: str) -> list[str]:
    """Return what looks like special tokens in a text, each once."""
    return list(dict.fromkeys(LITERALS.findall(text)))


def read_special_tokens(kind: type) -> tuple[list[str], list[str]]:
    """Return the special tokens in the source of a class and its bases, and the names that it asks a tokenizer for."""
    modules = [base for base in kind.__mro__ if base.__module__.startswith("transformers.models.")]
    sources = [DOCSTRINGS.sub("", inspect.getsource(base)) for base in modules or [kind]]
    strings = [string for source in sources for string in STRINGS.findall(source)]
    tokens = dict.fromkeys(token for string in strings for token in LITERALS.findall(string))
    needless = {*STANDARD, *(name for source in sources for name in OPTIONAL.findall(source))}
    names = dict.fromkeys(name for source in sources for name in NAMED.findall(source))
    return list(tokens), [name for name in names if name not in needless and not name.startswith("add_")]


def build_tokenizer(tokens: Iterable[str], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges.

    Args:
        tokens: its special tokens, in addition to those for padding, for beginnings and for ends.
        named: special tokens that it knows by name: name -> token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = dict.fromkeys([PAD, BOS, END, TURN, *tokens, *named.values()])
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=END,
        pad_token=PAD,
        bos_token=BOS,
        extra_special_tokens=dict(named),
        model_max_length=MAX_LENGTH,
    )
