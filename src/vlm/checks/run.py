"""Checks between fields and against the file system, in milliseconds: imports neither torch nor a model.

A check that concerns one value where it is used sits there; here is what must be refused before anything is imported.
Of the data it reads the table of formats, which needs the standard library only.
"""

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any

from vlm.checks.encoders import FEATURE_STRATEGIES, encoder_problems
from vlm.checks.feature_cache import cache_problems
from vlm.checks.heads import head_problems
from vlm.checks.lora import lora_problems, quantization_problems
from vlm.checks.packing import packing_problems
from vlm.checks.step import step_problems
from vlm.config.derived import embedding_row_keys, get_value, head_keys, training_keys
from vlm.config.packaged import packaged_connectors, packaged_names
from vlm.config.schema import (
    TRAIN_FLAGS,
    ConnectorConfig,
    DatasetConfig,
    InferenceConfig,
    RunConfig,
    SourceConfig,
)
from vlm.config.training_fields import read_training_argument_choices
from vlm.data.records.formats import FORMATS
from vlm.data.records.paths import is_tar_path, path_problem

CHOICES = {
    "model.visual_encoder.feature_strategy": FEATURE_STRATEGIES,
    "model.visual_encoder.quantization": (None, "8bit", "4bit"),
    "model.language_model.quantization": (None, "8bit", "4bit"),
    "model.attn_implementation": ("auto", "flash_attention_2", "sdpa", "flex_attention", "eager"),
    "trainer.loss_average": ("token", "micro_batch"),
    "trainer.train_sampling_strategy": ("random", "sequential", "group_by_modality_length"),
    "trainer.lora.bias": ("none", "lora_only", "all"),
    "trainer.lora.init": ("default", "gaussian", "orthogonal"),
    "dataset.image_mode": (None, "square", "pad"),
    "dataset.over_length": ("error", "skip", "truncate"),
    "dataset.on_bad_sample": ("error", "skip"),
}
"""Keys with closed lists of values. A test holds those that come from a table against the table."""

CACHE_IMPLEMENTATIONS = ("dynamic", "static", "offloaded")
"""What `inference.cache_implementation` may name, as transformers calls them."""
EVAL_METRICS = ("exact_match", "vqa_accuracy", "anls", "cider", "bleu", "rouge")
"""What `trainer.eval_metrics` may name. A test holds it against the table of metrics."""

CUSTOM_CLASS_PATTERN = re.compile(r"[\w.]+:\w+")
"""How a class or function of the user's own is named."""


class ConfigError(ValueError):
    """A configuration that cannot be run: the key, what was got, what is allowed."""


