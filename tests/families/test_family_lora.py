"""Adapters on every family: they stay within their parts, and a merged checkpoint is the family's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.families.test_families import folders, load, make_images, name  # noqa: F401 - fixtures
from vlm.assembly.adapter_merge import merge
from vlm.assembly.checkpoint import open_checkpoint
from vlm.config.schema import PARTS, LoraConfig, LoraPartConfig
from vlm.families.parts import get_part_names
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.train.lora import add_adapter, linear_layers


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_stays_within_its_part(name: str, folders: Callable[[str], Path], part: str):  # noqa: F811
    model: Any = load(folders(name))
    names, wanted = get_part_names(model.config), linear_layers(model, part)
    if not wanted:  # some connectors are one convolution or one projection that is no Linear layer
        return
    add_adapter(model, LoraConfig(**{part: LoraPartConfig(r=2)}), 0, torch.float32)
    found = [key for key, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert sorted(found) == sorted(wanted)
    assert {names.part_of(f"{key}.weight") for key in found} == {part}


def logits(model: Any, processor: Any) -> torch.Tensor:
    """What a model says about an image."""
    ready = VisionLanguageModel(model.eval(), processor)
    with torch.no_grad():
        return model(**ready.inputs([[user_turn("what?", 1)]], [make_images(1)])).logits


def test_a_run_leaves_an_adapter_that_merges_into_the_familys_checkpoint(
    name: str, folders: Callable[[str], Path], train_whole: Callable[..., Path], tmp_path: Path  # noqa: F811
):  # fmt: skip
    whole = ["trainer.unfreeze.train_language_model=false", "trainer.unfreeze.train_vision_model=false"]
    run = train_whole(
        "finetune-llava-onevision", folders(name), tmp_path / "run", "trainer.deepspeed=null", "trainer.max_steps=2",
        "trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false", "dataset.max_length=512",
        "trainer.learning_rate.connector_learning_rate=1e-2", "trainer.learning_rate.visual_encoder_learning_rate=1e-2",
        "trainer.learning_rate.language_model_learning_rate=1e-2", "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=1", "model.attn_implementation=eager", "trainer.warmup_steps=0",
        "trainer.train_sampling_strategy=random", "trainer.num_samples=1", *whole,
        "trainer.lora.language_model.r=2", "trainer.lora.visual_encoder.r=3",
    )  # fmt: skip
    final = run / "final"
    assert not list(final.glob("model*.safetensors"))
    processor = VisionLanguageModel.load(final, device="cpu").processor
    beside = logits(open_checkpoint(final).load_model(merge=False, attn_implementation="eager"), processor)
    merge(str(final), tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole"), processor), beside, rtol=0, atol=1e-5)
    assert (beside - logits(load(folders(name)), processor)).abs().max() > 1e-4
    assert isinstance(
        VisionLanguageModel.load(tmp_path / "whole", device="cpu").generate("what?", make_images(1), max_new_tokens=3),
        str,
    )
