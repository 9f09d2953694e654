"""Messages of conversations as transformers' programs write them: their images, and image tokens that are only words.

Hub code: imports the standard library only.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

Message = dict[str, Any]
"""A message of a conversation, or an item of its content list."""

SPELLED = "\ufdd3"
"""A Unicode noncharacter that breaks up an image token which a text item spells, until its text is tokenised."""

FIXED_DATE = "26 Jul 2024"
"""The date for templates that would write today's (Llama-3.2), so that a prompt is the same every day."""
FIXED_CLOCK = f"{{% macro strftime_now(format) %}}{FIXED_DATE}{{% endmacro +%}}"
"""Put before templates that call `strftime_now`, since transformers gives them its own clock and accepts no other."""


class MediaMismatchError(ValueError):
    """A rendered text has more or fewer places for images and videos than there are, or has them in another order."""


def break_spelled(turn: Message, image_token: str) -> Message:
    """Return a turn in whose text items `SPELLED` breaks up the image token."""
    if isinstance(turn["content"], str):
        return turn
    broken = f"{image_token[0]}{SPELLED}{image_token[1:]}"
    items = [
        {**item, "text": item["text"].replace(image_token, broken)} if item["type"] == "text" else item
        for item in turn["content"]
    ]
    return {**turn, "content": items}


def join_spelled(text: str, image_token: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendered text without `SPELLED`, and the character spans of the tokens that it broke up."""
    pieces = text.split(SPELLED)
    starts = [end - 1 for end in accumulate(map(len, pieces[:-1]))]
    return "".join(pieces), [(start, start + len(image_token)) for start in starts]


def images_in_conversation(conversation: Sequence[Message]) -> list[object]:
    """Return the images (objects, paths, URLs) that a conversation's content lists name, in order.

    Items are `{"type": "image", "image": …}` (or `path`, `url`, `base64`), or OpenAI's `{"type": "image_url",
    "image_url": {"url": …}}`.
    """
    images = []
    items = [item for turn in conversation if not isinstance(turn["content"], str) for item in turn["content"]]
    for item in items:
        if item["type"] == "image_url":
            named = item["image_url"]
            images.append(named["url"] if isinstance(named, dict) else named)
        elif item["type"] == "image":
            images.append(next(item[key] for key in ("image", "path", "url", "base64") if key in item))
    return images


THINKING_SETTING = "enable_thinking"
"""The key of a tokenizer's settings that holds what `thinks` returns; it is saved in `tokenizer_config.json`."""


def knows_thinking(template: str | None) -> bool:
    """Return whether a chat template asks if the model is to think before its reply."""
    return THINKING_SETTING in (template or "")


class HasSettings(Protocol):
    """A tokenizer, as far as it has settings that are saved with it."""

    init_kwargs: dict[str, object]


def thinks(tokenizer: HasSettings, asked: bool | None = None) -> bool:
    """Return whether a model is to think before its reply: what is asked for, else as it was trained."""
    return bool(tokenizer.init_kwargs.get(THINKING_SETTING, False)) if asked is None else asked


def set_thinks(tokenizer: HasSettings, value: bool) -> None:
    """Set what `thinks` returns where nothing is asked for; it is saved with the tokenizer."""
    tokenizer.init_kwargs[THINKING_SETTING] = value


def flatten_content(content: str | list[Message], image_token: str) -> str:
    """Return a content list as one string, with an image token for each image.

    Images before the text stand on a line of their own, as in LLaVA's records.
    """
    if isinstance(content, str):
        return content
    text, before_text = "", True
    for item in content:
        if item["type"] == "text":
            text += "\n" if before_text and text and not item["text"].startswith("\n") else ""
            text += item["text"]
            before_text = False
        else:
            text += image_token
    return text
