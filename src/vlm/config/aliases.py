"""Names of settings in other frameworks, and our names for them.

From LLaVA's scripts, transformers' `Trainer`, LLaMA-Factory, ms-swift and nanoVLM. To add a name, add a line to
`THEIR_NAMES` or `CHOICES`; a test checks that all of ours exist. Imports the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """Our name for another framework's setting: `use`, as the user types it (`key=…`), and a sentence to add."""

    use: str
    note: str = ""

    def __str__(self) -> str:
        """Return the suggestion for the end of a message."""
        return f"Did you mean {self.use.removesuffix('=…')}?{f' {self.note}' if self.note else ''}"


THEIR_NAMES: Mapping[Alias, str] = {
    Alias(
        "trainer.learning_rate.language_model_learning_rate=…",
        "Each part has its own rate: connector_learning_rate, visual_encoder_learning_rate, head_learning_rate.",
    ): "lr learning_rate base_lr max_lr lr_language_backbone llm_lr",
    Alias("trainer.learning_rate.connector_learning_rate=…"): "mm_projector_lr aligner_lr lr_mp connector_lr merger_lr",
    Alias(
        "trainer.learning_rate.visual_encoder_learning_rate=…"
    ): "mm_vision_tower_lr vision_lr vision_tower_lr vit_lr lr_vision_backbone",
    Alias("trainer.learning_rate.head_learning_rate=…"): "head_lr",
    Alias(
        "trainer.weight_decay.language_model_weight_decay=…",
        "Each part has its own: connector_weight_decay, visual_encoder_weight_decay, head_weight_decay.",
    ): "weight_decay wd",
    Alias("trainer.num_train_epochs=…"): "epochs num_epochs n_epochs max_epochs num_epoch",
    Alias("trainer.max_steps=…"): "steps num_steps max_training_steps num_train_steps",
    Alias(
        "trainer.per_device_train_batch_size=…", "It counts samples on one device in one micro-batch."
    ): "batch_size bs train_batch_size micro_batch_size per_gpu_train_batch_size per_device_batch_size",
    Alias("trainer.per_device_eval_batch_size=…"): "eval_batch_size val_batch_size",
    Alias(
        "trainer.gradient_accumulation_steps=…",
        "A step has per_device_train_batch_size x gradient_accumulation_steps x devices samples.",
    ): "global_batch_size",
    Alias("trainer.gradient_accumulation_steps=…"): "grad_accum accumulation_steps accumulate_grad_batches",
    Alias(
        "trainer.warmup_steps=…", "A number below 1 is a share of all steps: 0.03."
    ): "warmup_ratio warmup num_warmup_steps",
    Alias("trainer.lr_scheduler_type=…"): "scheduler lr_scheduler lr_schedule",
    Alias("trainer.optim=…"): "optimizer",
    Alias("trainer.max_grad_norm=…"): "clip_grad grad_clip gradient_clipping gradient_clip_val",
    Alias(
        "trainer.activation_checkpointing=true"
    ): "gradient_checkpointing grad_checkpoint vit_gradient_checkpointing use_gradient_checkpointing",
    Alias("trainer.bf16=true"): "precision torch_dtype dtype mixed_precision",
    Alias("trainer.sharding=fsdp2"): "fsdp",
    Alias("trainer.eval_strategy=…"): "evaluation_strategy",
    Alias("trainer.eval_steps=…"): "val_check_interval",
    Alias("trainer.logging_steps=…"): "log_interval",
    Alias("trainer.save_steps=…"): "save_interval",
    Alias("trainer.report_to=wandb"): "wandb use_wandb log_wandb",
    Alias("trainer.dataloader_num_workers=…"): "num_workers dataloader_workers",
    Alias("dataset.num_workers=…"): "preprocessing_num_workers",
    Alias("trainer.output_dir=…"): "output out_dir save_dir work_dir vlm_checkpoint_path",
    Alias(
        "trainer.resume_from_checkpoint=…", "A run resumes by itself where its output_dir has a checkpoint."
    ): "resume resume_from resume_training",
    Alias("dataset.path=…"): (
        "data data_path train_data train_file dataset_path dataset_name train_dataset_path "
        "train_dataset_name dataset_dir"
    ),
    Alias("dataset.eval_path=…"): "eval_data val_data eval_dataset val_dataset validation_file",
    Alias("dataset.eval_split=…"): "val_size split_dataset_ratio",
    Alias("dataset.image_folder=…"): "image_folder image_dir media_dir images image_root image_path",
    Alias("dataset.max_length=…", "Image tokens count."): (
        "model_max_length cutoff_len max_seq_length max_seq_len lm_max_length max_len max_sample_length block_size"
    ),
    Alias("dataset.over_length=…", "Allowed are error, skip, truncate and split."): "truncation_strategy",
    Alias(
        "dataset.template=…", "Packaged ones are plain, v1, chatml and others; tokenizer is the model's own."
    ): "version conv_version conv_template chat_template conv_mode",
    Alias("dataset.system_prompt=…"): "system",
    Alias("dataset.image_mode=pad", "Tiles (anyres) are model/anyres=llava-next."): "image_aspect_ratio",
    Alias("model/anyres=llava-next"): "image_grid_pinpoints mm_patch_merge_type",
    Alias("dataset.max_frames=…"): "frames_upbound video_maxlen",
    Alias("dataset.fps=…"): "video_fps",
    Alias("dataset.max_samples=…"): "max_samples",
    Alias("trainer.train_sampling_strategy=group_by_modality_length"): "group_by_modality_length group_by_length",
    Alias("dataset.sources.NAME.weight=…"): "mix_strategy",
    Alias(
        "model.processor.max_pixels=…", "It needs model.hf_name; dataset.max_image_tokens bounds any model."
    ): "max_pixels image_max_pixels",
    Alias("model.processor.min_pixels=…", "It needs model.hf_name."): "min_pixels",
    Alias("trainer.packing=true"): "neat_packing padding_free",
    Alias("trainer.seed=…"): "seed",
    Alias(
        "model.language_model.hf_name=…",
        "A whole vision-language model is model.hf_name=…, an earlier stage trainer.from_pretrained=….",
    ): "model_name_or_path model_name model_path llm llm_backbone_id lm_model_type",
    Alias("model/language_model=…"): "language_model",
    Alias("model/visual_encoder=…"): "visual_encoder",
    Alias("model/connector=…"): "connector",
    Alias("model/head=…"): "head task_type",
    Alias("model.visual_encoder.hf_name=…", "vlm models lists packaged ones: model/visual_encoder=NAME."): (
        "vision_tower mm_vision_tower vision_encoder vision_backbone vit vit_model_type "
        "vision_backbone_id image_encoder"
    ),
    Alias(
        "model/connector=mlp", "mlp2x_gelu is mlp with its default of two layers."
    ): "mm_projector_type projector projector_type arch_specifier aligner",
    Alias("trainer.from_pretrained=…"): (
        "pretrain_mm_mlp_adapter checkpoint init_from pretrained from_checkpoint adapter_name_or_path adapters"
    ),
    Alias("model.visual_encoder.feature_layer=…"): "mm_vision_select_layer vision_feature_layer",
    Alias(
        "model.visual_encoder.feature_strategy=…", "Allowed are patch, cls+patch, cls and full."
    ): "mm_vision_select_feature vision_feature_select_strategy",
    Alias("model.attn_implementation=flash_attention_2"): "attn_impl flash_attn use_flash_attn use_flash_attention_2",
    Alias("model.language_model.quantization=4bit"): "bits load_in_4bit quantization_bit quant_bits",
    Alias("model.language_model.quantization=8bit"): "load_in_8bit",
    Alias("model.image_start_token=…", "Its partner is model.image_end_token."): "mm_use_im_start_end",
    Alias("model.image_token=…"): "mm_use_im_patch_token",
    Alias("trainer/unfreeze=connector", "Every -cn pretrain-… run trains the connector alone."): "tune_mm_mlp_adapter",
    Alias("trainer.unfreeze.train_language_model=false"): "freeze_backbone freeze_llm freeze_language_model",
    Alias("trainer.unfreeze.train_vision_model=false"): "freeze_vit freeze_vision_tower freeze_vision_encoder",
    Alias("trainer.unfreeze.train_vision_model=true"): "unfreeze_mm_vision_tower tune_vision_tower",
    Alias(
        "trainer.unfreeze.train_connector=false"
    ): "freeze_mm_mlp_adapter freeze_aligner freeze_multi_modal_projector freeze_projector",
    Alias("trainer/unfreeze=…"): "mm_tunable_parts",
    Alias("trainer/lora=language-model"): "finetuning_type train_type tuner_type lora_enable use_lora",
    Alias(
        "trainer.lora.language_model.r=…", "Each part has its own: trainer.lora.visual_encoder.r=…."
    ): "lora_rank lora_r",
    Alias("trainer.lora.language_model.alpha=…"): "lora_alpha",
    Alias("trainer.lora.language_model.target_modules=…"): "lora_target target_modules",
    Alias("trainer.lora.dropout=…"): "lora_dropout",
    Alias("trainer.lora.bias=…"): "lora_bias",
    Alias("trainer.objective=…", "Allowed are generation, distillation, prediction, embedding, preference."): "stage",
    Alias("trainer.preference.loss=…"): "rlhf_type pref_loss",
    Alias("trainer.preference.beta=…"): "pref_beta beta",
    Alias("model.head.labels=…"): "num_labels",
    Alias("model.head.task=…"): "problem_type",
    Alias("inference.temperature=…"): "temperature",
    Alias("inference.max_new_tokens=…"): "max_tokens max_new_tokens",
    Alias("inference.top_p=…"): "top_p",
    Alias("trainer.eval_metrics=[exact_match]"): "predict_with_generate",
}
"""Our name -> the names in other frameworks: last words of keys and options, in lower case with underscores."""

