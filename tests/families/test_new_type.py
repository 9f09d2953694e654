"""A type that transformers did not have when this was written trains without a change here."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.qwen3_vl import Qwen3VLProcessor

from tests.families.small_runs import SmallRun
from vlm.config.schema import PARTS
from vlm.families.table import FAMILIES

NEW_TYPE = "next_month_vl"


class NextMonthConfig(Qwen3VLConfig):
    """A configuration with another model type."""

    model_type = NEW_TYPE


class NextMonthModel(Qwen3VLForConditionalGeneration):
    """Its model."""

    config_class = NextMonthConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = []


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers knows the type for the time of a test."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, NEW_TYPE, NextMonthConfig)
    monkeypatch.setitem(AutoModelForImageTextToText._model_mapping._extra_content, NextMonthConfig, NextMonthModel)
    monkeypatch.setitem(PROCESSOR_MAPPING._extra_content, NextMonthConfig, Qwen3VLProcessor)


def test_a_type_that_nothing_names_trains_and_loads_again(tmp_path: Path):
    assert NEW_TYPE not in FAMILIES
    run = SmallRun.of(NEW_TYPE)
    assert type(run.model) is NextMonthModel
    for frozen in PARTS:
        _, changed = run.train(frozen)
        assert not changed[frozen]
        assert all(changed[part] for part in PARTS if part != frozen)
    run.evaluate()
    run.save(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is NextMonthModel
    inputs = {name: value for name, value in run.batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(run.model(**inputs).logits, again(**inputs).logits)
