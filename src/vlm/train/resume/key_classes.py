"""What a change of each key means to a run that is resumed: it is safe, it changes the run, or it is impossible.

Every key of the schema is named here, and a test checks that; any other key of the installed transformers counts as one
that changes the run. Imports the schema only.
"""

import re
from enum import Enum

from vlm.config.choices import PLATEAU_SCHEDULES
from vlm.config.schema import RunConfig


class KeyClass(Enum):
    """What a change of a key means to a run that is resumed."""

    START = "start"
    """The key concerns a single start of the run; it is not compared."""
    SAFE = "safe"
    """The weights are not affected, or training only ends later; the change is accepted."""
    CHANGES_RUN = "changes_run"
    """The weights are affected; the change is accepted with `trainer.resume_changes=accept`, and otherwise refused."""
    IMPOSSIBLE = "impossible"
    """The checkpoint does not fit, or the key has an effect only at the beginning; the change is refused."""


def _keys(section: str, names: str) -> frozenset[str]:
    """Return the keys of a section with these names."""
    return frozenset(f"{section}.{name}" for name in names.split())


START = _keys(
    "trainer",
    "output_dir resume_from_checkpoint resume_changes starts_from preflight auto_batch auto_batch_memory_gb hub_token",
)

SAFE = (
    _keys("trainer", "num_train_epochs max_steps num_samples eval_metrics eval_metrics_samples "
          "eval_retrieval_candidates before_after before_after_samples before_after_probe peak_tflops profile "
          "keep_best on_save_error async_save on_nonfinite max_skipped_steps stuck_after alert_command")
    | _keys("trainer", "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
            "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
            "trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug")
    | _keys("trainer", "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size "
            "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
            "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval metric_for_best_model "
            "greater_is_better load_best_model_at_end")
    | _keys("trainer", "save_strategy save_steps save_total_limit save_only_model save_on_each_node "
            "enable_jit_checkpoint restore_callback_states_from_checkpoint push_to_hub hub_private_repo "
            "hub_model_id hub_strategy hub_always_push hub_revision")
    | _keys("trainer", "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
            "dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns label_names "
            "length_column_name torch_empty_cache_steps use_cache ddp_timeout do_train do_eval do_predict local_rank")
    | _keys("dataset", "path sources.*.path allow_pipe follow_links sources.*.follow_links cache_dir num_workers "
            "cache_limit_gb on_bad_sample max_skipped check_samples overlap")
    | _keys("inference", "temperature top_p num_beams max_new_tokens cache_implementation thinking")
    | _keys("model", "trust_remote_code unproved visual_encoder.trust_remote_code language_model.trust_remote_code "
            "connector.name head.threshold_by")
)  # fmt: skip
"""Records may be moved: their content is compared separately, as `data.…`."""

CHANGES_RUN = (
    _keys("trainer", "from_pretrained deepspeed packing packing_strategy max_tokens_per_batch checkpointed_parts "
          "loss_average sharding spike_action spike_threshold spike_window")
    | _keys("trainer.distillation", "teacher teacher_revision divergence label_weight temperature top_k")
    | _keys("trainer.learning_rate", "visual_encoder_learning_rate connector_learning_rate "
            "language_model_learning_rate head_learning_rate")
    | _keys("trainer.weight_decay", "visual_encoder_weight_decay connector_weight_decay language_model_weight_decay "
            "head_weight_decay")
    | _keys("trainer.preference", "loss beta label_smoothing supervised_weight simpo_gamma desirable_weight "
            "undesirable_weight reference rejected_image")
    | _keys("trainer.lora", "dropout use_rslora visual_encoder.alpha connector.alpha language_model.alpha")
    | _keys("trainer", "per_device_train_batch_size gradient_accumulation_steps average_tokens_across_devices "
            "auto_find_batch_size lr_scheduler_type lr_scheduler_kwargs warmup_steps adam_beta1 adam_beta2 "
            "adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha seed data_seed full_determinism "
            "train_sampling_strategy dataloader_drop_last dataloader_in_order ignore_data_skip")
    | _keys("trainer", "bf16 fp16 tf32 use_cpu activation_checkpointing activation_checkpointing_kwargs "
            "gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend "
            "torch_compile_mode use_liger_kernel liger_kernel_config accelerator_config parallelism_config "
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend fsdp "
            "fsdp_config")
    | _keys("dataset", "format options image_folder split subset max_samples system_prompt streaming shuffle_buffer "
            "max_frames fps thinking eval_path eval_image_folder eval_split max_eval_samples test_path "
            "test_image_folder test_split folds cache_features template supervise image_mode alpha_background "
            "max_image_tokens coordinates max_length over_length loss_patterns")
    | _keys("dataset.sources.*", "format options image_folder split subset max_samples system_prompt weight template "
            "fps loss_weight")
    | _keys("model", "hf_name revision visual_encoder.hf_name visual_encoder.revision language_model.hf_name "
            "language_model.revision language_model.balance_loss attn_implementation processor")
    | _keys("model.head", "layer token loss loss_options class_weights label_smoothing weight generation_weight "
            "prompts")
)  # fmt: skip

