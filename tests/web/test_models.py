"""What the page knows of checkpoints that are not loaded, and what it asks of one that is."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_parts import Parts
from vlm.config.schema import InferenceConfig
from vlm.web.models import knows_thinking

ASKS = "{% if enable_thinking %}<think>{% endif %}"


@pytest.mark.parametrize(
    ("files", "known"),
    [
        ({"chat_template.jinja": ASKS}, True),
        ({"chat_template.jinja": "{{ bos }}", "tokenizer_config.json": json.dumps({"chat_template": ASKS})}, False),
        ({"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": ASKS}]})}, True),
        ({"tokenizer_config.json": json.dumps({"enable_thinking": True})}, False),
        ({"chat_template.json": json.dumps({"chat_template": ASKS})}, True),
        ({}, False),
        ({"tokenizer_config.json": "{"}, False),
        ({"chat_template.json": "[]"}, False),
        ({"chat_template.jinja": ASKS + " " * 2**20}, False),
    ],
)
def test_a_template_tells_whether_a_model_may_think(tmp_path: Path, files: dict[str, str], known: bool):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert knows_thinking(str(tmp_path)) == known


@pytest.mark.parametrize("name", [None, "", "someone/never-loaded", "no such: name"])
def test_of_what_is_not_here_nothing_is_known(name: str | None):
    assert not knows_thinking(name)


def test_a_saved_model_tells_too(parts: Parts, tmp_path: Path):
    parts.processor(template=None, language_model="qwen2").save_pretrained(tmp_path)
    assert not knows_thinking(str(tmp_path))


@pytest.mark.parametrize(("choice", "thinking"), [("as trained", None), ("yes", True), ("no", False)])
def test_the_choice_of_thinking_reaches_the_conversation(choice: str, thinking: bool | None):
    chat: Any = pytest.importorskip("vlm.web.chat")
    opened = chat.open_conversation(object(), *chat.read_settings((0, 1, 5, None), chat.THINKING[choice]))
    assert opened.settings == InferenceConfig(0, 1, max_new_tokens=5, thinking=thinking)
