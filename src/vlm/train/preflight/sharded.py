"""What each way of sharding makes of the memory of a step: arithmetic on what was counted without sharding.

Of DeepSpeed's rows, everything that its engine holds beside the model counts too: copies in single precision, and the
buffers in which gradients are reduced.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.config.derived import zero_stage
from vlm.config.schema import TrainerOptions
from vlm.train.arguments import deepspeed_config
from vlm.train.preflight.memory import FULL, HALF, MemoryPrediction, ModelSizes

SHARDINGS = {
    "none": "trainer/deepspeed=none",
    "zero0": "trainer/deepspeed=zero0",
    "zero1": "trainer/deepspeed=zero1",
    "zero2": "trainer/deepspeed=zero2",
    "zero3": "trainer/deepspeed=zero3",
    "fsdp2": "trainer/deepspeed=none trainer/sharding=fsdp2",
    "zero2 + offload": "trainer.deepspeed=FILE.json (offload_optimizer)",
    "zero3 + offload": "trainer.deepspeed=FILE.json (offload_optimizer, offload_param)",
}
"""Way of sharding -> the override that chooses it."""
REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients, where its configuration says nothing."""
LIVE_PARAMETERS = 1_000_000_000
"""The most elements that ZeRO-3 keeps gathered, where its configuration says nothing."""


@dataclass(frozen=True)
class ZeroBuffers:
    """Elements that DeepSpeed holds beside the model.

    Attributes:
        reduced: of the buffers in which gradients are reduced.
        gathered: the most of weights that ZeRO-3 keeps gathered.
    """

    reduced: int
    gathered: int

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> "ZeroBuffers":
        """Read them from a configuration of DeepSpeed."""
        zero: Mapping[str, Any] = (settings or {}).get("zero_optimization", {})
        bucket, live, reuse = (
            int(LIVE if value in (None, "auto") else value)
            for value, LIVE in (
                (zero.get("reduce_bucket_size"), REDUCE_BUCKET),
                (zero.get("stage3_max_live_parameters"), LIVE_PARAMETERS),
                (zero.get("stage3_max_reuse_distance"), LIVE_PARAMETERS),
            )
        )
        buffers = 2 if zero.get("overlap_comm") and zero.get("stage") != 3 else 1
        return cls(bucket * buffers * bool(zero.get("contiguous_gradients", True)), min(live, reuse))


def sharding_of(trainer: TrainerOptions) -> str:
    """Return the name of a run's way of sharding, as in `SHARDINGS`."""
    if trainer.sharding is not None:
        return trainer.sharding
    if not trainer.deepspeed:
        return "none"
    zero = (deepspeed_config(trainer.deepspeed) or {}).get("zero_optimization", {})
    offloads = [zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")]
    return f"zero{zero_stage(trainer.deepspeed)}{' + offload' if any(offloads) else ''}"


def predict_sharded(
    prediction: MemoryPrediction, sizes: ModelSizes, ranks: int, *, half: bool, own: TrainerOptions | None = None
) -> Iterator[tuple[str, int, int]]:
    """Yield each way of sharding with the bytes of a device and of the host's memory that it takes for each rank.

    Args:
        prediction: without sharding.
        sizes: of the model.
        ranks: number of devices.
        half: whether matrix products run in half precision; DeepSpeed then holds weights in it too.
        own: options of the run, whose configuration of DeepSpeed counts where it has one.
    """
    trained, frozen = sizes.trained, sizes.frozen
    width = HALF if half else FULL
    copies = HALF * trained if half else 0  # what autocast holds of weights in single precision
    bare = max(prediction.activations - copies, 0)
    yield "none", prediction.peak + (FULL * trained if ranks > 1 else 0), 0  # the buckets that ranks exchange
    weights, gradients, states = width * (trained + frozen), width * trained, prediction.states
    master = states + FULL * trained  # DeepSpeed updates a copy in single precision
    yield "zero0", weights + gradients + (master if half else states) + bare, 0
    buffers = {stage: width * _buffers(stage, own).reduced for stage in (1, 2, 3)}
    yield "zero1", weights + gradients + master // ranks + buffers[1] + bare, 0
    yield "zero2", weights + gradients // ranks + master // ranks + buffers[2] + bare, 0
    gathered = width * min(max(_buffers(3, own).gathered, 2 * sizes.largest_layer), trained + frozen)
    held = weights + gradients + (master if half else states)
    yield "zero3", held // ranks + gathered + buffers[3] + bare, 0
    if ranks > 1:
        layers = 2 * width * sizes.largest_layer
        held = FULL * trained + width * frozen + FULL * trained + states
        yield "fsdp2", held // ranks + layers + bare, 0
    yield "zero2 + offload", weights + gradients // ranks + buffers[2] + bare, master // ranks
    yield "zero3 + offload", gathered + gradients // ranks + buffers[3] + bare, (weights + master) // ranks


def _buffers(stage: int, own: TrainerOptions | None) -> ZeroBuffers:
    """Return the buffers of a stage: as the run has them, or as the packaged configuration."""
    is_own = own is not None and own.deepspeed and zero_stage(own.deepspeed) == stage
    return ZeroBuffers.of(deepspeed_config(own.deepspeed if is_own and own is not None else f"zero{stage}"))
