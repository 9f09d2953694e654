"""Private names of libraries that this package relies on, each with the reason.

A release may rename or drop a private name, or stop calling it, without any error: a run would continue without what
depends on it. `check_private_names` refuses to run instead. `vlm.train.hooks` has the list for `Trainer`.
A name that an import statement mentions needs no entry: the import fails by itself. Imports none of those libraries.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from itertools import chain


@dataclass(frozen=True)
class PrivateName:
    """A name that a library does not promise to keep, and what depends on it."""

    owner: str
    """`module:Class` or `module:function`, or a module alone."""
    name: str
    """An attribute of the owner; if the owner is a function, an attribute that its code sets or reads."""
    reason: str
    parameters: tuple[str, ...] | None = None
    """The parameters of a method that this package passes or accepts; None if the method is not called."""

    @property
    def module(self) -> str:
        """The module that has the owner."""
        return self.owner.partition(":")[0]

    def __str__(self) -> str:
        """Return the full name, such as `transformers.Trainer.log`."""
        return f"{self.owner.replace(':', '.')}.{self.name}"


MODEL, CONFIG = "transformers.modeling_utils:PreTrainedModel", "transformers.configuration_utils:PreTrainedConfig"
AUTO = "transformers.models.auto.auto_factory:_BaseAutoModelClass"
LOADER = "transformers.core_model_loading:convert_and_load_state_dict_in_model"
ZERO3 = "transformers.integrations.deepspeed"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
TORCH_ENGINE = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.save"
LOOP = "transformers.trainer:Trainer._inner_training_loop"
ZERO3_INIT = "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param"

FSDP_ROOT = "parts of a model that FSDP2 shards are called before the whole"
OTHER_WORLD = "a run resumes on another number of ranks, or another stage of ZeRO"

PRIVATE_NAMES = {
    "transformers": (
        PrivateName(AUTO, "_model_mapping", "the class of a model is looked up before its weights are loaded"),
        PrivateName(CONFIG, "_attn_implementation", "packed rows have an attention of their own"),
        PrivateName(MODEL, "_supports_sdpa", "model.attn_implementation=auto chooses what a model supports"),
        PrivateName(MODEL, "_supports_flash_attn", "model.attn_implementation=auto chooses what a model supports"),
        PrivateName(MODEL, "_supports_flex_attn", "composed models say that they support flex_attention"),
        PrivateName(MODEL, "_supports_attention_backend", "composed models accept every registered attention"),
        PrivateName(MODEL, "_skip_keys_device_placement", "caches stay on the device of their layer"),
        PrivateName(MODEL, "_keep_in_fp32_modules_strict", "prediction heads stay in float32"),
        PrivateName(MODEL, "_no_split_modules", "each of several visual encoders is placed as it would be alone"),
        PrivateName(ZERO3, "_hf_deepspeed_config_weak_ref", "a model is loaded whole while a run shards its own"),
        PrivateName(LOADER, "_weight_conversions", "a model is saved under the same names whatever it was loaded from"),
        PrivateName(
            "transformers.trainer:Trainer._inner_training_loop",
            "_tr_loss",
            "the losses of updates that were left out are not logged (set)",
        ),
        PrivateName(
            MODEL, "should_save_on_this_rank", "each node without a shared disk has the model", ("is_main_process",)
        ),
        PrivateName(MODEL, "_keys_to_ignore_on_save", "what a model saves is known before it trains"),
        PrivateName(
            "transformers:GenerationMixin",
            "_supports_default_dynamic_cache",
            "state space models make the cache of their states themselves",
        ),
        PrivateName(
            "transformers:GenerationMixin",
            "_update_model_kwargs_for_generation",
            "served answers are generated together, each token as `generate` makes it",
            ("outputs", "model_kwargs", "is_encoder_decoder"),
        ),
        PrivateName(MODEL, "_init_weights", "connectors and heads draw their first weights in it", ("module",)),
        PrivateName(
            "transformers.trainer:Trainer._prepare_for_training",
            "is_distributed_loading_by_transformers",
            "a model that FSDP2 shards is not wrapped (set)",
        ),
        PrivateName(LOOP, "_tr_loss", "a resumed run logs the mean loss of whole intervals"),
        PrivateName(LOOP, "_total_loss_scalar", "a resumed run logs the mean loss of all its steps"),
        PrivateName(LOOP, "_globalstep_last_logged", "a resumed run logs the mean loss of whole intervals"),
        PrivateName(LOOP, "_initial_global_step", "a resumed run logs the mean loss of all its steps"),
    ),
    "accelerate": (
        PrivateName(
            "accelerate.utils.other",
            "is_deepspeed_available",
            "a run without DeepSpeed does not import it (set)",
        ),
        PrivateName(
            "accelerate.state:AcceleratorState",
            "_reset_state",
            "a run begins after its preflight as if nothing had been trained",
        ),
        PrivateName(
            "accelerate.state:PartialState",
            "_shared_state",
            "a run begins after its preflight on the device that it had before (set)",
        ),
    ),
    "datasets": (
        PrivateName("datasets.arrow_dataset:Dataset.__init__", "_fingerprint", "a run records which data it read"),
        PrivateName(
            "datasets.iterable_dataset:IterableDataset.__init__",
            "_ex_iterable",
            "a resumed stream passes over row groups of Parquet",
        ),
    ),
    "torch": (
        PrivateName("torch.distributed.fsdp:FSDPModule", "_get_fsdp_state", FSDP_ROOT, ()),
        PrivateName("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState", "_lazy_init", FSDP_ROOT, ()),
        PrivateName(
            "torch.optim.lr_scheduler:LRScheduler.get_last_lr",
            "_last_lr",
            "an accepted learning rate is logged",
        ),
        PrivateName(
            "torch.storage:UntypedStorage", "_new_shared", "data workers share the memory of batches", ("size",)
        ),
        PrivateName(
            "torch.storage:UntypedStorage.share_memory_", "_cdata", "the memory of a step is counted once per storage"
        ),
        PrivateName(
            "torch.nn:Module.register_forward_hook", "_forward_hooks", "a copy of a model is counted without its hooks"
        ),
        PrivateName("torch.nn.modules.dropout", "_DropoutNd", "modules with dropout encode equal images one by one"),
        PrivateName(
            "torch.nn.modules.batchnorm", "_NormBase", "modules with batch norm encode equal images one by one"
        ),
    ),
    "peft": (
        PrivateName(
            "peft.tuners.tuners_utils:BaseTunerLayer",
            "_disable_adapters",
            "the reference of preferences is the model without its adapters, whose gradients stay on (set)",
        ),
    ),
    "deepspeed": (
        PrivateName(ZERO3_INIT, "ds_numel", "parameters that ZeRO-3 shards are counted"),
        PrivateName(ZERO3_INIT, "ds_shape", "parameters that ZeRO-3 shards are counted"),
        PrivateName(f"{ENGINE}.save_checkpoint", "checkpoint_engine", "checkpoints are hashed while they are written"),
        PrivateName(TORCH_ENGINE, "zipfile_serialization", "checkpoints of DeepSpeed keep the format it has chosen"),
        PrivateName(ZERO3_INIT, "ds_tensor", "each rank looks at its shard before weights are saved"),
        PrivateName(f"{ENGINE}._take_model_step", "_global_grad_norm", "stage 0 tells its gradient norm (set)"),
        PrivateName(ENGINE, "clip_fp32_gradients", "updates in stage 0 are judged by their norm", ()),
        PrivateName(ENGINE, "was_step_applied", "updates that DeepSpeed leaves out are counted", ()),
        PrivateName(
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "scaled_global_norm",
            "updates of spikes are left out",
        ),
        PrivateName(
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
            "_get_norm_groups",
            "updates of spikes are left out",
            (),
        ),
        PrivateName(ZERO3_INIT, "partition_numel", OTHER_WORLD),
        PrivateName("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.__init__", "fp16_groups", OTHER_WORLD),
        PrivateName(
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._rigid_state_dict",
            "fp32_partitioned_groups_flat",
            OTHER_WORLD,
        ),
        PrivateName(
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.state_dict",
            "single_partition_of_fp32_groups",
            OTHER_WORLD,
        ),
        PrivateName(
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.__init__",
            "round_robin_bit16_groups",
            OTHER_WORLD,
        ),
        PrivateName("deepspeed.utils.tensor_fragment:get_full_hp_param", "_hp_mapping", OTHER_WORLD),
    ),
}
"""Library -> its private names that any package here uses."""


def check_private_names(names: Iterable[PrivateName] | None = None) -> None:
    """Refuse libraries that lack one of `names`, or of `PRIVATE_NAMES`, or whose parameters have changed.

    Modules that are not loaded are skipped, because nothing uses them.
    """
    for name in chain.from_iterable(PRIVATE_NAMES.values()) if names is None else names:
        if name.module in sys.modules and (problem := find_problem(name)):
            library = name.module.partition(".")[0]
            raise ImportError(
                f"{library} {version(library)}: {problem}, and without that this version of vlm cannot run: "
                f"{name.reason}. Install the version of {library} that requirements.lock names."
            )


def find_problem(name: PrivateName) -> str | None:
    """Return how the installed library fails to provide a name, or None."""
    module, _, path = name.owner.partition(":")
    try:
        owner = reduce(getattr, filter(None, path.split(".")), import_module(module))
    except AttributeError:
        return f"{name.owner.replace(':', '.')} is gone"
    if inspect.isfunction(owner):
        return None if name.name in owner.__code__.co_names else f"{name.owner.replace(':', '.')} sets no {name.name}"
    if not hasattr(owner, name.name):
        return f"{name} is gone"
    return None if name.parameters is None else _find_signature_problem(name, getattr(owner, name.name))


def _find_signature_problem(name: PrivateName, method: Callable[..., object]) -> str | None:
    """Return which parameter a method lacks, or needs in addition, or None."""
    parameters = inspect.signature(method).parameters
    expected = name.parameters or ()
    if missing := [parameter for parameter in expected if parameter not in parameters]:
        return f"{name} no longer has the parameter {missing[0]}"
    for parameter in parameters.values():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not is_variadic and parameter.name not in ("self", *expected):
            return f"{name} now needs the parameter {parameter.name} too"
    return None
