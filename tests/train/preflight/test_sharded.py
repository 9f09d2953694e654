"""What each way of sharding leaves on a device, with the buffers of DeepSpeed."""

import json
from pathlib import Path

from tests.fixtures import compose_config
from vlm.train.preflight.memory import MemoryPrediction, ModelSizes
from vlm.train.preflight.sharded import SHARDINGS, ZeroBuffers, predict_sharded, sharding_of

SIZES = ModelSizes(trained=1000, frozen=500, weights=6000, largest_layer=100, hidden=8)
PREDICTION = MemoryPrediction(weights=6000, gradients=4000, states=8000, activations=3000, peak=19000)
BUCKET = 2 * 8**2
"""Bytes of one of DeepSpeed's buffers for gradients in half precision, as the packaged configurations have it."""


def test_zero_shards_states_then_gradients_then_weights():
    needed = {name: row.device for name, row in predict_sharded(PREDICTION, SIZES, 4, half=True).items()}
    assert needed.keys() == SHARDINGS.keys()
    weights, gradients, master, bare = 2 * 1500, 2 * 1000, 8000 + 4000, 3000 - 2000
    assert needed["zero0"] == weights + gradients + master + bare
    assert needed["zero1"] == weights + gradients // 4 + master // 4 + bare + BUCKET
    assert needed["zero2"] == weights + gradients // 4 + master // 4 + bare + 2 * BUCKET  # it overlaps
    assert needed["zero3"] == (weights + gradients + master) // 4 + weights + bare + BUCKET  # a small model stays whole
    assert needed["zero2 + offload"] == weights + gradients // 4 + bare + 2 * BUCKET
    assert needed["none"] == 19000 + 4 * 1000  # and the buckets that ranks exchange


def test_zero1_holds_accumulated_gradients_whole():
    own = compose_config("pretrain-smol", ["dataset.path=x", "trainer.gradient_accumulation_steps=2"]).trainer
    rows = predict_sharded(PREDICTION, SIZES, 4, half=True, own=own)
    assert (rows["zero1"].gradients, rows["zero2"].gradients) == (2000, 500)


def test_offloading_moves_states_to_the_host():
    host = {name: row.host for name, row in predict_sharded(PREDICTION, SIZES, 2, half=True).items()}
    assert host["zero2 + offload"] == (12000 + 2000) // 2  # and room for new weights
    assert host["zero3 + offload"] == (12000 + 3000) // 2
    assert host["zero3"] == 0


def test_one_device_has_no_fsdp2():
    assert "fsdp2" not in predict_sharded(PREDICTION, SIZES, 1, half=False)


def test_the_configuration_of_the_run_counts(tmp_path: Path):
    zero = {"stage": 2, "reduce_bucket_size": 10, "offload_optimizer": {"device": "cpu"}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    trainer = compose_config("pretrain-smol", ["dataset.path=x", f"trainer.deepspeed={file}"]).trainer
    assert sharding_of(trainer) == "zero2 + offload"
    assert ZeroBuffers.of({"zero_optimization": zero}, 8).reduced == 10
    own = predict_sharded(PREDICTION, SIZES, 4, half=True, own=trainer)["zero2"]
    assert own.device == 3000 + 500 + 3000 + 1000 + 2 * 10


def test_a_bucket_that_is_not_set_is_deepspeeds_default():
    assert ZeroBuffers.of({"zero_optimization": {"stage": 1}}, 8).reduced == 500_000_000
    assert ZeroBuffers.of({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, 8).reduced == 64
    assert ZeroBuffers.of({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, 0).reduced == 500_000_000


def test_the_way_of_a_run_has_a_name():
    words = {"zero3": "trainer.deepspeed=zero3", "fsdp2": "trainer.sharding=fsdp2", "none": "trainer.deepspeed=null"}
    for way, word in words.items():
        assert sharding_of(compose_config("pretrain-smol", ["dataset.path=x", word]).trainer) == way
