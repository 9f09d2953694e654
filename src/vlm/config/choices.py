"""The allowed names of some configuration keys. Their tables are elsewhere, because they import torch or are hub code.

Imports nothing. `tests/config/test_choices.py` compares each list with its table.
"""

LOSSES = {
    "binary": ("bce", "focal"),
    "multiclass": ("ce", "focal"),
    "multilabel": ("bce", "focal"),
    "regression": ("mse", "huber"),
    "ordinal": ("ordinal",),
    "pairwise": ("margin",),
    "embedding": ("infonce",),
}
"""Task of a prediction head -> its losses; the first is its default."""
LOSS_OPTIONS = {
    "focal": ("gamma",),
    "huber": ("delta",),
    "margin": ("margin",),
    "infonce": ("temperature", "learned_temperature", "symmetric", "widths", "width_weights"),
}
"""Loss -> its options."""
CLASSIFICATION_TASKS = ("binary", "multiclass", "multilabel", "ordinal")
TASKS_WITH_THRESHOLD = ("binary", "multilabel")
THRESHOLD_CRITERIA = ("f1", "accuracy", "youden", "none")
"""What the choice of a threshold maximises: F1 of the positive label, accuracy, sensitivity + specificity - 1 (Youden
1950); `none` leaves it at 0.5."""
HEAD_TYPES = {
    "linear": ("input_norm", "dropout"),
    "mlp": ("hidden_dim", "num_layers", "input_norm", "dropout"),
    "identity": (),
}
"""Type of a prediction head -> its options."""
PROMPTS = ("query", "document")
"""Sides of an `embedding` that can have their own system turn, under the names of sentence-transformers."""
POOLINGS = ("last", "mean", "image", "text", "attention", "query", "token", "first", "alltoken")
FEATURE_STRATEGIES = ("patch", "cls+patch", "cls", "full")
SUPERVISIONS = ("replies", "llava-onevision")
IMAGE_MODES = ("square", "pad", "native")
POSITIONS = ("plain", "mrope")
ALPHA_BACKGROUNDS = ("white", "black", "grey", "drop")
THINKING_MODES = ("template", "keep", "drop")
"""Backgrounds of transparent images; `drop` ignores transparency."""
COORDINATES = (
    "auto", "llava", "pixels", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "paligemma", "internvl", "gemini", "glm", "molmo",
    "molmo2", "florence-2", "deepseek-vl2",
)  # fmt: skip
"""Conventions of boxes, points and time spans; `auto`: the checkpoint's, or else that of the model type."""
ATTENTION_IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa", "flex_attention", "eager")
QUANTIZATIONS = ("8bit", "4bit")
GROUP_BY_MODALITY_LENGTH = "group_by_modality_length"
GROUP_BY_MODALITY_BLOCKS = "group_by_modality_blocks"
GROUPED_STRATEGIES = (GROUP_BY_MODALITY_LENGTH, GROUP_BY_MODALITY_BLOCKS)
"""Orders of samples that depend on their lengths: LLaVA's, and the one with the least padding."""
SAMPLING_STRATEGIES = ("random", "sequential", *GROUPED_STRATEGIES)
PLATEAU_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose learning rate depends on measured metrics, not only on the step."""
BEST_FIT = "best_fit"
PACKING_STRATEGIES = ("step", BEST_FIT)
FSDP2 = "fsdp2"
FSDP2_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimisers whose states have the shapes of their parameters, so that they can be sharded like them."""
MUON = "muon"
"""The optimiser that this framework adds to those of transformers."""
ANSWER_METRICS = ("exact_match", "vqa_accuracy", "anls", "cider", "bleu", "rouge")
"""Metrics of answers."""
OBJECT_METRICS = ("iou", "acc@0.5", "point_in_box")
"""Metrics of the boxes, points and time spans in answers."""
HALLUCINATION_METRICS = ("pope", "chair")
"""Metrics of objects that a model sees or names although the image does not show them."""
LOSS_METRICS = ("loss", "retrieval")
"""Metrics of losses."""
EVAL_METRICS = (*ANSWER_METRICS, *OBJECT_METRICS, "retrieval")
"""Metrics that a run computes on request; every evaluation computes the loss."""
EVALUATION_LOSSES = ("loss", "blank_loss", "image_gain")
"""Metrics of every evaluation of a run that trains on replies."""
HEAD_METRICS = {
    "binary": ("accuracy", "f1", "precision", "recall", "auroc", "average_precision", "ece"),
    "multiclass": ("accuracy", "f1", "auroc", "average_precision", "ece"),
    "multilabel": ("f1", "accuracy", "exact_match", "auroc", "average_precision", "ece"),
    "regression": ("mae", "rmse", "r2", "spearman"),
    "ordinal": ("accuracy", "mae", "kappa", "spearman"),
    "pairwise": ("pair_accuracy", "spearman"),
    "embedding": (
        "recall@1",
        "recall@5",
        "recall@10",
        "mrr",
        "reverse_recall@1",
        "reverse_recall@5",
        "reverse_recall@10",
        "reverse_mrr",
    ),
}
"""Task of a prediction head -> metrics of its outputs, in addition to the loss."""
DIVERGENCES = ("forward", "reverse", "jensen_shannon")
"""Divergences of a student from its teacher."""
CACHE_IMPLEMENTATIONS = ("dynamic", "static", "offloaded")
"""Caches of keys and values, by their names in transformers."""

PREFERENCE_LOSSES = ("dpo", "robust", "ipo", "hinge", "apo_zero", "simpo", "orpo", "kto")
"""Values of `trainer.preference.loss`."""
REFERENCE_FREE_LOSSES = ("simpo", "orpo")
"""Losses without a reference model."""
REFERENCES = ("auto", "cached", "adapter", "copy", "none")
"""Values of `trainer.preference.reference`."""
PREFERENCE_METRICS = ("reward_chosen", "reward_rejected", "margin", "reward_accuracy", "kl")
"""Metrics of preferences, logged at each step, and computed on evaluation records in addition to the loss."""
REJECTED_IMAGES = ("same", "blank", "cropped")
"""Values of `trainer.preference.rejected_image`."""

FORMAT_DESCRIPTIONS = {
    "llava": "for transformers and vLLM, without remote code",
    "llava-original": "for the original LLaVA code and SGLang",
    "gguf": "for llama.cpp and tools built on it",
    "onnx": "for onnxruntime, from any language",
}
"""Format of `vlm.hub.exporting` -> the software that reads it."""
ADAPTER_FORMAT_DESCRIPTIONS = {"vllm-lora": "a LoRA run's base and adapter, for vLLM's --enable-lora"}
"""Format of an adapter -> the software that reads it."""
EXPORT_DTYPES = ("float32", "float16", "bfloat16", "q8_0")
"""How `gguf` stores matrices; `onnx` is written in float32."""
