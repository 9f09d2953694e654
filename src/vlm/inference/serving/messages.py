"""Messages of a request as the turns that training, `vlm generate` and the page have: the same prompt everywhere."""

from collections.abc import Callable, Sequence

from vlm.data.sample import ContentPart, ImageRef, ToolCallTurn, Turn
from vlm.data.vision.images import Medium
from vlm.inference.serving.chat_request import AssistantMessage, ImagePart, Message, RefusalPart, TextPart, ToolCall

ROLES = {"developer": "system"}
"""Role of a message -> that of its turn, where it is another one."""

ReadImage = Callable[[str, str], Medium]
"""Returns the image of an address; takes the address and its place in the request."""


def read_messages(
    messages: Sequence[Message], read_image: ReadImage, param: str = "messages"
) -> tuple[list[Turn], list[Medium]]:
    """Return a conversation as turns, and its decoded images in order.

    Raises:
        RequestError: an image is refused.
    """
    turns: list[Turn] = []
    images: list[Medium] = []
    for number, message in enumerate(messages):
        content: list[ContentPart] = []
        parts = [message.content] if isinstance(message.content, str) else message.content or []
        for place, part in enumerate(parts):
            if isinstance(part, ImagePart):
                where = f"{param}[{number}].content[{place}].image_url.url"
                images.append(read_image(part.image_url.url, where))
                content.append(ImageRef())
            else:
                content.append(_follow_image(content, read_text(part)))
        if isinstance(message, AssistantMessage):
            content += [message.refusal] if message.refusal is not None and message.content is None else []
            if message.tool_calls:
                turns.append(ToolCallTurn("assistant", tuple(content), tool_calls=_dump_calls(message.tool_calls)))
                continue
        turns.append(Turn(ROLES.get(message.role, message.role), tuple(content)))
    return turns, images


def read_text(part: str | TextPart | RefusalPart) -> str:
    """Return the text of a content part."""
    if isinstance(part, str):
        return part
    return part.text if isinstance(part, TextPart) else part.refusal


def _follow_image(content: Sequence[ContentPart], text: str) -> str:
    """Return a text of a message; the first one behind images begins on a line of its own, as in `vlm generate`."""
    follows_image = bool(content) and not any(isinstance(part, str) for part in content)
    return f"\n{text}" if follows_image and not text.startswith("\n") else text


def _dump_calls(calls: Sequence[ToolCall]) -> tuple[dict[str, object], ...]:
    """Return calls as chat templates read them, their arguments as a mapping where they are JSON of one."""
    from vlm.inference.serving.tools import read_arguments

    return tuple(
        {
            "id": call.id,
            "type": call.type,
            "function": {"name": call.function.name, "arguments": read_arguments(call.function.arguments)},
        }
        for call in calls
    )
