"""Two processors, a student's and its teacher's: have tokens the same ids, and samples the same inputs?"""

import json
from collections.abc import Mapping

from vlm.data.encoding.labels import get_media_token_ids
from vlm.data.processor import Processor


def check_same_vocabulary(student: Processor, teacher: Processor, label: str) -> None:
    """Check that no id is a token of the student's and another one of the teacher's.

    Either may have further ids. The tokens that images and videos stand at may differ: no reply has them.

    Raises:
        ValueError: an id is another token, or a token has another id.
    """
    media = {*get_media_token_ids(student), *get_media_token_ids(teacher)}
    for processor in (student, teacher):
        media |= set(processor.image_token_ids())
    own, other = (processor.tokenizer.get_vocab() for processor in (student, teacher))
    tokens = {index: token for token, index in other.items()}
    different = [
        (index, token, tokens[index])
        for token, index in own.items()
        if index not in media and index in tokens and tokens[index] != token
    ]
    if not different:
        return
    index, token, teachers = min(different)
    raise ValueError(
        f"{label}: its vocabulary differs: id {index} is {teachers!r}, and {token!r} in the model that trains "
        f"({len(different):,} of {len(own):,} ids differ). Choose a teacher whose tokens have the same ids"
    )


UNREAD_SETTINGS = frozenset({"auto_map", "processor_class", "name_or_path"})
"""Settings of processors that no id and no pixel depends on."""

UNREAD_OF_TOKENIZERS = frozenset({"padding", "truncation"})
"""What a tokenizer's file says of batches that it makes, which nothing here lets it make."""


def have_same_inputs(processor: Processor, other: Processor) -> bool:
    """Return whether two processors make the same ids and pixels of every sample, as their settings say."""
    return type(processor) is type(other) and _describe(processor) == _describe(other)


def _describe(processor: Processor) -> str:
    """Return all that ids and pixels of a sample depend on, as text."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer = {name: value for name, value in tokenizer.items() if name not in UNREAD_OF_TOKENIZERS}
    images = processor.image_token_ids(), processor.image_token
    described = tokenizer, processor.chat_template, images, _without_unread(processor.to_dict())
    return json.dumps(described, sort_keys=True, default=str)


def _without_unread(settings: object) -> object:
    """Return settings without those that nothing depends on."""
    if isinstance(settings, Mapping):
        return {name: _without_unread(value) for name, value in settings.items() if name not in UNREAD_SETTINGS}
    return settings
