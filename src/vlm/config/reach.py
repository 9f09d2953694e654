"""Which values of `trainer` have effects beyond the run: DeepSpeed's settings, and fields of `TrainingArguments`.

`TrainingArguments` gets new fields with each version of transformers. `PLAIN_ARGUMENTS` lists the fields that were
checked; any other field is assumed to have effects outside. Imports its siblings only, and OmegaConf inside functions,
because it cannot be installed with lmms-eval.
"""

from collections.abc import Iterator
from functools import cache

from vlm.config.rules import Metadata, is_plain_name, reads_outside, runs_code


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PLAIN_ARGUMENTS = _names(
    "per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules "
    "gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 "
    "bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_mode use_liger_kernel "
    "liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size "
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm run_name project eval_strategy "
    "eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model "
    "save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end metric_for_best_model "
    "greater_is_better ignore_data_skip full_determinism seed data_seed use_cpu dataloader_drop_last "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_in_order remove_unused_columns label_names train_sampling_strategy length_column_name "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout "
    "skip_memory_metrics do_train do_eval do_predict local_rank"
)
"""Fields of `TrainingArguments` whose values never read, write, send or import anything but the run's own files."""

CLOSED_ARGUMENTS = {
    "report_to": ("sends the run's metrics to another program", ("none", "tensorboard")),
    "torch_compile_backend": ("imports a compiler by name", ("inductor", "eager", "aot_eager", "cudagraphs")),
    "ddp_backend": ("imports a library by name", ("nccl", "gloo")),
    "dataloader_multiprocessing_context": ("starts processes differently", ("fork", "spawn", "forkserver")),
}
"""Other fields -> what their values do, and which values are harmless."""

START_WORDS = ("auto", "never", "true", "false")


def training_argument_reach(name: str, default: object) -> Metadata:
    """Return the metadata on what a field of `TrainingArguments` can reach; empty if it reaches nothing.

    `default` is the value of the field if a run does not set it.
    """
    if name in PLAIN_ARGUMENTS:
        return {}
    effect, allowed = CLOSED_ARGUMENTS.get(name, ("may read, write or send more than the run's own files", ()))

    def is_harmless(value: object) -> bool:
        """Return whether a value reaches nothing: it is allowed, the default or false."""
        return value in allowed or (value == default and type(value) is type(default)) or value is False

    return runs_code(effect, is_harmless) if "imports" in effect else reads_outside(effect, is_harmless)


def is_start_word(value: object) -> bool:
    """Return whether a value of `trainer.resume_from_checkpoint` is a word, not a folder."""
    return isinstance(value, str) and value.lower() in START_WORDS


def is_packaged_deepspeed(value: object) -> bool:
    """Return whether DeepSpeed's settings are packaged ones, in which only numbers and switches may differ.

    Other settings can name files, folders, and modules of optimisers.
    """
    if isinstance(value, str):
        from vlm.config.packaged import packaged_names

        return is_plain_name(value) and value in packaged_names("vlm.config", "trainer/deepspeed", ".yaml")
    if not isinstance(value, dict):
        return value is False
    return all(
        path in _packaged_deepspeed() and (isinstance(leaf, bool | int | float) or leaf in _packaged_deepspeed()[path])
        for path, leaf in _iter_leaves(value)
    )


@cache
def _packaged_deepspeed() -> dict[str, set[object]]:
    """Return dotted path -> values of the packaged settings."""
    from omegaconf import OmegaConf

    from vlm.config.packaged import FOLDER

    values: dict[str, set[object]] = {}
    for file in FOLDER.glob("trainer/deepspeed/*.yaml"):
        for path, leaf in _iter_leaves(OmegaConf.to_container(OmegaConf.load(file))):
            values.setdefault(path, set()).add(leaf)
    return values


def _iter_leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted paths and values of a nested mapping; a list is a leaf, as its text."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _iter_leaves(child, f"{path}.{name}" if path else str(name))
    else:
        yield path, value if isinstance(value, bool | int | float | str | None) else repr(value)
