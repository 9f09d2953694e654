"""The table of conventions, and the convention of each model type."""

import re
from collections.abc import Iterator
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from vlm.config.named import import_named, is_custom_name, is_permitted
from vlm.data.coordinates.convention import Convention
from vlm.data.coordinates.json_forms import Gemini, Glm, Qwen3VL, Qwen25VL
from vlm.data.coordinates.text_forms import Llava, Molmo, Molmo2, Pixels
from vlm.data.coordinates.token_forms import DeepSeekVL2, Florence2, InternVL, PaliGemma, Qwen2VL
from vlm.data.processor import Processor

AUTO = "auto"
KEY = "dataset.coordinates"
CONVENTIONS: dict[str, type[Convention]] = {
    kind.name: kind
    for kind in (
        Llava, Pixels, Qwen2VL, Qwen25VL, Qwen3VL, PaliGemma, InternVL, Gemini, Glm, Molmo, Molmo2, Florence2,
        DeepSeekVL2,
    )
}  # fmt: skip
DEFAULT = Llava.name
"""The convention of composed models, and of model types that are not in `BY_MODEL_TYPE`."""
BY_MODEL_TYPE = {
    "qwen2_vl": Qwen2VL.name,
    "qwen2_5_vl": Qwen25VL.name,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), Qwen3VL.name),
    **dict.fromkeys(("paligemma", "colpali"), PaliGemma.name),
    **dict.fromkeys(("internvl", "internvl_chat"), InternVL.name),
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4"), Gemini.name),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), Glm.name),
    "florence2": Florence2.name,
    "molmo": Molmo.name,
    "molmo2": Molmo2.name,
    **dict.fromkeys(("deepseek_vl_v2", "deepseek_ocr2"), DeepSeekVL2.name),
}
"""`model_type` of `config.json` -> the convention with which models of this type were trained."""


def get_convention(name: str) -> Convention:
    """Return a convention of the table, or the user's own, `package.module:Class`.

    Raises:
        ValueError: there is no convention of this name, or the user's own class is not one.
    """
    return _make_convention(name, CONVENTIONS[name] if name in CONVENTIONS else _import_convention(name))


@lru_cache(64)
def _make_convention(name: str, kind: type[Convention]) -> Convention:
    return kind()


def _import_convention(name: str) -> type[Convention]:
    if not is_custom_name(name):
        allowed = ", ".join((AUTO, *CONVENTIONS))
        raise ValueError(f"{KEY}={name}: allowed are {allowed}, or package.module:Class for your own")
    kind = import_named(name, KEY)
    if not (isinstance(kind, type) and issubclass(kind, Convention)):
        raise ValueError(f"{KEY}={name}: it is not a subclass of vlm.data.coordinates.convention.Convention")
    return kind


def use_convention(processor: Processor, requested: str, model_type: str) -> None:
    """Make a processor write and read places by a convention, and store its name in the processor's settings.

    Args:
        processor: the model's.
        requested: the name of a convention; `auto`: the checkpoint's, else that of the model type.
        model_type: the type in the model's configuration.

    Raises:
        ValueError: there is no such convention, or the tokenizer lacks tokens of the requested one.
    """
    name = processor.coordinates or BY_MODEL_TYPE.get(model_type, DEFAULT)
    if requested != AUTO:
        name = requested
        if problem := find_token_problem(get_convention(name), processor.tokenizer):
            raise ValueError(problem)
    processor.use_coordinates(name, token_pattern(name))


def token_pattern(name: str | None) -> re.Pattern[str] | None:
    """Return the pattern of a convention's tokens; None for one without tokens, and for a class that the user did not
    name: it then came with a checkpoint, and importing it would run code.
    """
    if name is None or (name not in CONVENTIONS and not is_permitted(name)):
        return None
    return get_convention(name).token_pattern


def find_token_problem(convention: Convention, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return which token of a convention is missing in a tokenizer, and what to do, or None."""
    if (missing := next(_missing_tokens(convention, tokenizer), None)) is None:
        return None
    return (
        f"{KEY}={convention.name}: the tokenizer does not have {missing} as one token. Choose another convention "
        f"({', '.join(CONVENTIONS)}), or add its tokens with model.language_model.new_tokens"
    )


def _missing_tokens(convention: Convention, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for token in convention.required_tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        if number in (None, tokenizer.unk_token_id) or number not in tokenizer.encode(token, add_special_tokens=False):
            yield token
