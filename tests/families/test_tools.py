"""Tools and thinking through a family's own processor: its template gets lists, or is refused."""

from pathlib import Path

import pytest

from tests.families.tiny_families import TINY
from tests.tiny_parts import IGNORE_INDEX, picture, runs
from tests.tool_templates import QWEN3, WEATHER
from vlm.data.encoding.labels import encode
from vlm.data.sample import BadSample, ImageRef, Sample, ToolCallTurn, ToolResultTurn, Turn
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
READ_ITEMS = """    {%- for item in message.content -%}
        {%- set piece = 'IMAGE' if item.type == 'image' else item.text -%}
        {%- set content.text = content.text + piece -%}
    {%- endfor -%}
    {%- set content = content.text -%}
"""
LISTS = (
    QWEN3.replace("message.content if message.content is string else ''", "namespace(text='')")
    .replace(ROLES := "    {%- if message.role == 'user' or", READ_ITEMS.replace("IMAGE", IMAGE) + ROLES)
    .replace("<|im_start|>", "<|turn|>")
    .replace("<|im_end|>", "<|end|>")
)
"""Qwen3's over lists of items."""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    picture().save(path / "screen.png")
    return path


def agent(folder: Path) -> Sample:
    shown = ImageRef(folder / "screen.png")
    return Sample(
        "x",
        (
            Turn("user", (shown, "Rain?")),
            ToolCallTurn("assistant", ("",), thinking="I look.", tool_calls=(CALL,)),
            ToolResultTurn("tool", (shown, "wet")),
            Turn("assistant", ("Yes.",)),
        ),
        tools=(WEATHER,),
    )


def test_a_family_with_tools(folder: Path):
    native = TINY["qwen2.5-vl"].processor()
    native.chat_template = LISTS
    processor = FamilyProcessor(native, FAMILIES["qwen2_5_vl"])
    encoded = encode(processor, agent(folder), [(28, 28), (28, 28)])
    one = processor.tokenize(processor.image_token, (), [(28, 28)])[0]
    assert encoded.input_ids.count(processor.image_token_id) == 2 * one.count(processor.image_token_id)
    assert [native.tokenizer.decode(run, skip_special_tokens=False) for run in runs(encoded.labels)] == [
        "<think>\nI look.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|end|>',
        "<think>\n\n</think>\n\nYes.<|end|>",
    ]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "smolvlm"])
def test_a_family_whose_template_ignores_tools_refuses_them(name: str, folder: Path):
    processor = FamilyProcessor(TINY[name].processor(), FAMILIES[TINY[name].model_type])
    with pytest.raises(BadSample, match="its template leaves out the name of the tool weather"):
        encode(processor, agent(folder), [(28, 28), (28, 28)])
