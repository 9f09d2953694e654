"""A chat template for a processor that brings none."""

from collections.abc import Callable, Mapping
from typing import cast

from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlm.assembly.small_models.tokenizers import END, TURN

TEMPLATE = (
    "%(begin)s{%% for message in messages %%}%(turn)s{{ message['role'] }}\n"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for item in message['content'] %%}{%% if item['type'] == 'image' %%}%(image)s"
    "{%% elif item['type'] == 'video' %%}%(video)s{%% else %%}{{ item['text'] }}{%% endif %%}{%% endfor %%}"
    "{%% endif %%}"
    "%(end)s\n{%% endfor %%}{%% if add_generation_prompt %%}%(turn)sassistant\n{%% endif %%}"
)


WRITTEN_OUT = {"PPChart2TableProcessor": f"<img>{'<imgpad>' * 256}</img>"}
"""A class of processors that leaves all tokens of an image to its checkpoint's template -> what that writes."""


def make_template(processor: ProcessorMixin) -> str:
    """Return a template with the processor's tokens for images and videos where the conversation has them."""
    return TEMPLATE % {
        "begin": "" if begins_text(processor) else "{{ bos_token }}",
        "turn": TURN,
        "end": END,
        "image": find_image_text(processor),
        "video": find_video_text(processor),
    }


def expand(processor: ProcessorMixin, text: str, image: Image.Image) -> list[int]:
    """Return the ids of a text with an image."""
    call = cast(Callable[..., Mapping[str, Tensor]], processor)
    return call(text=[text], images=[image], return_tensors="pt")["input_ids"][0].tolist()


def begins_text(processor: ProcessorMixin) -> bool:
    """Return whether a processor writes the token that begins a text even where the text has it and none is asked."""
    if (bos := processor.tokenizer.bos_token) is None:
        return False
    call = cast(Callable[..., Mapping[str, Tensor]], processor)
    try:
        ids = call(text=[f"{bos}words"], return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    except Exception:  # a processor that takes no text without an image
        return False
    return int((ids == processor.tokenizer.bos_token_id).sum()) > 1


def find_image_text(processor: ProcessorMixin) -> str:
    """Return what stands for an image in a text that a processor takes.

    Raises:
        ValueError: it takes none of those that are tried.
    """
    if (written := WRITTEN_OUT.get(type(processor).__name__)) is not None:
        return written
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


def find_video_text(processor: ProcessorMixin) -> str:
    """Return what stands for a video in a text: its token, between those that begin and end one where there are any."""
    token: str | None = getattr(processor, "video_token", None)
    if token is None:
        return ""
    ends = [_find_end_of_video(processor, name) for name in ("video_start", "video_end")]
    return f"{ends[0]}{token}{ends[1]}" if all(ends) else token


def _find_end_of_video(processor: ProcessorMixin, name: str) -> str | None:
    """Return the token of a processor by whose id it knows the beginning or end of a video; None if it has none."""
    token_id: int | None = getattr(processor, f"{name}_id", None)
    return None if token_id is None else str(processor.tokenizer.convert_ids_to_tokens(token_id))
