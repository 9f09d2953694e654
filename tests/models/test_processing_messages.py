"""What messages show, tokens that are only words, and whether a model thinks: saved with its tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer

from tests.tool_templates import QWEN3, make_processor
from vlm.models.processing_messages import break_spelled, images_in_conversation, join_spelled, set_thinks, thinks


def test_images_are_found_in_order():
    items = [
        {"type": "image", "path": "a"},
        {"type": "text", "text": "b"},
        {"type": "image_url", "image_url": {"url": "c"}},
    ]
    assert images_in_conversation([{"content": "x"}, {"content": items}]) == ["a", "c"]


def test_a_spelled_token_is_broken_and_joined():
    turn = break_spelled({"role": "user", "content": [{"type": "text", "text": "an <image>"}]}, "<image>")
    text, spans = join_spelled(turn["content"][0]["text"], "<image>")
    assert (text, spans) == ("an <image>", [(3, 10)])


def test_whether_a_model_thinks_is_saved_with_its_tokenizer(parts, tmp_path: Path):
    processor = make_processor(parts.processor().image_processor, QWEN3)
    asked = [{"role": "user", "content": "1 + 1?"}]
    assert not thinks(processor.tokenizer)
    assert processor.apply_chat_template(asked, add_generation_prompt=True).endswith("</think>\n\n")
    set_thinks(processor.tokenizer, True)
    processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert thinks(loaded)
    assert not thinks(loaded, False)
    assert processor.apply_chat_template(asked, add_generation_prompt=True).endswith("assistant\n")
    unthinking = processor.apply_chat_template(asked, add_generation_prompt=True, enable_thinking=False)
    assert unthinking.endswith("</think>\n\n")
