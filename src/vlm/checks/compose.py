"""From a command line to a checked configuration: what Hydra composes, as plain dataclasses.

Imports neither torch nor a model.
"""

import logging
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from traceback import walk_tb
from typing import Any, cast, get_origin, get_type_hints

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlm.checks.disk import describe_disk_error
from vlm.checks.fields import ConfigError, RunFailed, check_fields
from vlm.checks.messages import (
    NO_BASE_MESSAGE,
    describe_scalar_section,
    describe_unknown_key,
    describe_unknown_option,
    explain,
    explain_composition,
)
from vlm.checks.run import ObjectiveChecks, check, check_overridden_rates
from vlm.checks.start import check_start
from vlm.checks.surface import named_by_user
from vlm.checks.sweep import is_sweep, place_run, register_resolvers, worst_value
from vlm.checks.trained_rates import name_trained_rates
from vlm.config.named import permit_names
from vlm.config.packaged import NON_RUN_CONFIGS, run_names
from vlm.config.schema import InferenceConfig, RunConfig, key_names
from vlm.config.secrets import mask, mask_values
from vlm.config.shown import format_columns, presentable, printable

NEEDED_CONTAINERS = {dict: DictConfig, list: ListConfig}
"""The type of a key -> the type of its OmegaConf node."""


class RunError(ConfigError):
    """A run was rejected on this rank after it had begun."""


def with_config(
    argv: Sequence[str] | None,
    action: Callable[[RunConfig, str, list[str]], object],
    make_objective: Callable[[RunConfig], ObjectiveChecks],
    *,
    trains: bool = False,
) -> None:
    """Compose and check a configuration, then act on it; the user's mistakes end the program with a message.

    Args:
        argv: the command line; defaults to this process's arguments.
        action: called with the configuration, its name and the keys that the command line sets; what it returns is
            the value of a run to a sweeper that searches, such as Optuna's.
        make_objective: returns the objective of a configuration, which names the keys that contradict it.
        trains: whether the action makes steps of the run, which needs a model to start from.
    """

    def check_and_act(composed: DictConfig) -> object:
        """Check a composed configuration and pass it on, with the names of the keys that were overridden."""
        name = _require_run(composed)
        if is_sweep():
            place_run(composed)
        config = make_run_config(composed)
        permit_names(named_by_user(config))
        objective = make_objective(config)
        check(config, objective)
        if trains:
            check_start(config, name)
        words = HydraConfig.get().overrides.task
        overrides = [word.split("=")[0].lstrip("+~").replace("/", ".") for word in words]
        check_overridden_rates(config, objective, overrides)
        speaks = os.environ.get("RANK", "0") == "0"
        logging.getLogger("vlm").setLevel(logging.INFO if speaks else logging.WARNING)
        try:
            return action(config, name, overrides)
        except (ValueError, RunFailed) as error:
            if is_user_error(error):
                raise RunError(str(error)) from error
            raise
        except OSError as error:
            folders = [] if config.trainer.output_dir is None else [Path(config.trainer.output_dir)]
            message = describe_disk_error(error, folders) if error.errno is not None else str(error)
            if message is None or (error.errno is None and not is_user_error(error)):
                raise
            raise RunError(message) from error

    _compose_and_act(argv, check_and_act)


def store_schema() -> None:
    """Let Hydra know the schema; a process turns its classes into nodes once, which takes a third of a composition."""
    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=RunConfig)


def compose_inference_config(argv: list[str]) -> InferenceConfig:
    """Return the generation settings of a run; other values that the run needs may be missing.

    The user's mistakes end the program with a message.
    """
    settings: list[InferenceConfig] = []

    def read(composed: DictConfig) -> None:
        """Check the keys under `inference` and keep them."""
        _require_run(composed)
        check_known_keys(composed)
        settings.append(cast(InferenceConfig, OmegaConf.to_object(composed.inference)))
        check_fields(settings[0], "inference.")

    _compose_and_act(argv, read)
    return settings[0]


