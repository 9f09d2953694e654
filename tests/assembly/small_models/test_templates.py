"""The chat template of a processor that brings none: what stands in it for an image and for a video."""

from transformers import ProcessorMixin
from transformers.models.qwen2_vl import Qwen2VLProcessor

from tests.families.tiny_families import llava, qwen
from vlm.assembly.small_models.make import make_small
from vlm.assembly.small_models.templates import begins_text, find_video_text, make_template


def render(processor: ProcessorMixin) -> str:
    """A question about an image and a video, by the processor's template."""
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "why?"}]
    return processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=make_template(processor), tokenize=False
    )


def test_media_stand_where_a_conversation_has_them():
    processor = qwen(Qwen2VLProcessor)
    assert f"{processor.image_token}{processor.video_token}why?" in render(processor)
    assert f"{llava().image_token}why?" in render(llava())


def test_the_token_that_begins_a_text_is_left_to_a_processor_that_always_writes_it():
    assert not begins_text(llava())
    assert make_template(llava()).startswith("{{ bos_token }}")
    emu3 = make_small("emu3").processor
    assert begins_text(emu3)
    assert "bos_token" not in str(emu3.chat_template)


def test_a_video_stands_between_the_tokens_by_which_its_processor_knows_it():
    processor = qwen(Qwen2VLProcessor)
    assert find_video_text(processor) == processor.video_token
    for name, token in (("video_start_id", "<|vision_start|>"), ("video_end_id", "<|vision_end|>")):
        setattr(processor, name, processor.tokenizer.convert_tokens_to_ids(token))
    assert find_video_text(processor) == f"<|vision_start|>{processor.video_token}<|vision_end|>"
    assert find_video_text(llava()) == ""
