"""A step on fake tensors takes the memory that the real one takes, whatever is frozen, packed or computed anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.tiny_families import save_family
from tests.tiny_parts import Parts
from vlm.assembly.checkpoint import open_checkpoint
from vlm.data.blank_images import dummy_image
from vlm.train.preflight.fake_step import BatchShape, MemoryNotCountable, StepBytes, count_step_bytes
from vlm.train.preflight.findings import Findings


def count(parts: Parts, *names: str, trained: str = "", checkpointed: bool = False) -> StepBytes:
    """The bytes of a step of a tiny model, of which the parameters that begin with `trained` train."""
    model, processor = parts.model(*names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return count_step_bytes(model, dummy_image(processor)[1], [BatchShape(2, 60, 2, 40)], torch.float32)


def test_the_probe_measures_what_was_predicted(findings: Findings):
    memory = findings.memory
    assert memory is not None
    assert memory.predicted is not None
    assert memory.measured == pytest.approx(memory.predicted.peak, rel=0.05)


def test_fewer_activations_are_kept_where_less_trains_or_layers_are_computed_anew(parts: Parts):
    whole, connector = count(parts, "siglip", "llama"), count(parts, "siglip", "llama", trained="connector")
    assert connector.gradients < whole.gradients
    assert connector.activations < whole.activations
    assert count(parts, "siglip", "llama", checkpointed=True).activations < whole.activations
    assert whole.with_gradients >= whole.activations


def test_images_of_different_lengths_are_not_counted(parts: Parts):
    model, processor = parts.model("siglip2_naflex", "llama")
    with pytest.raises(MemoryNotCountable, match="native resolution"):
        count_step_bytes(model, dummy_image(processor)[1], [BatchShape(1, 60, 1, 20)], torch.float32)


@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "idefics3"])
def test_families_whose_images_have_one_size_are_counted(family: str, tmp_path: Path):
    save_family(family, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model: Any = checkpoint.load_model()
    image = dummy_image(checkpoint.load_processor())[1]
    with torch.no_grad():
        model.get_image_features(**image)  # transformers then takes hidden states of the encoder by hooks on its layers
    found = count_step_bytes(model, image, [BatchShape(2, 60, 2, 40)], torch.float32)
    assert found.with_gradients > found.gradients > 0
