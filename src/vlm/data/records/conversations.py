"""Conversations in LLaVA's form and as chat messages: the readers of both, and what other readers use of them.

Imports siblings that need the standard library only.
"""

from dataclasses import replace
from pathlib import Path

from vlm.data.records.answers import read_references
from vlm.data.records.extracted_frames import RATE_KEYS, TIME_KEYS
from vlm.data.records.fields import (
    add_system_turn,
    check_question_first,
    is_empty,
    read_group,
    read_id,
    read_supervision,
    read_turn_list,
)
from vlm.data.records.keys import reads
from vlm.data.records.marks import join_texts, move_image_first
from vlm.data.records.media import FILE_KEYS, ITEM_KINDS, MediaPlacer
from vlm.data.records.objects import read_objects
from vlm.data.records.text import text_from_value
from vlm.data.records.tool_turns import (
    CALL_ROLES,
    LLAVA_ROLES,
    MESSAGE_ROLES,
    SPEAKERS,
    TOOL_KEYS,
    TOOL_TURN_KEYS,
    is_call,
    join_calls,
    make_turn,
    read_tools,
    with_call_text,
)
from vlm.data.sample import ROLES, BadSample, ContentPart, Record, Sample, Turn

PLAIN_TURN = frozenset(("from", "value"))
"""The keys of a turn that is a speaker's text and nothing else."""


@reads("objects", *TOOL_KEYS, turns="conversations", turn=("from", "value", *TOOL_TURN_KEYS))
def read_llava(record: Record, image_folder: Path, *, key: str = "conversations") -> Sample:
    """Read LLaVA's form: `{"id", "image": path or list or absent, "conversations": [{"from", "value"}, …]}`.

    `<image>` in the human's texts stands for the images in order (see `marks`). The only one of a turn is moved to its
    start. A number instead of a text is read as it is written. A turn with `weight` 0 or `loss` false is not learned.
    ShareGPT's turns from `function_call` and `observation` are calls of `tools` and their results, see `tool_turns`.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        key: the key of the turns.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    return parse_llava(record, image_folder, key)


def parse_llava(record: Record, image_folder: Path, key: str = "conversations") -> Sample:
    """Parse a record of LLaVA's form as `read_llava` does, without a look at its other keys."""
    sample_id = read_id(record)
    conversation = read_turn_list(record, key, sample_id, "turn")
    media = MediaPlacer(record, image_folder, sample_id)
    roles, texts = [], []
    for number, turn in enumerate(conversation, start=1):
        given = turn if isinstance(turn, dict) else {}
        text = given.get("value")
        if not isinstance(text, str):
            text = "" if text is None and is_call(given, None) else text_from_value(text)
        if text is None or not isinstance(given.get("from"), str):
            raise BadSample(sample_id, f"turn {number}: `from` and `value` must be strings")
        if given["from"] not in LLAVA_ROLES:
            raise BadSample(sample_id, f"turn {number}: from={given['from']!r}; allowed are {', '.join(LLAVA_ROLES)}")
        roles.append(LLAVA_ROLES[given["from"]])
        texts.append(text)
    shows = [role == "user" or (role == "tool" and media.has_media) for role in roles]
    shown = media.split([text for text, is_shown in zip(texts, shows, strict=True) if is_shown])
    pieces = iter(shown)
    turns = []
    for number, (turn, role, text, is_shown) in enumerate(zip(conversation, roles, texts, shows, strict=True), start=1):
        content = (text,)
        if is_shown and (own := next(pieces)) != [text]:  # as most texts are
            content = media.fill(move_image_first(own) if role == "user" else own) or ("",) * (role == "tool")
        if turn.keys() == PLAIN_TURN and turn["from"] in SPEAKERS:
            turns.append(Turn(role, content))
            continue
        where = f"turn {number}"
        turn = with_call_text(turn, turn["from"], text, where, sample_id)
        content = () if turn["from"] in CALL_ROLES else content
        learned = read_supervision(turn, role, where, sample_id)
        turns.append(make_turn(role, content, learned, turn, where, sample_id))
    turns = join_calls(turns)
    check_question_first(turns, sample_id)
    return with_tools(make_sample(record, turns, media), record)


ITEM_KEYS = ("type", "text", "index", "source", *FILE_KEYS, *ITEM_KINDS, *RATE_KEYS, *TIME_KEYS)
"""Keys of an item of a message's content."""


