"""Checks the settings of a run's records: sources, formats, templates, streams.

Imports the schema and the table of formats, which needs the standard library only.
"""

import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

from vlm.checks.fields import ConfigError
from vlm.config.choices import GROUPED_STRATEGIES
from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.named import is_custom_name
from vlm.config.packaged import packaged_names
from vlm.config.schema import RunConfig
from vlm.config.suggestions import suggest_value
from vlm.data.records.folders import folder_problem
from vlm.data.records.formats import FORMATS
from vlm.data.records.paths import is_tar_path, path_problem


def dataset_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the sources of a run, its evaluation and test records, and its templates."""
    data = config.dataset
    if data.path is None and not data.sources:
        yield "dataset.path: a value is needed: the file of your records, such as train.json (docs/data.md)"
    if data.path is not None and data.sources:
        yield "dataset.path and dataset.sources: choose one (dataset.path=null leaves it out)"
    sources = {f"dataset.sources.{name}": source for name, source in data.sources.items()}
    for key, source in (sources or {"dataset": data}).items():
        yield from _source_problems(key, source, data)
    for key, source in sources.items():
        yield from _template_problems(source.template, f"{key}.template")
    for name in ("image_folder", "eval_image_folder", "test_image_folder"):
        yield from _folder_problems(f"dataset.{name}", getattr(data, name))
    for key, path in {"dataset.eval_path": data.eval_path, "dataset.test_path": data.test_path}.items():
        if path is not None:
            yield from _records_problems(key, path, data.format)
            if is_tar_path(path):
                yield f"{key}={path}: tar shards are for training only; give evaluation records in another form"
    if data.streaming:
        yield from _stream_problems(config, {"dataset": data, **sources})
    if data.over_length == "split" and data.supervise != "replies":
        yield f"dataset.over_length=split: dataset.supervise={data.supervise} trains on more than replies"
    yield from _template_problems(data.template, "dataset.template")
    yield from _loss_weight_problems(data)


def loss_weight_keys(data: DatasetConfig) -> Iterator[str]:
    """Yield the keys that weight losses, with their values."""
    for name, source in data.sources.items():
        if source.loss_weight != 1:
            yield f"dataset.sources.{name}.loss_weight={source.loss_weight:g}"
    for pattern, factor in data.loss_patterns.items():
        yield f"dataset.loss_patterns.{pattern}={factor:g}"


def _loss_weight_problems(data: DatasetConfig) -> Iterator[str]:
    """Yield patterns that are no regular expressions, and factors that are not above 0."""
    for pattern, factor in data.loss_patterns.items():
        key = f"dataset.loss_patterns.{pattern}={factor:g}"
        if not 0 < factor < float("inf"):
            yield f"{key}: a number above 0 is needed; to leave a reply out, set its `loss` to false in the record"
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}: {pattern} is not a regular expression: {error}"


def _source_problems(key: str, source: SourceConfig, data: DatasetConfig) -> Iterator[str]:
    """Yield what is wrong with a source's path, format, options and image folder."""
    path = str(source.path)
    if path.startswith("pipe:"):
        if not data.allow_pipe:
            yield f"{key}.path={path}: a shell would run this; dataset.allow_pipe=true allows it"
    elif "{" not in path:
        yield from _records_problems(f"{key}.path", path, source.format)
    if is_tar_path(path) and not data.streaming:
        yield f"{key}.path={path}: tar shards can only be streamed; set dataset.streaming=true"
    if source.format in FORMATS:
        parameters = signature(FORMATS[source.format]).parameters.values()
        allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        listing = ", ".join(allowed) or "none"
        for name in source.options:
            if name not in allowed:
                yield f"{key}.options.{name}: {source.format} does not take it; allowed are {listing}"
    elif not is_custom_name(source.format):
        listing = ", ".join(FORMATS)
        hint = suggest_value(source.format, list(FORMATS), "dataset.format")
        yield f"{key}.format={source.format}: allowed are {listing}, or package.module:function for your own.{hint}"
    yield from _folder_problems(f"{key}.image_folder", source.image_folder)


def _stream_problems(config: RunConfig, sources: dict[str, SourceConfig]) -> Iterator[str]:
    """Yield settings that do not work with a stream, which has no length and only its own order."""
    if config.trainer.max_steps < 1:
        yield "dataset.streaming=true: a stream has no end; set trainer.max_steps"
    if config.dataset.over_length == "split":
        yield "dataset.over_length=split: a stream's records are not counted in advance; choose skip or truncate"
    if config.dataset.eval_split:
        yield "dataset.streaming=true: nothing can be held out of a stream; give dataset.eval_path"
    if config.dataset.overlap != "allow":
        overlap = config.dataset.overlap
        yield (
            f"dataset.overlap={overlap}: a stream cannot be compared before it is read; choose allow, or "
            "streaming=false"
        )
    sampling = config.trainer.train_sampling_strategy
    if sampling in GROUPED_STRATEGIES:
        yield f"trainer.train_sampling_strategy={sampling}: a stream cannot be grouped; choose random"
    for key, source in sources.items():
        if source.max_samples is not None:
            yield f"{key}.max_samples: it does not work with dataset.streaming=true; set trainer.max_steps instead"


def _records_problems(key: str, path: str, reader: str) -> Iterator[str]:
    """Yield what is wrong with a path that has to name a file, a folder or a data set on the Hub.

    A reader of the user's own may train on images alone, others need texts beside them.
    """
    if "://" not in path and not Path(path).exists():
        yield f"{key}={path}: no such file (seen from {Path.cwd()})"
    problem = path_problem(path)
    if Path(path).is_dir() and not is_custom_name(reader):
        problem = folder_problem(Path(path), key)
    if problem is not None:
        yield f"{key}={path}: {problem}"


def _folder_problems(key: str, path: str | None) -> Iterator[str]:
    if path is not None and not Path(path).is_dir():
        yield f"{key}={path}: no such folder (seen from {Path.cwd()})"


def _template_problems(name: str | None, key: str) -> Iterator[str]:
    """Yield what is wrong with a template: a packaged one is allowed, the tokenizer's own, or a file that exists."""
    names = [*packaged_names("vlm.data", "templates", ".jinja"), "tokenizer"]
    if name is None or name in names:
        return
    if not name.endswith(".jinja"):
        hint = suggest_value(name, names, "dataset.template")
        yield f"{key}={name}: allowed are {', '.join(names)}, or the path of a .jinja file.{hint}"
    elif not Path(name).is_file():
        yield f"{key}={name}: no such file (seen from {Path.cwd()})"


def check_template(name: str | None, key: str) -> None:
    """Refuse a template that does not exist."""
    for problem in _template_problems(name, key):
        raise ConfigError(problem)
