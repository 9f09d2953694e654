"""Predictions of memory: states of the optimiser, and the highest moment of a step."""

import pytest
from torch import nn
from transformers import LlamaConfig, LlavaConfig, PretrainedConfig

from vlm.train.preflight.fake_step import StepBytes
from vlm.train.preflight.findings import Findings
from vlm.train.preflight.memory import ModelSizes, combine


class Configured(nn.Linear):
    """Nine numbers with a configuration."""

    config: PretrainedConfig | None

    def __init__(self, config: PretrainedConfig | None):
        super().__init__(2, 3)
        self.config = config


SIZES = ModelSizes(trained=1000, frozen=500, weights=6000, largest_layer=100)


def test_adamw_has_two_states_in_single_precision(findings: Findings):
    memory = findings.memory
    assert memory is not None
    assert memory.predicted is not None
    assert memory.predicted.states == pytest.approx(2 * memory.predicted.gradients, rel=0.01)
    parts = memory.predicted.weights + memory.predicted.states + memory.predicted.gradients
    assert parts < memory.predicted.peak <= parts + memory.predicted.activations


def test_the_peak_is_that_of_the_backward_pass_or_of_the_update():
    assert combine(SIZES, StepBytes(3000, 5000, 4000), 8000, 0).peak == 6000 + 8000 + 5000
    assert combine(SIZES, StepBytes(3000, 5000, 4000), 8000, 2000).peak == 6000 + 8000 + 4000 + 2000


@pytest.mark.parametrize(
    ("config", "hidden"),
    [
        (LlamaConfig(hidden_size=48, num_attention_heads=4), 48),
        (LlavaConfig(text_config=LlamaConfig(hidden_size=40, num_attention_heads=4)), 40),
        (None, 0),
    ],
)
def test_the_width_is_that_which_transformers_puts_in_place_of_auto(config: PretrainedConfig | None, hidden: int):
    assert ModelSizes.of(Configured(config)) == ModelSizes(9, 0, 36, 9, hidden)