KEYS: Mapping[str, Alias] = {name: alias for alias, names in THEIR_NAMES.items() for name in names.split()}

CHOICES: Mapping[str, Mapping[str, str]] = {
    "model/connector": {
        "mlp2x_gelu": "mlp", "mlp3x_gelu": "mlp", "gelu-mlp": "mlp", "fused-gelu-mlp": "mlp", "mlp_gelu": "mlp",
        "projector": "mlp", "simple_resampler": "resampler", "perceiver": "resampler", "perceiver_resampler":
        "resampler", "q-former": "qformer", "spatial_pool": "pooling", "avgpool": "pooling", "cabstractor":
        "c_abstractor", "c-abstractor": "c_abstractor", "pixelshuffle": "pixel_shuffle", "pixel_unshuffle":
        "pixel_shuffle", "mlp_downsample": "pixel_shuffle", "ldpnet": "ldp", "ldpnetv2": "ldp_v2", "none": "identity",
    },
    "model/language_model": {"llama": "llama-3.2-1b", "llama3": "llama-3.2-1b", "llama2": "vicuna-7b-v1.5"},
    "model/visual_encoder": {"vit": "clip-vit-base-patch16", "dino": "dinov2-base", "naflex": "siglip2-naflex"},
    "trainer/lora": {"lora": "language-model", "qlora": "llava-qlora", "true": "language-model"},
    "trainer/unfreeze": {"llm": "language-model", "projector": "connector", "full": "all", "none": "head"},
    "trainer/sharding": {"fsdp": "fsdp2"},
    "trainer/deepspeed": {"stage1": "zero1", "stage2": "zero2", "stage3": "zero3", "zero_3": "zero3"},
    "model/anyres": {"anyres": "llava-next", "anyres_max_9": "llava-onevision", "true": "llava-next"},
    "model/head": {"classification": "multiclass", "classifier": "multiclass", "cls": "multiclass", "score":
                   "regression", "ranking": "pairwise", "reward": "pairwise"},
    "dataset.format": {"sharegpt": "llava", "chatml": "messages", "openai": "messages", "swift": "messages",
                       "vqa": "question", "coco": "caption", "dpo": "preference", "classification": "labelled"},
    "dataset.template": {"vicuna_v1": "v1", "llava_v1": "v1", "vicuna": "v1", "qwen_1_5": "chatml", "qwen2":
                         "chatml", "qwen": "chatml", "chatml_direct": "chatml", "default": "tokenizer"},
    "dataset.image_mode": {"anyres": "native", "dynamic": "native", "resize": "square"},
}  # fmt: skip
"""Group or key -> another framework's name of a choice -> our name."""


def find_alias(name: str) -> Alias | None:
    """Return our name for another framework's option or key (`--lora-rank`, `trainer.lr`), or None if it is unknown."""
    word = name.lstrip("-").rpartition(".")[2]
    return KEYS.get(word.replace("-", "_").lower())


def find_choice(place: str, word: str) -> str | None:
    """Return our choice of a group or key for another framework's name of it, or None if it is unknown."""
    return CHOICES.get(place, {}).get(word.lower())
