"""What each way of sharding makes of the memory of a step: arithmetic on what was counted without sharding.

Of DeepSpeed's rows, everything that its engine holds beside the model counts too: copies in single precision, and the
buffers in which gradients are reduced.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

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
    def of(cls, settings: Mapping[str, object] | None, hidden: int) -> "ZeroBuffers":
        """Read them from a configuration of DeepSpeed, for a model of a width (0: not known)."""
        zero = cast("Mapping[str, object]", (settings or {}).get("zero_optimization", {}))
        is_auto = zero.get("reduce_bucket_size") == "auto"
        bucket = hidden**2 if is_auto and hidden else _number(zero, "reduce_bucket_size", REDUCE_BUCKET)
        live = _number(zero, "stage3_max_live_parameters", LIVE_PARAMETERS)
        reuse = _number(zero, "stage3_max_reuse_distance", LIVE_PARAMETERS)
        buffers = 2 if zero.get("overlap_comm") and zero.get("stage") != 3 else 1
        return cls(bucket * buffers * bool(zero.get("contiguous_gradients", True)), min(live, reuse))


def _number(zero: Mapping[str, object], name: str, default: int) -> int:
    """Return a number of DeepSpeed's configuration; the default where it has none, or `auto`."""
    value = zero.get(name)
    return int(value) if isinstance(value, (int, float)) else default


def sharding_of(trainer: TrainerOptions) -> str:
    """Return the name of a run's way of sharding, as in `SHARDINGS`."""
    if trainer.sharding is not None:
        return trainer.sharding
    if not trainer.deepspeed:
        return "none"
    zero = (deepspeed_config(trainer.deepspeed) or {}).get("zero_optimization", {})
    offloads = [zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")]
    return f"zero{zero_stage(trainer.deepspeed)}{' + offload' if any(offloads) else ''}"


@dataclass(frozen=True)
class ShardedMemory:
    """Bytes of a rank at the highest moment of a step.

    Attributes:
        weights: parameters and buffers.
        gradients: of what trains.
        states: of the optimiser, with copies of the weights in single precision.
        buffers: in which gradients are exchanged or weights are gathered.
        activations: activations and the like.
        host: of the machine's memory, for this rank.
    """

    weights: int
    gradients: int
    states: int
    buffers: int
    activations: int
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes of the device."""
        return self.weights + self.gradients + self.states + self.buffers + self.activations


def predict_sharded(
    found: MemoryPrediction, sizes: ModelSizes, ranks: int, *, half: bool, own: TrainerOptions | None = None
) -> dict[str, ShardedMemory]:
    """Return the memory of a rank by way of sharding, as in `SHARDINGS`.

    Args:
        found: the memory without sharding.
        sizes: of the model.
        ranks: number of devices.
        half: whether matrix products run in half precision; DeepSpeed then holds weights in it too.
        own: options of the run, whose configuration of DeepSpeed counts where it has one, and whether gradients are
            accumulated: ZeRO-1 then holds them whole.
    """
    trained, frozen, states = sizes.trained, sizes.frozen, found.states
    rest = found.peak - found.weights - found.gradients - states
    exchanged = FULL * trained if ranks > 1 else 0
    rows = {"none": ShardedMemory(found.weights, found.gradients, states, exchanged, rest)}
    width = HALF if half else FULL
    bare = max(found.activations - (HALF * trained if half else 0), 0)  # without copies of weights that autocast makes
    weights, gradients = width * (trained + frozen), width * trained
    master = states + FULL * trained  # ZeRO-1 and ZeRO-2 update a copy in single precision, whatever the weights are
    if half:
        states = master
    settings = {stage: ZeroBuffers.of(_settings(stage, own), sizes.hidden) for stage in (1, 2, 3)}
    reduced = {stage: width * buffers.reduced for stage, buffers in settings.items()}
    gathered = width * min(max(settings[3].gathered, 2 * sizes.largest_layer), trained + frozen)
    whole, share = gradients, gradients // ranks
    rows["zero0"] = ShardedMemory(weights, whole, states, 0, bare)
    accumulated = whole if own is not None and accumulates(own) else share
    rows["zero1"] = ShardedMemory(weights, accumulated, master // ranks, reduced[1], bare)
    rows["zero2"] = ShardedMemory(weights, share, master // ranks, reduced[2], bare)
    rows["zero3"] = ShardedMemory(weights // ranks, share, states // ranks, gathered + reduced[3], bare)
    if ranks > 1:
        held, layers = (FULL * trained + width * frozen) // ranks, 2 * width * sizes.largest_layer
        rows["fsdp2"] = ShardedMemory(held, FULL * trained // ranks, found.states // ranks, layers, bare)
    # Beside the states, the host has room for new weights, as many as it has gradients.
    rows["zero2 + offload"] = ShardedMemory(weights, share, 0, reduced[2], bare, (master + gradients) // ranks)
    rows["zero3 + offload"] = ShardedMemory(0, share, 0, gathered + reduced[3], bare, (weights + states) // ranks)
    return rows


def accumulates(trainer: TrainerOptions) -> bool:
    """Return whether a step may have several backward passes: micro-batches, or rows of a limited length."""
    return trainer.gradient_accumulation_steps > 1 or (trainer.packing and trainer.max_tokens_per_batch is not None)


def _settings(stage: int, own: TrainerOptions | None) -> Mapping[str, object] | None:
    """Return DeepSpeed's configuration of a stage: the run's own, or the packaged one."""
    is_own = own is not None and own.deepspeed and zero_stage(own.deepspeed) == stage
    return deepspeed_config(own.deepspeed if is_own and own is not None else f"zero{stage}")
