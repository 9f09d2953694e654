"""From the `trainer` section to `TrainingArguments`, and from a DeepSpeed name to its configuration."""

import json
import logging
import os
import socket
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from vlm.config.choices import GROUPED_STRATEGIES
from vlm.config.derived import training_keys
from vlm.config.named import import_named, is_custom_name
from vlm.config.schema import TRAINING_ARGUMENT_FIELDS, TrainerOptions

log = logging.getLogger(__name__)


class ShardedModelArguments(TrainingArguments):
    """Arguments of a run whose devices get their shares of the model alone, never the whole."""

    @property
    def place_model_on_device(self) -> bool:
        """Keep `Trainer` from moving the whole model to each device."""
        return False


def training_arguments(trainer: TrainerOptions, extra_parts: Iterable[str] = ()) -> TrainingArguments:
    """Return the run's `TrainingArguments`, and set up the process group: ZeRO-3 needs it before the model is built.

    Under DeepSpeed without a launcher, this process becomes the only rank.

    Args:
        trainer: the run's section.
        extra_parts: the parts that train besides those that the section names: a head, rows of embeddings.

    Raises:
        ValueError: a key cannot be used, a part that trains has no learning rate, or a process sees several GPUs.
    """
    values = {name: value for name in TRAINING_ARGUMENT_FIELDS if (value := getattr(trainer, name)) is not None}
    if values["train_sampling_strategy"] in GROUPED_STRATEGIES:
        values["train_sampling_strategy"] = "random"  # our own sampler takes its place
    custom_optimizer = values.pop("optim", None) if values.get("optim") not in list(OptimizerNames) else None
    if custom_optimizer is not None and is_custom_name(custom_optimizer):
        import_named(custom_optimizer, "trainer.optim")  # a name of nothing is refused before any weight loads
    if values.get("tf32") and not is_torch_tf32_available():
        log.info("trainer.tf32=true is ignored: this machine has no GPU with TF32")
        del values["tf32"]
    settings = deepspeed_config(trainer.deepspeed)
    if settings is not None:
        _prepare_deepspeed()
    peak_rate = _peak_learning_rate(trainer, extra_parts)
    try:
        kind = TrainingArguments if trainer.sharding is None else ShardedModelArguments
        arguments = kind(output_dir="outputs", deepspeed=settings, learning_rate=peak_rate, weight_decay=0.0, **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"trainer: {error}") from error
    if custom_optimizer is not None:
        arguments.optim = custom_optimizer  # `TrainingArguments` refuses names that transformers does not have
    if trainer.accelerator_config is None:
        # Out of pinned memory a device copies the next batch while it computes; without this the host would wait.
        arguments.accelerator_config.non_blocking = arguments.dataloader_pin_memory  # pyright: ignore[reportAttributeAccessIssue]
    _ = arguments.device  # sets up the process group
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process. Start one process per GPU (torchrun --nproc-per-node "
            f"{arguments.n_gpu} -m vlm …, or deepspeed --module vlm …), or choose one: CUDA_VISIBLE_DEVICES=0"
        )
    if trainer.sharding is not None and arguments.world_size == 1:
        raise ValueError(
            f"trainer.sharding={trainer.sharding}: it needs more than one process. Start one per device "
            "(torchrun --nproc-per-node N -m vlm …), or choose trainer/sharding=none"
        )
    if settings is not None:
        import deepspeed  # slow to import, and only some runs need it

        deepspeed.init_distributed()  # ZeRO-3 builds the model sharded, and would take a world of one otherwise
    return arguments


def _peak_learning_rate(trainer: TrainerOptions, extra_parts: Iterable[str]) -> float:
    """Return the highest learning rate of a part; heads of a checkpoint may need more than the checks know."""
    keys = [f"{part}_learning_rate" for part in (*training_keys(trainer), *extra_parts)]
    rates = {key: getattr(trainer.learning_rate, key) for key in keys}
    for key, rate in rates.items():
        if rate is None:
            raise ValueError(f"trainer.learning_rate.{key}=null: a positive number is needed, because this part trains")
    return max(rates.values())


def deepspeed_config(value: Any) -> dict[str, Any] | None:
    """Return what `trainer.deepspeed` stands for: a packaged name, a JSON file, a mapping, or nothing.

    Raises:
        ValueError: it would override the parts' optimiser groups, or could not save the trained model.
    """
    if not value:
        return None
    if isinstance(value, str):
        packaged = resources.files("vlm.config").joinpath("trainer", "deepspeed", f"{value}.yaml")
        if packaged.is_file():
            value = OmegaConf.to_container(OmegaConf.create(packaged.read_text(encoding="utf-8")))
        else:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
    for block in ("optimizer", "scheduler"):
        if block in value:
            raise ValueError(
                f"trainer.deepspeed.{block}: DeepSpeed would use it instead of each part's learning rate and weight "
                f"decay. Remove it; trainer.optim and trainer.lr_scheduler_type choose them."
            )
    writer, datastates = value.get("checkpoint", {}).get("writer"), value.get("datastates_ckpt")
    for key, settings in (("checkpoint.writer", writer), ("datastates_ckpt", datastates)):
        if settings:
            raise ValueError(
                f"trainer.deepspeed.{key}={settings}: DeepSpeed would still write a checkpoint when its manifest is "
                "made. Remove it: checkpoints are written before the next step"
            )
    if value.get("sequence_parallel_size", 1) != 1:
        raise ValueError(
            f"trainer.deepspeed.sequence_parallel_size={value['sequence_parallel_size']}: ranks split samples, "
            "never the tokens of a sample, whose images belong to its placeholders. Leave it out"
        )
    zero = value.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "trainer.deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save: true is needed, so that "
            "the trained model can be saved at the end"
        )
    return dict(value)


def _prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling what no run calls; without a launcher, make this process the only rank."""
    import deepspeed  # slow to import, and only some runs need it

    # On CPUs DeepSpeed would compile this operation at the first start; only its tensor-parallel inference calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def sampler_seed(args: TrainingArguments) -> int:
    """Return the seed of the order of samples: `trainer.data_seed`, else `trainer.seed`."""
    return args.seed if args.data_seed is None else args.data_seed


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that `Trainer` gives its own loaders: data workers and pinned memory."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "in_order": args.dataloader_in_order,
    }
