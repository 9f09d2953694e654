"""`make_small`: a small model of any type with its processor, made on the spot without the network."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from vlm.assembly.small_models.defaults import UNSUPPORTED, make_default
from vlm.assembly.small_models.fields import get_fields, is_int, walk
from vlm.assembly.small_models.image_codes import list_code_tokens
from vlm.assembly.small_models.processors import make_processor
from vlm.assembly.small_models.shrink import shrink
from vlm.assembly.small_models.templates import WRITTEN_OUT, expand, find_image_text, make_template
from vlm.assembly.small_models.tokenizers import FurtherTokens, find_special_tokens
from vlm.families.table import get_family

ID_ENDINGS = ("_token_id", "_token_index")
STANDARD = ("bos", "eos", "pad")
VIDEO = "video"
"""The token without whose id a model passes over videos: some classes leave that to their checkpoints."""
VOCABULARIES = ("vocab_size", "unpadded_vocab_size")
VOCABULARY_MAP = "vocabulary_map"
"""Token -> id, by which a model finds the codes of images."""
MIN_VOCABULARY = 1000
"""Smaller vocabularies are none of words."""


@dataclass(frozen=True)
class SmallModel:
    """A small model's configuration, and its processor."""

    config: PreTrainedConfig
    processor: ProcessorMixin


def make_small(model_type: str) -> SmallModel:
    """Return a small model of a type: a configuration from the type's class, and a processor of its classes.

    Raises:
        ValueError: the type's model does not build from its configuration class, or it has no processor.
    """
    if model_type in UNSUPPORTED:
        raise ValueError(f"model_type={model_type}: no small model is made of it: {UNSUPPORTED[model_type]}")
    config = shrink(make_default(model_type))
    codes = list_code_tokens(config)
    processor = make_processor(config, codes)
    missing = [name for name in read_token_names(config) if find_token_id(processor, name) is None]
    template = processor.chat_template or WRITTEN_OUT.get(type(processor).__name__, "")
    written = find_special_tokens(str(template))  # a few classes bring a template of their own
    if missing or written:
        codes = codes or FurtherTokens()
        names, tokens = tuple(f"{name}_token" for name in missing), (*codes.tokens, *written)
        processor = make_processor(config, replace(codes, names=names, tokens=tokens))
    fit_vocabulary(config, processor)
    if not (processor.chat_template or get_family(model_type).template):
        processor.chat_template = make_template(processor)
    return SmallModel(config, processor)


def read_token_names(config: PreTrainedConfig) -> Iterator[str]:
    """Yield the names of the tokens whose ids a configuration has, such as `image` for `image_token_id`."""
    for part in walk(config):
        for name in get_fields(part):
            for ending in ID_ENDINGS:
                if name.endswith(ending):
                    yield name.removesuffix(ending)


def fit_vocabulary(config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Set, in place, a configuration's token ids and its size of the vocabulary to those of a processor."""
    image_id = find_feature_id(processor)
    for part in walk(config):
        for name, value in get_fields(part).items():
            ending = next((ending for ending in ID_ENDINGS if name.endswith(ending)), "")
            token = name.removesuffix(ending) if ending else ""
            if token == "image" or name == "image_patch_id":
                setattr(part, name, image_id)
            elif ending and (value is not None or token in (*STANDARD, VIDEO)):
                setattr(part, name, find_token_id(processor, token))
            elif name == VOCABULARY_MAP:
                setattr(part, name, processor.tokenizer.get_vocab())
            elif name in VOCABULARIES and is_int(value) and value > MIN_VOCABULARY:
                setattr(part, name, len(processor.tokenizer))


def find_feature_id(processor: ProcessorMixin) -> int:
    """Return the id at whose positions features are placed: the most frequent one of an image."""
    text = find_image_text(processor)
    counts = Counter(expand(processor, text, Image.new("RGB", (224, 224))))
    own = find_token_id(processor, "image")
    return max(counts, key=lambda token_id: (counts[token_id], token_id == own))


def find_token_id(processor: ProcessorMixin, name: str) -> int | None:
    """Return the id of a token by its name: as the processor has it, else as its tokenizer has it; None without any."""
    for owner in (processor, processor.tokenizer):
        for attribute in (f"{name}_token_id", f"{name}_id"):
            if is_int(found := getattr(owner, attribute, None)):
                return found
        token = getattr(owner, f"{name}_token", None)
        if token is not None and is_int(found := processor.tokenizer.convert_tokens_to_ids(str(token))):
            return found
    return None
