"""Checks the settings of a preference run (`trainer.preference`); imports the schema and other checks only."""

from collections.abc import Iterator
from dataclasses import fields

from vlm.checks.feature_cache import UNUSED_LIMIT
from vlm.checks.fields import format_value
from vlm.config.choices import BEST_FIT, REFERENCE_FREE_LOSSES
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.derived import shards_weights, training_keys
from vlm.config.preference_schema import PreferenceOptions
from vlm.config.schema import RunConfig, TrainerOptions

KEY = "trainer.preference"


def unused_preference_problems(config: RunConfig) -> Iterator[str]:
    """Yield keys of preferences that a run of another objective sets."""
    for field in fields(PreferenceOptions):
        if (value := getattr(config.trainer.preference, field.name)) != field.default:
            yield f"{KEY}.{field.name}={format_value(value)}: it is for trainer.objective=preference; leave it out"


def preference_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of a preference run."""
    yield from _loss_problems(config.trainer.preference)
    yield from _reference_problems(config)
    yield from _data_problems(config.dataset)
    trainer = config.trainer
    yield from _packing_problems(trainer)
    if trainer.loss_average == "micro_batch":
        yield "trainer.loss_average=micro_batch: the loss is a mean over the pairs of a step; leave it out"
    if trainer.eval_metrics:
        names = ", ".join(trainer.eval_metrics)
        yield f"trainer.eval_metrics=[{names}]: preferences have their own metrics; leave it out"


def _packing_problems(trainer: TrainerOptions) -> Iterator[str]:
    """Yield settings of packing that do not work with preferences."""
    if not trainer.packing:
        return
    if trainer.packing_strategy == BEST_FIT:
        yield f"trainer.packing_strategy={BEST_FIT}: the records of a micro-batch share rows; choose step"
    if trainer.preference.loss == "kto" and trainer.max_tokens_per_batch is not None:
        yield (
            f"trainer.max_tokens_per_batch={trainer.max_tokens_per_batch}: {KEY}.loss=kto estimates its reference "
            "point over a whole micro-batch, which has to be one row; leave it out"
        )


def _loss_problems(options: PreferenceOptions) -> Iterator[str]:
    """Yield options that the loss does not use."""
    loss = options.loss
    if options.label_smoothing:
        if loss not in ("dpo", "simpo", "robust"):
            yield f"{KEY}.label_smoothing={options.label_smoothing}: {KEY}.loss={loss} does not use it; leave it out"
        if options.label_smoothing >= 0.5:
            yield f"{KEY}.label_smoothing={options.label_smoothing}: a share below 0.5 is needed"
    if loss == "kto" and options.rejected_image != "same":
        yield f"{KEY}.rejected_image={options.rejected_image}: it needs pairs, and kto has none; leave it out"
    for name, own in (("simpo_gamma", "simpo"), ("desirable_weight", "kto"), ("undesirable_weight", "kto")):
        value = getattr(options, name)
        if value != getattr(PreferenceOptions(), name) and loss != own:
            yield f"{KEY}.{name}={value}: it is for {KEY}.loss={own}, but the loss is {loss}; leave it out"


def _reference_problems(config: RunConfig) -> Iterator[str]:
    """Yield references that a run cannot have."""
    options, trainer = config.trainer.preference, config.trainer
    reference, loss = options.reference, options.loss
    key = f"{KEY}.reference={reference}"
    if loss in REFERENCE_FREE_LOSSES:
        if reference not in ("auto", "none"):
            yield f"{key}: {KEY}.loss={loss} uses no reference model; leave it out"
        return
    if reference == "none":
        yield f"{key}: {KEY}.loss={loss} needs a reference model; choose auto, or {KEY}.loss=simpo or orpo"
    if reference == "adapter":
        keys = training_keys(trainer)
        if not keys:
            return  # another check says that nothing trains
        others = [value for value in keys.values() if not value.startswith("trainer.lora.")]
        if others:
            yield f"{key}: {others[0]} trains more than adapters; choose cached"
    if reference == "copy" and shards_weights(trainer):
        yield f"{key}: each rank would hold a whole copy of the model in addition to its shard; choose cached"


def _data_problems(data: DatasetConfig) -> Iterator[str]:
    """Yield what is wrong with how records are read."""
    if data.streaming:
        yield "dataset.streaming=true: both sides of a record are checked and counted before training; leave it out"
    if data.over_length == "truncate":
        yield "dataset.over_length=truncate: replies are compared whole, never cut; choose skip or error"
    if data.supervise != "replies":
        yield f"dataset.supervise={data.supervise}: only the replies of both sides are compared; leave it out"
    if data.cache_features:
        yield "dataset.cache_features=true: image features are not cached for preferences; leave it out"
    if data.cache_limit_gb is not None:
        yield f"dataset.cache_limit_gb={data.cache_limit_gb}: {UNUSED_LIMIT}"
