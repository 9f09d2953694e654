"""Checks of a run before torch is imported: between fields and against the file system.

A value that is used in one place only is checked there instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar, Protocol

from vlm.checks.checkpoint import checkpoint_problem
from vlm.checks.dataset import dataset_problems, loss_weight_keys
from vlm.checks.fields import ConfigError, check_fields, format_value, texts_by_key
from vlm.checks.guards import guard_problems
from vlm.checks.lora import lora_problems, quantization_problems
from vlm.checks.model import anyres_problems, connector_problems, encoder_problems, unproved_problems
from vlm.checks.packing import packing_problems
from vlm.checks.saving import saving_problems
from vlm.checks.sharding import sharding_problems
from vlm.checks.step import optimizer_problems, step_problems
from vlm.checks.trackers import tracker_problems
from vlm.config.derived import embedding_row_keys, get_value, training_keys
from vlm.config.packaged import packaged_names
from vlm.config.schema import HEAD, PARTS, TRAIN_FLAGS, RunConfig, TrainerOptions


class ObjectiveChecks(Protocol):
    """The part of an objective that the checks use; `vlm.train.objectives.base.Objective` has it.

    Attributes:
        takes_loss_weights: whether the loss at each position is multiplied by its weight, if there are weights.
    """

    takes_loss_weights: ClassVar[bool]

    def refusals(self) -> Iterator[str]:
        """Yield what contradicts the objective in the configuration: the key, its value, what to do."""
        ...

    def training_keys(self) -> dict[str, str]:
        """Return what trains in addition to the parts: part -> the `key=value` that says so."""
        ...

    def metric_names(self) -> frozenset[str] | None:
        """Return the names of the metrics of evaluations, or None if they are not known in advance."""
        ...


def check(config: RunConfig, objective: ObjectiveChecks) -> None:
    """Refuse a run that cannot work.

    Raises:
        ConfigError: with the full key, its value and what is allowed.
    """
    check_fields(config)
    try:
        problem = next(_problems(config, objective), None)
    except OSError as error:  # such as of a name that is too long for any file
        key = next((key for key, value in texts_by_key(config) if value and value in str(error.filename)), "")
        raise ConfigError(f"{key}={error.filename}: {error.strerror}") from error
    if problem is not None:
        raise ConfigError(problem)


def _problems(config: RunConfig, objective: ObjectiveChecks) -> Iterator[str]:
    yield from chain(
        dataset_problems(config),
        connector_problems(config),
        anyres_problems(config),
        unproved_problems(config),
        _path_problems(config),
        saving_problems(config, objective.metric_names()),
        tracker_problems(config.trainer),
        _evaluation_setting_problems(config),
        objective.refusals(),
        _loss_weight_problems(config, objective),
        _training_problems(config, objective),
        encoder_problems(config),
        lora_problems(config),
        quantization_problems(config),
        packing_problems(config, takes_loss_weights=objective.takes_loss_weights),
        step_problems(config),
        optimizer_problems(config),
        guard_problems(config),
        sharding_problems(config),
    )


def _loss_weight_problems(config: RunConfig, objective: ObjectiveChecks) -> Iterator[str]:
    """Yield keys that weight losses if the objective does not support this."""
    for key in () if objective.takes_loss_weights else loss_weight_keys(config.dataset):
        yield f"{key}: this run's objective does not weight losses (Objective.takes_loss_weights); leave it out"


def _path_problems(config: RunConfig) -> Iterator[str]:
    """Yield the keys that name a file or folder that does not exist, or that belongs to another run."""
    trainer = config.trainer
    for part in ("visual_encoder", "language_model"):
        name = get_value(config, f"model.{part}.hf_name")
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir() and not trainer.from_pretrained:
            yield f"model.{part}.hf_name={name}: no such folder (seen from {Path.cwd()})"
    if trainer.from_pretrained and (problem := checkpoint_problem(trainer.from_pretrained, "trainer.from_pretrained")):
        yield problem
    yield from _resume_problems(trainer)


def _resume_problems(trainer: TrainerOptions) -> Iterator[str]:
    """Yield what is wrong with the settings of resuming; `vlm.train.resume` checks the content of the directory."""
    key, requested = "trainer.resume_from_checkpoint", trainer.resume_from_checkpoint
    word = requested.lower()
    if word == "true" and trainer.output_dir is None:
        yield f"{key}=true: set trainer.output_dir to the run to resume"
    elif word not in ("auto", "never", "true", "false") and not Path(requested).is_dir():
        yield f"{key}={requested}: allowed are auto, never, or the folder of a checkpoint (seen from {Path.cwd()})"
    accelerator = trainer.accelerator_config
    if isinstance(accelerator, Mapping) and accelerator.get("use_seedable_sampler") is False:
        reason = "a run that resumes within an epoch would read samples in another order; leave it out"
        yield f"trainer.accelerator_config.use_seedable_sampler=false: {reason}"
    if word in ("never", "false") and trainer.resume_changes == "accept":
        yield f"{key}={word} and trainer.resume_changes=accept: a new run has no earlier settings; choose one"


def _training_problems(config: RunConfig, objective: ObjectiveChecks) -> Iterator[str]:
    """Yield what is wrong with `trainer`: nothing trains, a part has no learning rate, keys contradict each other."""
    trainer = config.trainer
    training = _training_parts(config, objective)
    if not training:
        flags = ", ".join(f"trainer.unfreeze.{flag}" for flag in TRAIN_FLAGS.values())
        yield f"nothing trains: set one of {flags} to true, train adapters (trainer.lora), or a head (model/head)"
    for part, reason in training.items():
        key = f"trainer.learning_rate.{part}_learning_rate"
        if (rate := get_value(config, key)) is None or rate <= 0:
            yield f"{key}={format_value(rate)}: a positive number is needed, because {reason}"
    if trainer.bf16 and trainer.fp16:
        yield "trainer.bf16=true and trainer.fp16=true: choose one"
    if not trainer.average_tokens_across_devices:
        yield "trainer.average_tokens_across_devices=false: set trainer.loss_average instead"
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if (value := getattr(trainer, name)) is not None:
            new = name.replace("gradient", "activation")
            yield f"trainer.{name}={format_value(value)}: it is called trainer.{new} now"
    for name, reason in UNSUPPORTED.items():
        if value := getattr(trainer, name):
            yield f"trainer.{name}={format_value(value)}: {reason}"
    if isinstance(trainer.deepspeed, str):
        names = [name for name in packaged_names("vlm.config", "trainer/deepspeed", ".yaml") if name != "none"]
        if trainer.deepspeed not in names and not Path(trainer.deepspeed).is_file():
            yield f"trainer.deepspeed={trainer.deepspeed}: allowed are {', '.join(names)} or the path of a JSON file"


def _training_parts(config: RunConfig, objective: ObjectiveChecks) -> dict[str, str]:
    """Return part -> the `key=value` that makes it, or rows of it, train."""
    return {**embedding_row_keys(config), **training_keys(config.trainer), **objective.training_keys()}


def check_overridden_rates(config: RunConfig, objective: ObjectiveChecks, overrides: Sequence[str]) -> None:
    """Refuse learning rates and weight decays that the command line sets for parts that do not train.

    `overrides` are the keys that the command line sets. YAML files may hold rates of frozen parts, for runs that train
    them.
    """
    training = _training_parts(config, objective)
    for part in (*PARTS, HEAD):
        for key in (f"learning_rate.{part}_learning_rate", f"weight_decay.{part}_weight_decay"):
            if f"trainer.{key}" not in overrides or part in training:
                continue
            if value := get_value(config, f"trainer.{key}"):
                train = "train a head (model/head)"
                if part in TRAIN_FLAGS:
                    train = f"trainer.unfreeze.{TRAIN_FLAGS[part]}=true or trainer.lora.{part}.r=16 trains it"
                raise ConfigError(
                    f"trainer.{key}={value}: it would have no effect, since the {part.replace('_', ' ')} is frozen; "
                    f"{train}, or leave the key out"
                )


UNSUPPORTED = {
    "fsdp": "FSDP2 is trainer.sharding=fsdp2 here",
    "fsdp_config": "trainer.sharding=fsdp2 has no further settings",
    "parallelism_config": "ranks split samples, never the tokens of a sample: DeepSpeed's Ulysses would split pixels "
    "along their channels, and replace the attention of visual encoders too. For long sequences choose "
    "trainer.sharding=fsdp2 and trainer.activation_checkpointing=true",
    "push_to_hub": "after training, publish the run's folder `final` with vlm push-to-hub",
    "auto_find_batch_size": "it would change the number of steps; set trainer.per_device_train_batch_size instead",
    "label_smoothing_factor": "it needs logits at every position, which are not computed",
    "load_best_model_at_end": "set trainer.keep_best=METRIC instead",
    "save_only_model": "checkpoints are for resuming; the complete model is in the run's folder `final`",
}
"""Keys of `TrainingArguments` that would not do here what they promise -> what to do instead."""


def _evaluation_setting_problems(config: RunConfig) -> Iterator[str]:
    """Yield evaluation data that are given twice, and metrics of answers without an evaluation."""
    data, metrics = config.dataset, config.trainer.eval_metrics
    if data.eval_path and data.eval_split:
        yield "dataset.eval_path and dataset.eval_split: choose one"
    if config.trainer.before_after and not (config.trainer.before_after_probe or data.eval_path or data.eval_split):
        yield "trainer.before_after=true: there are neither evaluation records nor a probe; give dataset.eval_path"
    if metrics and config.trainer.eval_strategy == "no":
        yield f"trainer.eval_metrics={metrics}: set trainer.eval_strategy to epoch or steps"


def evaluation_problems(config: RunConfig) -> Iterator[str]:
    """Yield evaluations without data, and evaluation data without evaluations."""
    data, strategy = config.dataset, config.trainer.eval_strategy
    if strategy != "no" and not (data.eval_path or data.eval_split):
        yield f"trainer.eval_strategy={strategy}: give dataset.eval_path=FILE or a share: dataset.eval_split=0.05"
    if strategy == "no" and (data.eval_path or data.eval_split) and not config.trainer.before_after:
        key = "dataset.eval_path" if data.eval_path else "dataset.eval_split"
        yield f"{key} is given, but nothing is evaluated: add trainer.eval_strategy=epoch, or leave {key} out"
