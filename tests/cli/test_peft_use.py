"""Runs that have no adapter and load none do without peft; where that is uncertain, they import it."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from vlm.cli.peft_use import ADAPTER_CONFIG, ADAPTER_FILES, may_be_adapter, may_use_peft
from vlm.config.schema import RunConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run on parts that are folders."""
    config = RunConfig()
    for part in ("visual_encoder", "language_model"):
        (tmp_path / part).mkdir()
        getattr(config.model, part).hf_name = str(tmp_path / part)
    return config


def test_a_run_with_neither_adapter_nor_quantised_part_does_without(config: RunConfig):
    assert not may_use_peft(config)
    config.trainer.lora.language_model.r = 4
    assert may_use_peft(config)
    config.trainer.lora.language_model.r, config.model.language_model.quantization = None, "4bit"
    assert may_use_peft(config)


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_checkpoint_that_is_an_adapter_needs_it(config: RunConfig, tmp_path: Path, name: str):
    checkpoint = tmp_path / "final"
    checkpoint.mkdir()
    config.trainer.from_pretrained = str(checkpoint)
    assert not may_use_peft(config)
    (checkpoint / name).touch()
    assert may_use_peft(config)
    config.trainer.from_pretrained, config.trainer.distillation.teacher = None, str(checkpoint)
    assert may_use_peft(config)


def test_a_name_on_the_hub_may_be_an_adapter_until_its_cache_says_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert may_be_adapter("owner/name")
    assert may_be_adapter(str(tmp_path / "missing"))
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / ".no_exist" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit).mkdir(parents=True)
    assert may_be_adapter("owner/name")
    (repository / ".no_exist" / commit / ADAPTER_CONFIG).touch()
    assert not may_be_adapter("owner/name")
    (repository / ".no_exist" / commit / ADAPTER_CONFIG).unlink()
    (repository / "snapshots" / commit / ADAPTER_CONFIG).touch()
    assert may_be_adapter("owner/name")
