"""Runs on records with thinking and tools: what they train on, and what their checkpoint does when it is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tool_templates import QWEN3
from vlm.cli.main import main
from vlm.inference.generate import VisionLanguageModel
from vlm.models.processing_messages import thinks

RUN = ("trainer.num_samples=1", "trainer.save_strategy=no", "trainer.max_steps=1", "dataset.max_length=512",
       "dataset.format=messages", "trainer.per_device_train_batch_size=2")  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    """Agents' records, one with thinking, and a template that has both."""
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
    rows: list[dict[str, Any]] = [
        {
            "id": str(number),
            "tools": [{"name": "f"}],
            "messages": [
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0.5},
                {"role": "tool", "content": "wet"},
                {"role": "assistant", "content": "Yes.", **({"reasoning_content": "Hm."} if number else {})},
            ],
        }
        for number in range(4)
    ]
    (tmp_path / "agents.json").write_text(json.dumps(rows))
    (tmp_path / "qwen3.jinja").write_text(QWEN3)
    return (*RUN, f"dataset.path={tmp_path / 'agents.json'}", f"dataset.template={tmp_path / 'qwen3.jinja'}")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), True),
        (("inference.thinking=false",), False),
        (("dataset.thinking=drop",), False),
        (("dataset.thinking=drop", "inference.thinking=true"), True),
        (("dataset.streaming=true",), True),
    ],
)
def test_a_checkpoint_thinks_as_it_was_trained(
    train: Callable[..., Path], tmp_path: Path, words: tuple[str, ...], more: tuple[str, ...], expected: bool
):
    run = train("finetune-smol", tmp_path / "run", *words, *more)
    model = VisionLanguageModel.load(str(run / "final"))
    assert thinks(model.processor.tokenizer) == expected
    asked = [{"role": "user", "content": "1 + 1?"}]
    prompt = model.processor.apply_chat_template(asked, add_generation_prompt=True)
    assert prompt.endswith("assistant\n") == expected
    assert "Yes." in (run / "samples.md").read_text()


def test_records_of_agents_are_shown_counted_and_answered(
    train: Callable[..., Path], tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    more = ("trainer.eval_metrics=[exact_match]", "dataset.eval_split=0.5", "trainer.eval_strategy=steps")
    more = (*more, "trainer.eval_steps=1", "inference.max_new_tokens=4")
    run = train("finetune-smol", tmp_path / "run", *words, *more)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert any("eval_exact_match" in json.loads(line) for line in lines)
    output = tmp_path / "answers.jsonl"
    asked = ["--input", str(tmp_path / "agents.json"), "--format", "messages", "--output", str(output)]
    main(["generate", str(run / "final"), *asked, "--max-new-tokens", "4", "--no-thinking"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["error"], row["reference"]) for row in rows] == [("", "Yes.")] * 4
