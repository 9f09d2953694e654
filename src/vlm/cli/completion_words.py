"""What the words of a training run may become: runs, options, groups with their choices, keys with their values, paths.

Read from the YAML files and the schema, which is imported only where keys are asked for. Imports no Hydra.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

from vlm.config.packaged import group_names, packaged_names, run_names

RUN_OPTIONS = ("-cn", "--config-name", "--config-dir", "--cfg", "--multirun", "--help")
"""Options of Hydra that a run's command line is offered."""

PREFIXES = ("++", "+", "~")
"""What an override may begin with, the longest first."""


def matching(current: str, names: Iterable[str]) -> list[str]:
    """Return the names that begin with what is typed."""
    return [name for name in names if name.startswith(current)]


def find_run_words(words: Sequence[str]) -> list[str]:
    """Return what the last word of a run's command line may become."""
    previous, current = (words[-2] if len(words) > 1 else ""), words[-1]
    if previous in ("-cn", "--config-name"):
        return matching(current, sorted({*run_names(), *_find_own_runs(words)}))
    if previous in ("--config-dir", "-cd"):
        return [path for path in find_paths(current) if path.endswith("/")]
    if previous in ("--cfg", "-c"):
        return matching(current, ("job", "hydra", "all"))
    if current.startswith("--config-name="):
        return [f"--config-name={name}" for name in matching(current.partition("=")[2], run_names())]
    if current.startswith("-"):
        return matching(current, RUN_OPTIONS)
    mark = next((prefix for prefix in PREFIXES if current.startswith(prefix)), "")
    key, equals, value = current.removeprefix(mark).partition("=")
    found = [f"{key}={value}" for value in _find_values(key, value)] if equals else _find_keys(key)
    return [mark + word for word in found]


def _find_own_runs(words: Sequence[str]) -> list[str]:
    """Return the names of the YAML files in the folder that `--config-dir` names."""
    folders = [after for word, after in pairwise(words) if word in ("--config-dir", "-cd")]
    return [file.stem for folder in folders for file in Path(folder).expanduser().glob("*.yaml")]


def _find_keys(typed: str) -> list[str]:
    """Return the groups (`model/connector=`), sections (`trainer.`) and keys (`trainer.max_steps=`) that come next."""
    groups = [f"{name}=" for name in group_names()]
    if "/" in typed:
        return matching(typed, groups)
    from vlm.config.keys import dotted_keys

    section = typed.rpartition(".")[0]
    depth = len(f"{section}.") if section else 0
    found: dict[str, None] = {}
    for key in matching(typed, dotted_keys()):
        name, dot, _ = key[depth:].partition(".")
        found[f"{key[:depth]}{name}{dot or '='}"] = None
    return [*found, *(matching(typed, groups) if typed and not section else [])]


def _find_values(key: str, typed: str) -> list[str]:
    """Return the values of a group or a key that begin with what is typed."""
    if key in group_names():
        return matching(typed, packaged_names("vlm.config", key, ".yaml"))
    from vlm.config.keys import find_field
    from vlm.config.rules import Choices, get_rule

    if (field := find_field(key)) is None:
        return find_paths(typed)
    if key in ("dataset.format", "dataset.template"):
        return matching(typed, list_formats() if key == "dataset.format" else list_templates()) or find_paths(typed)
    rule = get_rule(field)
    if isinstance(rule, Choices):
        return matching(typed, rule.names)
    kinds = {field.type, *get_args(field.type)}
    if bool in kinds:
        return matching(typed, ("true", "false"))
    return [] if kinds & {int, float} else find_paths(typed)


def list_formats() -> list[str]:
    """Return the names of the formats of records."""
    from vlm.data.records.formats import FORMATS  # imports no torch

    return list(FORMATS)


def list_templates() -> list[str]:
    """Return the names of the packaged chat templates, and the one of the tokenizer's own."""
    return [*packaged_names("vlm.data", "templates", ".jinja"), "tokenizer"]


def find_paths(typed: str) -> list[str]:
    """Return files and folders, these with `/`, that begin with what is typed; hidden ones where a dot is typed."""
    folder, slash, name = typed.rpartition("/")
    place = Path(folder + slash or ".").expanduser()
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(name) and (name or not entry.name.startswith("."))
    ]
