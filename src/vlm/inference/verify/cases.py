"""The questions that are asked of both engines."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlm.data.sample import Turn

Message = dict[str, Any]
"""A message as transformers' processors and OpenAI's interface take it: a role, and a list of images and texts."""


@dataclass(frozen=True)
class Case:
    """A conversation that waits for a reply.

    Attributes:
        name: a name, the only one of a request.
        turns: the conversation, as training reads it.
        images: its images, in the order of the text.
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]

    @property
    def messages(self) -> list[Message]:
        """The conversation as a plain client writes it: `{"type": "image"}` and `{"type": "text", "text": …}`.

        Images of all messages together are `images`, in order.
        """
        raise NotImplementedError
