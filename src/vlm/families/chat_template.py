"""Chat templates of families: the one that came with a processor, and how a conversation is rendered with it."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from transformers import ProcessorMixin

from vlm.data.processor import Tools
from vlm.families.table import Family
from vlm.models.processing_messages import FIXED_CLOCK, FIXED_DATE, HasSettings, Message, thinks
from vlm.models.text_processing import bounded_template


class TemplateTokenizer(HasSettings, Protocol):
    """A tokenizer, as far as it renders chat templates."""

    def apply_chat_template(self, conversation: list[Message], **options: object) -> str:
        """Return a conversation as text, where `tokenize` is false."""
        ...


class FamilyTemplate:
    """The own chat template of a family, which another one may take the place of.

    Args:
        tokenizer: the tokenizer of the family's processor, which renders templates.
        family: its row of the table.
        own: the template that came with the processor, or the family's; None: there is none.
        image_token: the token of an image.
        video_token: the token of a video; None: there are no videos.
    """

    def __init__(
        self,
        tokenizer: TemplateTokenizer,
        family: Family,
        own: str | None,
        image_token: str,
        video_token: str | None,
    ):
        self.tokenizer = tokenizer
        self.family = family
        self.own = own
        self.image_token = image_token
        self.kinds = {image_token: "image"} | ({} if video_token is None else {video_token: "video"})

    def render(
        self,
        conversation: Sequence[Message],
        template: str,
        *,
        add_generation_prompt: bool,
        tools: Tools | None,
        enable_thinking: bool | None,
    ) -> str:
        """Return a conversation as text, with a token for each image and video.

        Contents may be strings with such tokens; the family's own template gets them as lists of text, images and
        videos.
        """
        messages = [dict(turn) for turn in conversation]
        if template == self.own:
            with_items = [{**turn, "content": self._to_items(turn["content"])} for turn in conversation]
            kinds = (item["type"] for turn in with_items for item in turn["content"])
            if self.family.video_template and "video" in kinds:
                template = self.family.video_template
            if self.takes_lists:
                messages = with_items
        if "strftime_now" in template:
            template = FIXED_CLOCK + template
        return render_template(
            self.tokenizer,
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            enable_thinking=enable_thinking,
        )

    @cached_property
    def takes_lists(self) -> bool:
        """Whether the own template takes lists of text and images; a few take strings with image tokens."""
        question = [{"type": "image"}, {"type": "text", "text": "a question"}]
        try:
            rendered = render_template(self.tokenizer, str(self.own), [{"role": "user", "content": question}])
        except Exception:  # a template may do anything with a list that it does not expect
            return False
        return self.image_token in rendered and "'type'" not in rendered

    def _to_items(self, content: str | list[Message]) -> list[Message]:
        if not isinstance(content, str):
            return content
        pieces = re.split(f"({'|'.join(map(re.escape, self.kinds))})", content)
        return [
            {"type": self.kinds[piece]} if piece in self.kinds else {"type": "text", "text": piece}
            for piece in pieces
            if piece
        ]


def render_template(
    tokenizer: TemplateTokenizer,
    template: str,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
) -> str:
    """Return messages as text, with the same date every day; a template that loops is ended."""
    with bounded_template():
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            date_string=FIXED_DATE,
            enable_thinking=thinks(tokenizer, enable_thinking),
        )


def get_own_template(native: ProcessorMixin) -> str | None:
    """Return the chat template that came with a processor or its tokenizer; of several, the default one."""
    for owner in (native, native.tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None