def _compose_and_act(argv: Sequence[str] | None, action: Callable[[DictConfig], object]) -> None:
    """Let Hydra compose a configuration, then act on it; the user's mistakes end the program with a message.

    In a sweep, the action is called for every run, even after one was rejected; then the first error ends the program.
    """
    words = strip_launcher_arguments(sys.argv[1:] if argv is None else argv)
    if odd := next((word for word in words if word.startswith("-") and presentable(word) != word), None):
        sys.exit(f"vlm: {presentable(odd)}: no such option; vlm --help")  # Hydra would print it as it is
    _check_options(words)
    sys.argv = ["vlm", *map(open_mapping_key, words)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing: `explain` says it better
    store_schema()
    register_resolvers()
    refused: list[Exception] = []
    is_composed = False

    def job(composed: DictConfig) -> object:
        """Act on the configuration; keep an error, to raise it outside of Hydra."""
        nonlocal is_composed
        is_composed = True
        try:
            return action(composed)
        except (OmegaConfBaseException, ConfigError) as error:
            refused.append(error)  # Hydra would print the whole command line before it
            if not is_sweep():
                return None
            print(f"vlm: {presentable(mask_values(explain(error), words))}", file=sys.stderr)
            return worst_value()

    try:
        with _masked_listing(words), composed_once(words):
            hydra.main(version_base="1.3", config_path="pkg://vlm.config", config_name="base")(job)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        refused.append(error)
    except Exception as error:
        if is_composed:
            raise
        refused.append(ConfigError(explain_composition(error, words)))
    if refused:
        # Before the run all ranks of a machine have the same error, which one prints; later each prints its own.
        silent = os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(refused[0], RunError)
        told = name_trained_rates(explain(refused[0]), get_args_parser(), words)
        sys.exit(1 if silent else f"vlm: {presentable(mask_values(told, words))}")


def _check_options(words: Sequence[str]) -> None:
    """End the program with a message if the command line has an option that Hydra does not know."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        unknown = [word for word in parser.parse_known_args(words)[1] if word.startswith("-")]
        message = describe_unknown_option(unknown[0]) if unknown else None
    except ArgumentError as error:
        message = f"{error.argument_name}: {error.message}; vlm --help has examples"
    if message is not None:
        sys.exit(f"vlm: {presentable(mask_values(message, words))}")


@contextmanager
def _masked_listing(words: Sequence[str]) -> Iterator[None]:
    """Mask secrets in what Hydra prints instead of a run: `--cfg job` shows the whole configuration."""
    if not any(re.match(r"--cfg|-c(?!n|p|d)|--info|-i", word) for word in words):
        yield
        return
    listing = StringIO()
    try:
        with redirect_stdout(listing):
            yield
    finally:
        print(printable(mask_values(mask(listing.getvalue()), words)), end="")


@contextmanager
def composed_once(words: Sequence[str]) -> Iterator[None]:
    """Make Hydra start a single run directly if only a packaged run and overrides are given, which set no `hydra.mode`.

    Otherwise Hydra composes everything an additional time to read that key, whose default is a single run.
    """
    options = [word for word in words if word.startswith("-") and not word.startswith(("-cn", "--config-name"))]
    if options or any(word.lstrip("+~").startswith("hydra") for word in words):
        yield
        return
    get_mode = Hydra.get_mode
    Hydra.get_mode = lambda self, config_name, overrides: None
    try:
        yield
    finally:
        Hydra.get_mode = get_mode


def make_run_config(composed: DictConfig) -> RunConfig:
    """Return the configuration that Hydra composed as plain dataclasses.

    Raises:
        ConfigError: it has an unknown key, or a required key without a value.
    """
    check_known_keys(composed)
    check_required_values(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def compose_overrides(name: str, words: list[str]) -> DictConfig:
    """Return the configuration that Hydra, which must be initialised, composes with overrides.

    Raises:
        ConfigError: Hydra fails on the overrides without a message of its own for them.
    """
    try:
        return hydra.compose(name, words)
    except (HydraException, OmegaConfBaseException, YAMLError):
        raise
    except Exception as error:
        raise ConfigError(explain_composition(error, words)) from error


def _require_run(composed: DictConfig) -> str:
    """Return the name of a configuration; refuse it if none was named, or if it does not build on `base`."""
    name = HydraConfig.get().job.config_name or "base"
    if name in NON_RUN_CONFIGS:
        listing = format_columns(run_names())
        raise ConfigError(f"choose a run: -cn RUN, or a YAML of your own: --config-dir FOLDER -cn NAME\n{listing}")
    if OmegaConf.get_type(composed) is not RunConfig:
        raise ConfigError(NO_BASE_MESSAGE)
    return name


def check_known_keys(node: DictConfig, path: str = "") -> None:
    """Refuse unknown keys that `+` added to a section of the schema, which Hydra accepts."""
    kind = OmegaConf.get_type(node)
    if kind is None or not is_dataclass(kind):
        return
    names = [field.name for field in fields(kind)]
    values = cast(dict[str, object], OmegaConf.to_container(node))  # plain values are looked at much faster than nodes
    for name, value in ((str(name), value) for name, value in values.items()):
        key = f"{path}.{name}" if path else name
        if name not in names:
            raise ConfigError(describe_unknown_key(key, names))
        if not isinstance(value, str | dict | list):
            continue
        is_reference = OmegaConf.is_interpolation(node, name)
        if is_reference and key_names(key):
            raise ConfigError(describe_scalar_section(key))  # what is there would be another section
        if (isinstance(value, str) and not is_reference) or OmegaConf.is_missing(node, name):
            continue
        _check_referred(node, name, key, get_origin(_type_hints(kind)[name]))


_type_hints = cache(get_type_hints)


def _check_referred(node: Container, name: Any, key: str, needed: type | None = None) -> None:
    """Refuse a `${…}` that refers to a section of the schema, or to the wrong type where a mapping or list is needed.

    OmegaConf checks the type of single values behind references, but not of mappings and lists.
    """
    if OmegaConf.is_missing(node, name):
        return
    value = node[name]
    if OmegaConf.is_interpolation(node, name):
        text = cast(Any, OmegaConf.to_container(node))[name]
        if is_dataclass(OmegaConf.get_type(value)):
            raise ConfigError(f"{key}={text}: it is a section; refer to one of its keys")
        if needed in NEEDED_CONTAINERS and not isinstance(value, NEEDED_CONTAINERS[needed]):
            raise ConfigError(f"{key}={text}: a {'mapping' if needed is dict else 'list'} is needed")
    elif isinstance(value, DictConfig):
        check_known_keys(value, key)
        for inner in value if not is_dataclass(OmegaConf.get_type(value)) else ():
            _check_referred(value, inner, f"{key}.{inner}")
    elif isinstance(value, ListConfig):
        for inner in range(len(value)):
            _check_referred(value, inner, f"{key}[{inner}]")


def check_required_values(composed: DictConfig) -> None:
    """Refuse a configuration that lacks required keys."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: a value is needed, for example {missing[0]}=…")


