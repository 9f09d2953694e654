"""A request for a chat completion, checked field by field: what is malformed is refused with its place, status 400."""

import base64
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import HTTPException
from PIL import Image

from vlm.data.sample import BadSample, ContentPart, ImageRef, Turn
from vlm.data.vision.images import open_image

Message = dict[str, Any]
"""A JSON object of a request, before its form is checked."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role of a message -> that of its turn; `developer` is what newer clients call the system."""
NEUTRAL_VALUES = (None, 1, 0, False, [], {}, "", "none", "auto", {"type": "text"})
"""Values that leave an unsupported field unused: one answer, no tools, no log probabilities …"""
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "function_call", "audio")
"""Keys of a message that would change its meaning; others, such as `name` and `refusal`, do not."""
LEAST_TEMPERATURE = 1e-3
"""Lower temperatures but 0 would divide logits to infinity."""


def is_number(value: object, least: float, most: float, kinds: tuple[type, ...] = (int, float)) -> bool:
    """Return whether a value is a number of these types in a range; `true` and `false` are none."""
    return isinstance(value, int | float) and type(value) in kinds and least <= value <= most


def is_neutral(value: object) -> bool:
    """Return whether a value leaves an unsupported field unused; `true`, which equals 1, does not."""
    return value is not True and value in NEUTRAL_VALUES


def is_temperature(value: object) -> bool:
    """Return whether a value is 0, for greedy answers, or a temperature."""
    return is_number(value, 0, 0) or is_number(value, LEAST_TEMPERATURE, 2)


def is_stop(value: object) -> bool:
    """Return whether a value is a text that ends an answer, or a list of such texts; half a surrogate pair is none."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text.encode(errors="ignore").decode() == text != "" for text in texts)


FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a text is needed"),
    "temperature": (is_temperature, f"a number from 0 to 2 is needed, 0 or from {LEAST_TEMPERATURE} on"),
    "top_p": (lambda value: is_number(value, 0, 1), "a number from 0 to 1 is needed"),
    "frequency_penalty": (lambda value: is_number(value, -0.9, 2), "a number from -0.9 to 2 is needed"),
    "max_tokens": (lambda value: is_number(value, 1, 2**20, (int,)), "a whole number from 1 to 1048576 is needed"),
    "max_completion_tokens": (
        lambda value: is_number(value, 1, 2**20, (int,)),
        "a whole number from 1 to 1048576 is needed",
    ),
    "seed": (lambda value: is_number(value, -(2**63), 2**63 - 1, (int,)), "a whole number of 64 bits is needed"),
    "stream": (lambda value: isinstance(value, bool), "true or false is needed"),
    "stop": (is_stop, "a text or a list of texts is needed, none of them empty"),
}
"""Field of a request -> whether a value that is not null is allowed, and what is."""


def check_fields(body: Message, unsupported: set[str]) -> None:
    """Refuse values that are not allowed, and fields that would be ignored; neutral ones of these are taken out.

    Args:
        body: the request; `messages` are checked by `parse_messages`.
        unsupported: names of fields that are not served.

    Raises:
        HTTPException: a field is refused; tells which.
    """
    used = [name for name in sorted(unsupported & {*body}) if not is_neutral(body[name])]
    if used:
        fields = ", ".join(f"{name}={body[name]!r:.40}" for name in used)
        raise HTTPException(400, f"not served here: {fields}")
    for name in unsupported & {*body}:
        del body[name]
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise HTTPException(400, "messages: a list of at least one message is needed")
    for name, (is_allowed, needed) in FIELDS.items():
        value = body.get(name)
        if value is not None and not is_allowed(value):
            raise HTTPException(400, f"{name}={value!r:.60}: {needed}")


def parse_messages(messages: Sequence[object]) -> tuple[list[Turn], list[Image.Image]]:
    """Return a request's messages as a conversation, and its opened images.

    Raises:
        HTTPException: a message is malformed, or an image is a web address or does not open.
    """
    turns: list[Turn] = []
    images: list[Image.Image] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise HTTPException(400, f"{where}: a message with role and content is needed, got {message!r:.60}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise HTTPException(400, f"{where}: role must be one of {', '.join(ROLES)}, got {role!r:.40}")
        for key in UNSUPPORTED_MESSAGE_KEYS:
            if not is_neutral(message.get(key)):
                raise HTTPException(400, f"{where}.{key}: not served here")
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list) or not items:
            raise HTTPException(400, f"{where}: content must be a text, or a list of texts and images")
        turns.append(Turn(ROLES[role], _parse_items(items, images, f"{where}.content")))
    return turns, images


def _parse_items(items: Sequence[object], images: list[Image.Image], where: str) -> tuple[ContentPart, ...]:
    """Return the items of a message as parts of a turn; its images are opened and added to `images`."""
    parts: list[ContentPart] = []
    for place, item in enumerate(items):
        kind = item.get("type") if isinstance(item, dict) else None
        if not isinstance(item, dict) or kind not in ("text", "image_url"):
            raise HTTPException(400, f"{where}[{place}]: type must be text or image_url, got {kind!r:.40}")
        value = item.get(kind)
        if kind == "image_url":
            images.append(_decode_image(value, f"{where}[{place}]"))
            parts.append(ImageRef())
            continue
        if not isinstance(value, str):
            raise HTTPException(400, f"{where}[{place}]: text must be a text, got {value!r:.40}")
        follows_image = bool(parts) and not any(isinstance(part, str) for part in parts)
        needs_line = follows_image and not value.startswith("\n")  # as in `vlm generate`
        parts.append(f"\n{value}" if needs_line else value)
    return tuple(parts)


def _decode_image(item: object, where: str) -> Image.Image:
    """Return the image of a `data:` address; `where` is its place in the request."""
    address = item.get("url") if isinstance(item, dict) else item
    head, comma, content = address.partition(",") if isinstance(address, str) else ("", "", "")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        hint = "the image itself is needed, as data:image/png;base64,…; addresses are not fetched"
        raise HTTPException(400, f"{where}.image_url.url: {hint}, got {address!r:.40}")
    try:
        return open_image(ImageRef(content=base64.b64decode(content, validate=True)), where)
    except BadSample as error:
        raise HTTPException(400, f"{where}: {error.reason}") from error
    except ValueError as error:  # binascii.Error is one; letters beyond ASCII raise a plain one
        raise HTTPException(400, f"{where}: its base64 does not decode: {error}") from error