def check(config: RunConfig) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: with the full key, the value and what is allowed.
    """
    check_choices(config)
    check_dataset(config)
    check_template(config.dataset.template)
    check_connector(config.model.connector)
    check_anyres(config)
    check_paths(config)
    for problem in head_problems(config):
        raise ConfigError(problem)
    check_training(config)
    for problem in (
        *encoder_problems(config), *lora_problems(config), *quantization_problems(config), *packing_problems(config),
        *cache_problems(config), *step_problems(config),
    ):  # fmt: skip
        raise ConfigError(problem)
    check_evaluation(config)
    check_inference(config.inference)


def check_choices(config: RunConfig) -> None:
    """Every key of `CHOICES`, and every enumeration of `TrainingArguments`, has one of its values."""
    for key, allowed in CHOICES.items():
        value = get_value(config, key)
        if value not in allowed:
            raise ConfigError(f"{key}={format_value(value)}: allowed are {', '.join(map(format_value, allowed))}")
    for name, values in read_training_argument_choices().items():
        value = get_value(config, f"trainer.{name}")
        if value is not None and value not in values:
            raise ConfigError(f"trainer.{name}={value}: allowed are {', '.join(values)}")


def check_dataset(config: RunConfig) -> None:
    """The sources are there, in known formats, and a stream has what it needs."""
    data = config.dataset
    if (data.path is None) == (not data.sources):
        raise ConfigError(
            "dataset.path: a value is needed, for example dataset.path=…" if data.path is None else
            "dataset.path and dataset.sources: choose one (dataset.path=null leaves it out)"
        )  # fmt: skip
    sources = {f"dataset.sources.{name}": one for name, one in data.sources.items()} or {"dataset": data}
    for key, source in sources.items():
        check_source(key, source, data)
    for name, one in data.sources.items():
        if one.weight <= 0:
            raise ConfigError(f"dataset.sources.{name}.weight={one.weight}: a number above 0 is needed")
        check_template(one.template, f"dataset.sources.{name}.template")
    require_folder("dataset.image_folder", data.image_folder)
    require_folder("dataset.eval_image_folder", data.eval_image_folder)
    require_folder("dataset.test_image_folder", data.test_image_folder)
    for key, path in {"dataset.eval_path": data.eval_path, "dataset.test_path": data.test_path}.items():
        if path is not None:
            require_records(key, path)
            if is_tar_path(path):
                raise ConfigError(f"{key}={path}: tar shards cannot be evaluated on, only streamed")
    for name, (fits, needed) in _dataset_bounds(data).items():
        if not fits:
            raise ConfigError(f"dataset.{name}={format_value(getattr(data, name))}: {needed} is needed")
    if data.streaming:
        check_stream(config)


def check_source(key: str, source: SourceConfig, data: DatasetConfig) -> None:
    """A source's path, format, options and image folder."""
    path = str(source.path)
    if path.startswith("pipe:"):
        if not data.allow_pipe:
            raise ConfigError(f"{key}.path={path}: a shell would run this; dataset.allow_pipe=true says that it may")
    elif "{" not in path:
        require_records(f"{key}.path", path)
    if is_tar_path(path) and not data.streaming:
        raise ConfigError(f"{key}.path={path}: tar shards are read one after the other: dataset.streaming=true")
    if source.format not in FORMATS and not CUSTOM_CLASS_PATTERN.fullmatch(source.format):
        allowed = ", ".join(FORMATS)
        raise ConfigError(
            f"{key}.format={source.format}: allowed are {allowed}, or package.module:function for your own"
        )
    if source.format in FORMATS:
        known = [p.name for p in signature(FORMATS[source.format]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for name in source.options:
            if name not in known:
                raise ConfigError(
                    f"{key}.options.{name}: {source.format} does not take it; allowed are {', '.join(known) or 'none'}"
                )
    if source.max_samples is not None and source.max_samples < 1:
        raise ConfigError(f"{key}.max_samples={source.max_samples}: at least 1 is needed")
    require_folder(f"{key}.image_folder", source.image_folder)


def check_stream(config: RunConfig) -> None:
    """A stream has no length and no order but its own."""
    data = config.dataset
    if get_value(config, "trainer.max_steps") < 1:
        raise ConfigError("dataset.streaming=true: a stream has no end; say how long to train with trainer.max_steps=…")
    if data.eval_split:
        raise ConfigError("dataset.streaming=true: nothing can be held out of a stream; give dataset.eval_path")
    sampling = get_value(config, "trainer.train_sampling_strategy")
    if sampling == "group_by_modality_length" and not config.trainer.packing:  # packs it does not concern
        raise ConfigError(f"trainer.train_sampling_strategy={sampling}: a stream cannot be grouped; choose random")
    for key, source in {"dataset": data, **{f"dataset.sources.{k}": v for k, v in data.sources.items()}}.items():
        if source.max_samples is not None:
            raise ConfigError(f"{key}.max_samples: not with dataset.streaming=true; trainer.max_steps says how many")


def _dataset_bounds(data: DatasetConfig) -> dict[str, tuple[bool, str]]:
    return {
        "max_frames": (data.max_frames >= 1, "at least 1"),
        "shuffle_buffer": (data.shuffle_buffer >= 0, "0 or more"),
        "max_skipped": (0 <= data.max_skipped <= 1, "a share from 0 to 1"),
        "check_samples": (data.check_samples is None or data.check_samples >= 0, "0 or more, or null,"),
        "num_workers": (data.num_workers is None or data.num_workers >= 0, "0 or more, or null,"),
        "max_eval_samples": (data.max_eval_samples is None or data.max_eval_samples >= 1, "at least 1, or null,"),
    }


def require_records(key: str, path: str) -> None:
    """Raise ConfigError where a path names neither a file, a folder nor a data set on the Hub."""
    if "://" not in path and not Path(path).exists():
        raise ConfigError(f"{key}={path}: no such file (seen from {Path.cwd()})")
    if problem := path_problem(path):
        raise ConfigError(f"{key}={path}: {problem}")


def require_folder(key: str, path: str | None) -> None:
    """Raise ConfigError where a folder that is named does not exist."""
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"{key}={path}: no such folder (seen from {Path.cwd()})")


def check_template(name: str | None, key: str = "dataset.template") -> None:
    """A template is a packaged one, the tokenizer's own, or a file that exists."""
    names = [*packaged_names("vlm.data", "templates", ".jinja"), "tokenizer"]
    if name is None or name in names:
        return
    if not name.endswith(".jinja"):
        raise ConfigError(f"{key}={name}: allowed are {', '.join(names)}, or the path of a .jinja file")
    require_file(key, name)


def check_connector(connector: ConnectorConfig) -> None:
    """A connector is a packaged one with options that it takes, or `package.module:Class`."""
    options = packaged_connectors()
    if connector.type not in options:
        if not CUSTOM_CLASS_PATTERN.fullmatch(connector.type):
            raise ConfigError(
                f"model.connector.type={connector.type}: allowed are {', '.join(options)}, or package.module:Class for "
                "your own"
            )
        return
    for name, value in connector.options.items():
        if value is not None and name not in options[connector.type]:
            allowed = ", ".join(options[connector.type]) or "none"
            raise ConfigError(
                f"model.connector.options.{name}={format_value(value)}: {connector.type} does not take it; "
                f"model.connector.options.{name}=null leaves it out. Allowed: {allowed}"
            )


def check_anyres(config: RunConfig) -> None:
    """Grids of tiles are such, and nothing contradicts them."""
    anyres = config.model.anyres
    for grid in anyres.grids or []:
        if len(grid) != 2 or min(grid) < 1:
            raise ConfigError(f"model.anyres.grids: {list(grid)} is no grid; [rows, columns] of tiles are needed")
    if anyres.max_tiles is not None and anyres.max_tiles < 1:
        raise ConfigError(f"model.anyres.max_tiles={anyres.max_tiles}: at least 1 is needed, or null")
    if not anyres.grids:
        if anyres.max_tiles is not None or anyres.tile_several:
            raise ConfigError("model.anyres: max_tiles and tile_several need grids, as of model/anyres=llava-next")
        return
    if config.model.hf_name is not None:
        raise ConfigError(
            f"model.anyres.grids: model.hf_name={config.model.hf_name} prepares pictures in its own way; choose "
            "model/anyres=none"
        )
    if config.dataset.image_mode == "pad":
        raise ConfigError(
            "dataset.image_mode=pad: with model.anyres, a picture is squashed to a square as a whole and its tiles are "
            "padded with black; set dataset.image_mode=square, or model/anyres=none"
        )


def check_paths(config: RunConfig) -> None:
    """Whatever names a file or folder of this machine names one that exists."""
    trainer = config.trainer
    for part in ("visual_encoder", "language_model"):
        name = get_value(config, f"model.{part}.hf_name")
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir() and not trainer.from_pretrained:
            raise ConfigError(f"model.{part}.hf_name={name}: no such folder (seen from {Path.cwd()})")
    if trainer.from_pretrained is not None:
        _check_checkpoint(trainer.from_pretrained)
    if trainer.resume_from_checkpoint is not None and trainer.resume_from_checkpoint.lower() != "false":
        _check_resumable(trainer.resume_from_checkpoint, trainer.output_dir)
    elif trainer.output_dir is not None:
        _check_unused(trainer.output_dir)


def _check_resumable(resume: str, output_dir: str | None) -> None:
    key = f"trainer.resume_from_checkpoint={resume.lower() if resume.lower() == 'true' else resume}"
    if resume.lower() == "true":
        if output_dir is None:
            raise ConfigError(f"{key}: name the run with trainer.output_dir")
        if not any(Path(output_dir).glob("checkpoint-*/complete")):
            raise ConfigError(f"{key}: no complete checkpoint in trainer.output_dir={output_dir}")
    elif not Path(resume, "complete").is_file():
        raise ConfigError(f"{key}: `true` or the folder of a complete checkpoint is needed")


def _check_unused(output_dir: str) -> None:
    """A fresh run writes into no other run's directory, whose checkpoints it would rotate away."""
    if any(Path(output_dir).glob("checkpoint-*")) or Path(output_dir, "final").exists():
        raise ConfigError(
            f"trainer.output_dir={output_dir}: holds another run. Choose another folder, or go on with it by "
            "trainer.resume_from_checkpoint=true"
        )


def _check_checkpoint(path: str) -> None:
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists():
        return  # a name on the Hub
    if not Path(path, "config.json").is_file():
        hint = " (a run's complete model is its folder final)" if Path(path, "final", "config.json").is_file() else ""
        raise ConfigError(f"trainer.from_pretrained={path}: no config.json there{hint}")


def check_training(config: RunConfig) -> None:
    """Something trains, each part that does has a learning rate, and precisions do not contradict each other."""
    trainer = config.trainer
    training = {**embedding_row_keys(config), **training_keys(trainer), **head_keys(config)}
    if not training:
        flags = ", ".join(f"trainer.unfreeze.{flag}" for flag in TRAIN_FLAGS.values())
        raise ConfigError(
            f"nothing trains: set one of {flags} to true, train adapters (trainer.lora), or a head (model/head)"
        )
    for part, reason in training.items():
        key = f"trainer.learning_rate.{part}_learning_rate"
        if (rate := get_value(config, key)) is None or rate <= 0:
            raise ConfigError(f"{key}={format_value(rate)}: a positive number is needed, since {reason}")
    if trainer.peak_tflops is not None and trainer.peak_tflops <= 0:
        raise ConfigError(f"trainer.peak_tflops={trainer.peak_tflops}: a positive number is needed, or null")
    if get_value(config, "trainer.bf16") and get_value(config, "trainer.fp16"):
        raise ConfigError("trainer.bf16=true and trainer.fp16=true: choose one")
    if not get_value(config, "trainer.average_tokens_across_devices"):
        raise ConfigError("trainer.average_tokens_across_devices=false: trainer.loss_average says how losses average")
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if (value := get_value(config, f"trainer.{name}")) is not None:
            new = name.replace("gradient", "activation")
            raise ConfigError(f"trainer.{name}={format_value(value)}: it is called trainer.{new} now")
    for name, reason in UNSUPPORTED.items():
        if get_value(config, f"trainer.{name}"):
            raise ConfigError(f"trainer.{name}={format_value(get_value(config, f'trainer.{name}'))}: {reason}")
    if isinstance(trainer.deepspeed, str):
        names = [name for name in packaged_names("vlm.config", "trainer/deepspeed", ".yaml") if name != "none"]
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
    "load_best_model_at_end": "checkpoints hold what a run resumes from; compare eval_loss in metrics.jsonl instead",
    "save_only_model": "a checkpoint is there to resume from; the complete model is the run's folder final",
}
"""Keys of `TrainingArguments` that would do something else here than they promise, and what to do."""


