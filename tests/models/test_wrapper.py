"""What wrapped models need on loading: buffers that a part computes for itself are right in a whole checkpoint."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, FalconH1Config

from tests.tiny_parts import WIDTH, Parts
from vlm.models import VLMForConditionalGeneration


def test_buffers_that_a_part_sets_in_its_modules_are_right_after_loading(parts: Parts, tmp_path: Path):
    """Falcon-H1's model, without parameters of its own, sets a buffer in each of its layers."""
    model, _ = parts.model("clip", "llama")
    config = FalconH1Config(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16, vocab_size=64,
        ssm_multipliers=[0.5, 0.25, 2.0, 1.5, 3.0],
    )  # fmt: skip
    model.config.text_config = config
    model.language_model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    buffers = dict(again.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert "language_model.model.layers.0.mamba.mup_vector" in buffers