IMPOSSIBLE = (
    _keys("trainer", "objective optim optim_args optim_target_modules average_decay")
    | _keys("trainer.learning_rate", "visual_encoder_layer_decay language_model_layer_decay")
    | _keys("trainer.distillation", "hidden_states_weight image_features_weight")
    | _keys("trainer.unfreeze", "train_vision_model train_connector train_language_model")
    | _keys(
        "trainer.lora",
        "use_dora bias init visual_encoder.r visual_encoder.target_modules connector.r "
        "connector.target_modules language_model.r language_model.target_modules",
    )
    | _keys(
        "model",
        "image_token image_start_token image_end_token language_model.quantization "
        "language_model.new_tokens language_model.positions connector.type connector.options anyres.grids "
        "anyres.max_tiles anyres.tile_several native.min_tokens native.max_tokens",
    )
    | _keys("model.visual_encoder", "feature_layer feature_strategy image_size extra_encoders quantization")
    | _keys("model.head", "task labels type options pooling dim name")
)
"""A checkpoint holds trained parameters and the optimiser's state, so these keys must not change."""

CLASSES = {
    **dict.fromkeys(START, KeyClass.START),
    **dict.fromkeys(SAFE, KeyClass.SAFE),
    **dict.fromkeys(CHANGES_RUN, KeyClass.CHANGES_RUN),
    **dict.fromkeys(IMPOSSIBLE, KeyClass.IMPOSSIBLE),
}
"""Key -> what its change means; `*` stands for a name chosen by the user."""

STREAM_LAYOUT = frozenset({
    "trainer.dataloader_num_workers", "trainer.seed", "trainer.data_seed", "dataset.shuffle_buffer",
    "dataset.sources.*.weight", "dataset.streaming", "dataset.split", "dataset.subset", "dataset.sources.*.split",
    "dataset.sources.*.subset",
})  # fmt: skip
"""Keys on which the position of a stream depends: each data worker of each rank reads its own share."""

OF_EVALUATION = frozenset(key for key in SAFE if re.match(r"trainer\.(eval_|metric_|greater_)", key))


def class_of(key: str, config: RunConfig) -> KeyClass:
    """Return what a change of a key, or of a value in its mapping, means to a run of this configuration."""
    known = general_key(key)
    while known not in CLASSES and "." in known:
        known = known.rpartition(".")[0]
    kind = CLASSES.get(known, KeyClass.CHANGES_RUN)
    if config.dataset.streaming and known in STREAM_LAYOUT:
        return KeyClass.IMPOSSIBLE
    if known in OF_EVALUATION and config.trainer.lr_scheduler_type in PLATEAU_SCHEDULES:
        return KeyClass.CHANGES_RUN
    return kind


def general_key(key: str) -> str:
    """Return the key in the table for a key below a name chosen by the user: of a source, or of an extra head."""
    key = re.sub(r"^dataset\.sources\.[^.]+", "dataset.sources.*", key)
    return re.sub(r"^model\.head\.extra_heads\.[^.]+", "model.head", key)
