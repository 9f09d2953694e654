"""A chat template for a processor that brings none."""

from collections.abc import Callable, Mapping
from typing import cast

from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlm.assembly.small_models.tokenizers import END, TURN

TEMPLATE = (
    "{{ bos_token }}{%% for message in messages %%}%(turn)s{{ message['role'] }}\n"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for item in message['content'] %%}{%% if item['type'] == 'image' %%}%(image)s"
    "{%% elif item['type'] == 'video' %%}%(video)s{%% else %%}{{ item['text'] }}{%% endif %%}{%% endfor %%}"
    "{%% endif %%}"
    "%(end)s\n{%% endfor %%}{%% if add_generation_prompt %%}%(turn)sassistant\n{%% endif %%}"
)


def make_template(processor: ProcessorMixin) -> str:
    """Return a template with the processor's tokens for images and videos where the conversation has them."""
    return TEMPLATE % {
        "turn": TURN,
        "end": END,
        "image": find_image_text(processor),
        "video": getattr(processor, "video_token", None) or "",
    }


def expand(processor: ProcessorMixin, text: str, image: Image.Image) -> list[int]:
    """Return the ids of a text with an image."""
    call = cast(Callable[..., Mapping[str, Tensor]], processor)
    return call(text=[text], images=[image], return_tensors="pt")["input_ids"][0].tolist()


def find_image_text(processor: ProcessorMixin) -> str:
    """Return what stands for an image in a text that a processor takes.

    Raises:
        ValueError: it takes none of those that are tried.
    """
    image = Image.new("RGB", (64, 64))
    token = str(getattr(processor, "image_token", ""))
    placeholder = getattr(processor, "image_placeholder_token", token)
    wrapped = f"{getattr(processor, 'image_start_token', '')}{token}{getattr(processor, 'image_end_token', '')}"
    for text in dict.fromkeys((token, placeholder, wrapped)):
        try:
            expand(processor, text, image)
        except ValueError:
            continue
        return text
    raise ValueError(f"{type(processor).__name__} takes none of {token}, {placeholder}, {wrapped} for an image")