def check_evaluation(config: RunConfig) -> None:
    """Evaluation while training needs something to evaluate on; a head always has something."""
    data = config.dataset
    if not 0 <= (data.eval_split or 0) < 1:
        raise ConfigError(f"dataset.eval_split={data.eval_split}: a share from 0 to below 1 is needed")
    if data.eval_path and data.eval_split:
        raise ConfigError("dataset.eval_path and dataset.eval_split: choose one")
    strategy = get_value(config, "trainer.eval_strategy")
    check_eval_metrics(config, evaluates=strategy != "no")
    if config.model.head.task is not None:
        return
    if strategy != "no" and not (data.eval_path or data.eval_split):
        raise ConfigError(f"trainer.eval_strategy={strategy}: give dataset.eval_path or dataset.eval_split")
    if strategy == "no" and (data.eval_path or data.eval_split):
        raise ConfigError("trainer.eval_strategy=no, but there is evaluation data: set it to epoch or steps")


def check_eval_metrics(config: RunConfig, *, evaluates: bool) -> None:
    """The metrics of answers are known, and there is an evaluation that they are part of."""
    names = config.trainer.eval_metrics
    for name in names:
        if name not in EVAL_METRICS:
            raise ConfigError(f"trainer.eval_metrics: {name} is none; allowed are {', '.join(EVAL_METRICS)}")
    if names and config.model.head.task is not None:
        raise ConfigError(f"trainer.eval_metrics={names}: heads have measures of their own; leave it out")
    if names and not evaluates:
        raise ConfigError(f"trainer.eval_metrics={names}: set trainer.eval_strategy to epoch or steps")
    if config.trainer.eval_metrics_samples < 1:
        raise ConfigError(f"trainer.eval_metrics_samples={config.trainer.eval_metrics_samples}: at least 1 is needed")


def check_inference(settings: InferenceConfig, prefix: str = "inference.") -> None:
    """How answers are drawn is within bounds; `prefix` is what stands before a key where the user wrote it."""
    bounds = {
        "temperature": (settings.temperature >= 0, "0 (greedy) or more"),
        "top_p": (0 < settings.top_p <= 1, "a share above 0, at most 1"),
        "num_beams": (settings.num_beams >= 1, "at least 1"),
        "max_new_tokens": (settings.max_new_tokens >= 1, "at least 1"),
        "cache_implementation": (
            settings.cache_implementation in (None, *CACHE_IMPLEMENTATIONS),
            f"one of {', '.join(CACHE_IMPLEMENTATIONS)}",
        ),
    }
    for name, (fits, needed) in bounds.items():
        if not fits:
            raise ConfigError(f"{prefix}{name}={getattr(settings, name)}: {needed} is needed")


def format_value(value: Any) -> str:
    """A value as it is written in YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def require_file(key: str, path: str) -> None:
    """Raise ConfigError where a path is no file."""
    if not Path(path).is_file():
        raise ConfigError(f"{key}={path}: no such file (seen from {Path.cwd()})")
