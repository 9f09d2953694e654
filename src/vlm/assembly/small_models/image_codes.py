"""Vocabularies that hold the codes of images: types whose visual encoder makes ids of them (Chameleon, Emu3).

The names of the codes are those that the type's own class reads them by.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from vlm.assembly.small_models.tokenizers import FurtherTokens

NUM_CODES = 64
"""Codes of images in a small model."""
IMAGE = "<image>"
"""The token whose id such a class looks up for images."""


@dataclass(frozen=True)
class CodeNames:
    """How the codes of images are in a vocabulary.

    Attributes:
        name: the name of a code, by its number.
        named: special tokens that the tokenizer knows by name: name -> token.
        tokens: further tokens that the class looks up.
    """

    name: Callable[[int], str]
    named: tuple[tuple[str, str], ...] = ()
    tokens: tuple[str, ...] = ()


def _spell(number: int) -> str:
    """Return the name of one of Chameleon's codes, whose digits are letters from A on."""
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(number))}Z"


CODE_NAMES = {
    "chameleon": CodeNames(_spell, tokens=(IMAGE,)),
    "emu3": CodeNames("<|visual token {:06d}|>".format, (("image_token", IMAGE),), ("<|extra_200|>",)),
}
"""A type -> how codes of images are in its vocabulary."""


def list_code_tokens(config: PreTrainedConfig) -> FurtherTokens | None:
    """Return the tokens that a type's vocabulary has for images; None: images are no codes."""
    names = CODE_NAMES.get(config.model_type)
    if names is None:
        return None
    codes = [names.name(number) for number in range(NUM_CODES)]
    return FurtherTokens(tokens=(*names.tokens, *codes), named=names.named)
