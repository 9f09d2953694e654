"""Checks between fields and against the file system, in milliseconds: imports neither torch nor a model.

A check that concerns one value where it is used sits there; here is what must be refused before anything is imported.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Any

from vlm.config.schema import PARTS, TRAIN_FLAGS, RunConfig, training_argument_choices

CHOICES = {
    "model.visual_encoder.feature_strategy": ("patch", "cls+patch", "cls", "full"),
    "model.attn_implementation": ("auto", "flash_attention_2", "sdpa", "flex_attention", "eager"),
    "trainer.loss_average": ("token", "micro_batch"),
    "trainer.train_sampling_strategy": ("random", "sequential", "group_by_modality_length"),
    "dataset.format": ("llava",),
    "dataset.image_mode": (None, "square", "pad"),
    "dataset.over_length": ("error", "skip", "truncate"),
    "dataset.on_bad_sample": ("error", "skip"),
}
"""Keys with closed lists of values. A test holds those that come from a table against the table."""


class ConfigError(ValueError):
    """A configuration that cannot be run: the key, what was got, what is allowed."""


def check(config: RunConfig) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: with the full key, the value and what is allowed.
    """
    check_choices(config)
    check_template(config.dataset.template)
    check_connector(config.model.connector.type)
    check_paths(config)
    check_training(config)
    check_evaluation(config)


def check_choices(config: RunConfig) -> None:
    """Every key of `CHOICES`, and every enumeration of `TrainingArguments`, has one of its values."""
    for key, allowed in CHOICES.items():
        value = value_of(config, key)
        if value not in allowed:
            names = ", ".join("null" if choice is None else choice for choice in allowed)
            raise ConfigError(f"{key}={value}: allowed are {names}")
    for name, values in training_argument_choices().items():
        value = value_of(config, f"trainer.{name}")
        if value is not None and value not in values:
            raise ConfigError(f"trainer.{name}={value}: allowed are {', '.join(values)}")


def check_template(name: str | None) -> None:
    """A template is a packaged one, the tokenizer's own, or a file that exists."""
    names = [*packaged("vlm.data", "templates", ".jinja"), "tokenizer"]
    if name is None or name in names:
        return
    if not name.endswith(".jinja"):
        raise ConfigError(f"dataset.template={name}: allowed are {', '.join(names)}, or the path of a .jinja file")
    need_file("dataset.template", name)


def check_connector(kind: str) -> None:
    """A connector is one of the table's (each has a YAML file) or `package.module:Class`."""
    names = packaged("vlm.config", "model/connector", ".yaml")
    if kind not in names and not re.fullmatch(r"[\w.]+:\w+", kind):
        raise ConfigError(
            f"model.connector.type={kind}: allowed are {', '.join(names)}, or package.module:Class for your own"
        )


def check_paths(config: RunConfig) -> None:
    """Whatever names a file or folder of this machine names one that exists."""
    data, trainer = config.dataset, config.trainer
    need_file("dataset.path", data.path)
    if data.eval_path is not None:
        need_file("dataset.eval_path", data.eval_path)
    for key in ("image_folder", "eval_image_folder"):
        if (folder := getattr(data, key)) is not None and not Path(folder).is_dir():
            raise ConfigError(f"dataset.{key}={folder}: no such folder (seen from {Path.cwd()})")
    for part in ("visual_encoder", "language_model"):
        name = value_of(config, f"model.{part}.hf_name")
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir() and not trainer.from_pretrained:
            raise ConfigError(f"model.{part}.hf_name={name}: no such folder (seen from {Path.cwd()})")
    if trainer.from_pretrained is not None:
        _need_checkpoint(trainer.from_pretrained)
    resume = trainer.resume_from_checkpoint
    if resume is not None and resume.lower() not in ("true", "false") and not Path(resume).is_dir():
        raise ConfigError(f"trainer.resume_from_checkpoint={resume}: `true` or an existing checkpoint folder is needed")
    if resume is not None and resume.lower() == "true" and trainer.output_dir is None:
        raise ConfigError("trainer.resume_from_checkpoint=true: name the run with trainer.output_dir")


def _need_checkpoint(path: str) -> None:
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists():
        return  # a name on the Hub
    if not Path(path, "config.json").is_file():
        hint = " (a run's complete model is its folder final)" if Path(path, "final", "config.json").is_file() else ""
        raise ConfigError(f"trainer.from_pretrained={path}: no config.json there{hint}")


def check_training(config: RunConfig) -> None:
    """Something trains, each part that does has a learning rate, and precisions do not contradict each other."""
    trainer = config.trainer
    training = [part for part in PARTS if value_of(config, f"trainer.unfreeze.{TRAIN_FLAGS[part]}")]
    if not training:
        flags = ", ".join(f"trainer.unfreeze.{flag}" for flag in TRAIN_FLAGS.values())
        raise ConfigError(f"nothing trains: set one of {flags} to true")
    for part in training:
        key = f"trainer.learning_rate.{part}_learning_rate"
        if (rate := value_of(config, key)) is None or rate <= 0:
            raise ConfigError(
                f"{key}={rate}: a positive number is needed, since trainer.unfreeze.{TRAIN_FLAGS[part]}=true"
            )
    if value_of(config, "trainer.bf16") and value_of(config, "trainer.fp16"):
        raise ConfigError("trainer.bf16=true and trainer.fp16=true: choose one")
    for name in ("fsdp", "push_to_hub", "auto_find_batch_size", "use_liger_kernel", "label_smoothing_factor"):
        if value_of(config, f"trainer.{name}"):
            raise ConfigError(f"trainer.{name}={value_of(config, f'trainer.{name}')}: {UNSUPPORTED[name]}")
    if isinstance(trainer.deepspeed, str):
        names = [name for name in packaged("vlm.config", "trainer/deepspeed", ".yaml") if name != "none"]
        if trainer.deepspeed not in names and not Path(trainer.deepspeed).is_file():
            raise ConfigError(
                f"trainer.deepspeed={trainer.deepspeed}: allowed are {', '.join(names)} or the path of a JSON file"
            )


UNSUPPORTED = {
    "fsdp": "training is sharded with DeepSpeed here; choose trainer.deepspeed=zero3",
    "push_to_hub": "publish the run's folder final once it is trained",
    "auto_find_batch_size": "it restarts the loop with another batch, which the recipes' step counts do not survive",
    "use_liger_kernel": "it does not know composed models; logits are computed at supervised positions only anyway",
    "label_smoothing_factor": "it needs logits at every position, which are not computed",
}


def check_evaluation(config: RunConfig) -> None:
    """Evaluation while training needs something to evaluate on."""
    data = config.dataset
    if not 0 <= data.eval_split < 1:
        raise ConfigError(f"dataset.eval_split={data.eval_split}: a share from 0 to below 1 is needed")
    if data.eval_path and data.eval_split:
        raise ConfigError("dataset.eval_path and dataset.eval_split: choose one")
    strategy = value_of(config, "trainer.eval_strategy")
    if strategy != "no" and not (data.eval_path or data.eval_split):
        raise ConfigError(f"trainer.eval_strategy={strategy}: give dataset.eval_path or dataset.eval_split")


def value_of(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


def packaged(package: str, folder: str, suffix: str) -> list[str]:
    """Names of the packaged files of a folder, without their suffix."""
    files = resources.files(package).joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(suffix) for file in files if file.name.endswith(suffix))


def need_file(key: str, path: str) -> None:
    """Raise ConfigError where a path is no file."""
    if not Path(path).is_file():
        raise ConfigError(f"{key}={path}: no such file (seen from {Path.cwd()})")
