"""After a probe libraries know what they knew before: the device, DeepSpeed's configuration, and no trainer."""

import os

import pytest
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from vlm.train.preflight.libraries import libraries_restored


def test_a_run_finds_what_it_has_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    device = TrainingArguments(output_dir="x", use_cpu=True).device
    before = dict(PartialState._shared_state)
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # kept, as arguments keep it
    with libraries_restored():
        assert not is_deepspeed_zero3_enabled()
        HfDeepSpeedConfig({"zero_optimization": {"stage": 2}})
        AcceleratorState._shared_state["device"] = "another"
        PartialState._shared_state["device"] = "another"
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    assert is_deepspeed_zero3_enabled()
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert PartialState._shared_state == before
    assert before["device"] == device
    assert AcceleratorState._shared_state == {}
    integration.unset_hf_deepspeed_config()
    assert settings.is_zero3()