def is_user_error(error: BaseException) -> bool:
    """Return whether an error is this package's own message about the user's input, which needs no traceback."""
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith("vlm.")


def open_mapping_key(argument: str) -> str:
    """Rewrite a word of the command line for Hydra.

    Keys with names chosen by the user get a `+`, `trainer.optim_args=key=value` gets quotes, and `preflight` its
    section.
    """
    key, equals, value = argument.partition("=")
    if key == "preflight":
        return f"trainer.{argument}"
    if key == "trainer.optim_args" and re.fullmatch(r"\w+=[^'\"]*", value):
        return f"{key}='{value}'"
    if named := re.fullmatch(r"(dataset\.sources|model\.head\.extra_heads)\.(\w+)((?:\.\w+)*)", key):
        names = [named[2], *named[3].split(".")[1:]]
        return f"++{named[1]}={''.join(f'{{{name}: ' for name in names)}{value}{'}' * len(names)}"
    is_mapping = re.fullmatch(r"(dataset\.(options|sources|loss_patterns)|model\.processor)(\.\w+)*", key)
    return f"++{argument}" if equals and is_mapping else argument


def strip_launcher_arguments(words: Sequence[str]) -> list[str]:
    """Return the command line without `--local_rank=N` of launchers, which goes to the environment instead."""
    remaining = []
    arguments = iter(words)
    for argument in arguments:
        if match := re.fullmatch(r"--local[-_]rank(?:=(\d+))?", argument):
            os.environ.setdefault("LOCAL_RANK", match.group(1) or next(arguments, "0"))
        else:
            remaining.append(argument)
    return remaining