@reads("objects", *TOOL_KEYS, turns="messages", turn=("role", "content", *TOOL_TURN_KEYS), item=ITEM_KEYS)
def read_messages(record: Record, image_folder: Path, *, key: str = "messages") -> Sample:
    """Read chat messages: `{"messages": [{"role", "content"}, …], "images": […]}`, in their order.

    `content` is a string, in which `<image>` stands for the images of `images` in order (see `marks`), or a list of
    `{"type": "text", "text"}`, whose text has no marks, `{"type": "image"}` (naming its image as `image`, `path`, `url`
    or Anthropic's `source`, or with the `index` of one of `images`, else the next of these),
    `{"type": "image_url", "image_url": {"url"}}` and `{"type": "video"}`. A message with `weight` 0 or `loss` false is
    not learned. `tools`, `tool_calls`, messages of the role `tool` and `reasoning_content`: see `tool_turns`.

    Args:
        record: the record.
        image_folder: what paths are relative to.
        key: the key of the messages.

    Raises:
        BadSample: the record has another form, or an image cannot be used.
    """
    return parse_messages_with_tools(record, image_folder, key)


def parse_messages_with_tools(record: Record, image_folder: Path, key: str = "messages") -> Sample:
    """Parse chat messages as `read_messages` does, without a look at the record's other keys."""
    return with_tools(parse_messages(record, image_folder, key), record)


def parse_messages(record: Record, image_folder: Path, key: str = "messages") -> Sample:
    """Parse chat messages, without the tools that they may call."""
    sample_id = read_id(record)
    messages = read_turn_list(record, key, sample_id, "message")
    media = MediaPlacer(record, image_folder, sample_id)
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else message
        if not isinstance(role, str) or role not in MESSAGE_ROLES:
            raise BadSample(sample_id, f"message {number}: role={role!r:.40}; allowed are {', '.join(ROLES)}")
    messages = [{**message, "content": _as_text(message.get("content"))} for message in messages]
    asked = [message["content"] for message in messages if _has_marks(message, media)]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    items = [item for content in contents for item in content if isinstance(item, dict)]
    pieces = iter(media.split(asked, items))
    turns = []
    for number, message in enumerate(messages, start=1):
        given, where = message["role"], f"message {number}"
        role, content = MESSAGE_ROLES[given], message.get("content")
        message = with_call_text(message, given, content, where, sample_id)
        if given in CALL_ROLES:
            parts = ()
        elif _has_marks(message, media):
            parts = media.fill(next(pieces)) or ("",) * (role == "tool")
        else:
            content = "" if content is None and is_call(message, given) else content
            parts = _parse_message_content(content, role, media, where)
        learned = read_supervision(message, role, where, sample_id)
        turns.append(make_turn(role, parts, learned, message, where, sample_id))
    turns = join_calls(turns)
    check_question_first(turns, sample_id)
    return make_sample(record, turns, media)


def make_sample(record: Record, turns: list[Turn], media: MediaPlacer) -> Sample:
    """Make a sample from its turns and the other keys of its record; all images and objects must be placed."""
    media.check_all_placed(turns)
    turns, objects = read_objects(record, turns, media.sample_id)
    turns = add_system_turn(record, turns, media.sample_id)
    references = read_references(record, media.sample_id)
    return Sample(media.sample_id, tuple(turns), record.get("label"), read_group(record), references, objects=objects)


def with_tools(sample: Sample, record: Record) -> Sample:
    """Return a sample with the tools of its record."""
    tools = read_tools(record, sample.id)
    return replace(sample, tools=tools) if tools else sample


def _as_text(content: object) -> object:
    """Return a number as its text, any other content unchanged."""
    text = text_from_value(content)
    return content if text is None else text


def _has_marks(message: Record, media: MediaPlacer) -> bool:
    """Return whether a message may have marks: a user's text, or a result of a record with images or videos."""
    role = MESSAGE_ROLES[message["role"]]
    return (role == "user" or (role == "tool" and media.has_media)) and isinstance(message.get("content"), str)


def _parse_message_content(content: object, role: str, media: MediaPlacer, where: str) -> tuple[ContentPart, ...]:
    """Parse the content of a message, whose adjoining texts are joined."""
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise BadSample(media.sample_id, f"{where}: `content` must be a string or a list of items")
    parts: list[ContentPart] = []
    for item in content:
        text = text_from_value(item.get("text")) if item.get("type") == "text" else None
        is_text = text is not None
        part = text if is_text else media.read_item(item)
        if part is None:
            allowed = "text (with a string), image, image_url, video and video_url"
            raise BadSample(media.sample_id, f"{where}: type={item.get('type')!r}; allowed are {allowed}")
        others = (*FILE_KEYS, "source", *ITEM_KINDS) if is_text else ("text",)
        if unread := [key for key in others if not is_empty(item.get(key))]:
            problem = f"an item of type {item['type']} has `{unread[0]}` too; make it an item of its own"
            raise BadSample(media.sample_id, f"{where}: {problem}")
        if not isinstance(part, str) and role not in ("user", "tool"):
            raise BadSample(media.sample_id, f"{where}: only the user and tools show images, here it is the {role}")
        parts.append(part)
    joined = tuple(join_texts(parts))
    return joined if role == "user" else joined or ("",)
