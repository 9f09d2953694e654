"""Predictions of memory: states of the optimiser, and what each way of sharding leaves on a device."""

import pytest

from vlm.train.preflight.fake_step import StepBytes
from vlm.train.preflight.findings import Findings
from vlm.train.preflight.memory import SHARDINGS, MemoryPrediction, ModelSizes, combine, predict_sharded

SIZES = ModelSizes(trained=1000, frozen=500, weights=6000, largest_layer=100)
PREDICTION = MemoryPrediction(weights=6000, gradients=4000, states=8000, activations=3000, peak=19000)


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


def test_zero_shards_states_then_gradients_then_weights():
    needed = {name: device for name, device, _ in predict_sharded(PREDICTION, SIZES, 4, half=True)}
    assert needed.keys() == SHARDINGS.keys()
    weights, gradients, master, bare = 2 * 1500, 2 * 1000, 8000 + 4000, 3000 - 2000
    assert needed["zero0"] == weights + gradients + master + bare
    assert needed["zero1"] == weights + gradients + master // 4 + bare
    assert needed["zero2"] == weights + gradients // 4 + master // 4 + bare
    assert needed["zero3"] == (weights + gradients + master) // 4 + 2 * 2 * 100 + bare
    assert needed["zero2 + offload"] == weights + gradients // 4 + bare
    assert needed["none"] == 19000 + 4 * 1000  # and the buckets that ranks exchange


def test_offloading_moves_states_to_the_host():
    host = {name: host for name, _, host in predict_sharded(PREDICTION, SIZES, 2, half=True)}
    assert host["zero2 + offload"] == 12000 // 2
    assert host["zero3 + offload"] == (12000 + 3000) // 2
    assert host["zero3"] == 0


def test_one_device_has_no_fsdp2():
    assert "fsdp2" not in {name for name, _, _ in predict_sharded(PREDICTION, SIZES, 1, half=False)}
