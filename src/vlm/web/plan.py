"""Turns the values of the page's fields into a checked configuration and the exact command that runs it.

Needs neither torch nor Gradio. The command stays a list of words down to the process: no shell ever reads it.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Lock

from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlm.checks.compose import compose_overrides, make_run_config, open_mapping_key, store_schema
from vlm.checks.fields import ConfigError
from vlm.checks.messages import explain
from vlm.checks.run import check
from vlm.checks.surface import check_plain_values, check_surface
from vlm.config.packaged import packaged_names, run_names
from vlm.config.schema import RunConfig
from vlm.train.objectives.table import make_objective

PARTS = ("visual_encoder", "connector", "language_model", "head")
HF_NAME_KEYS = {"visual_encoder": "model.visual_encoder.hf_name", "language_model": "model.language_model.hf_name"}
"""Part that may also be a folder or a name on the Hub -> its key."""

_compose_lock = Lock()
"""Hydra composes one configuration at a time in a process."""


@dataclass(frozen=True)
class Plan:
    """A shipped run and overrides of it; where a value is empty or None, the run's own stays."""

    run: str
    parts: dict[str, str | None] = field(default_factory=dict)
    """Part -> a packaged choice, a folder or a Hub name."""
    keys: dict[str, str | None] = field(default_factory=dict)
    """Key -> value, for keys that have their own field."""
    lines: str | None = None
    """Further overrides as typed, one a line."""

    def words(self) -> list[str]:
        """Return the overrides of the command line, in the order of the fields.

        Raises:
            ConfigError: a line is an option, or changes Hydra's own settings, or reads the environment.
        """
        parts = [_part_override(part, choice) for part, choice in _filled_fields(self.parts)]
        keys = [f"{key}={_quote(value)}" for key, value in _filled_fields(self.keys)]
        stripped = map(str.strip, (self.lines or "").splitlines())
        lines = [line for line in stripped if line and not line.startswith("#")]
        for line in lines:
            if line.startswith("-"):
                raise ConfigError(f"{line}: options are not taken here; write key=value")
        words = [*parts, *keys, *lines]
        for word in words:
            _check_own_key(word)
        for word in words:
            if "${" in word:  # it could read the environment, and an error would show the value
                raise ConfigError(f"{word}: ${{…}} is not filled in here; write the value itself")
        return words

    def compose_config(self) -> RunConfig:
        """Return the configuration, checked as on the command line, and what only that may do refused.

        Raises:
            ConfigError: with the message of the command line, or with what is taken there only.
        """
        if self.run not in run_names():
            raise ConfigError(f"choose a run: {', '.join(run_names())}")
        words = [open_mapping_key(word) for word in self.words()]
        with _compose_lock:
            store_schema()
            try:
                with initialize_config_module("vlm.config", version_base="1.3"):
                    composed = compose_overrides(self.run, words)
                    check_plain_values(composed)
                    config = make_run_config(composed)
                    # Before any name in it is looked up. The train tab bounds the run directory.
                    check_surface(config, allowed=("trainer.output_dir",))
                    check(config, make_objective(config))
            except (HydraException, OmegaConfBaseException, YAMLError, ConfigError) as error:
                raise ConfigError(explain(error)) from error
        return config

    def overridden_keys(self) -> list[str]:
        """Return the keys that the overrides set, in the form in which `with_config` passes them on."""
        return [word.split("=")[0].lstrip("+~").replace("/", ".") for word in self.words()]


def choices(part: str) -> list[str]:
    """Return the packaged choices of a part."""
    return packaged_names("vlm.config", f"model/{part}", ".yaml")


def _check_own_key(word: str) -> None:
    """Refuse an override of Hydra's own settings, which can run code when the command runs, or of another place.

    Hydra's own parser says what its key is; what it does not parse is refused with its message when it is composed.
    """
    try:
        override = OverridesParser.create().parse_override(open_mapping_key(word))
    except HydraException:
        return
    steps = re.split(r"[/.@:]", override.key_or_group)
    if override.package is not None or steps[0] == "hydra" or "_target_" in steps:
        raise ConfigError(f"{word}: Hydra's own settings can be set on the command line only")


def _filled_fields(values: dict[str, str | None]) -> list[tuple[str, str]]:
    """Return the fields with a value, and their values without surrounding white space."""
    return [(name, value.strip()) for name, value in values.items() if value and value.strip()]


def _part_override(part: str, choice: str) -> str:
    if choice in choices(part):
        return f"model/{part}={choice}"
    if part not in HF_NAME_KEYS:
        raise ConfigError(f"model/{part}={choice}: no such choice. Allowed are {', '.join(choices(part))}.")
    return f"{HF_NAME_KEYS[part]}={_quote(choice)}"


def _quote(value: str) -> str:
    """Return a field's value, quoted where it has characters that Hydra's grammar does not read as plain text."""
    if all(character.isalnum() or character in "/-_.:%+@?|" for character in value):
        return value
    # Backslashes are literal, except before a quotation mark.
    return '"' + re.sub(r'(?<!\\)(\\*)("|$)', lambda match: 2 * match[1] + (r"\"" if match[2] else ""), value) + '"'


def choose_run_folder(run: str, outputs: Path, shown: str | None = None) -> Path:
    """Return a directory for a run: the one that was shown to the user while it is unused, else a new one."""
    if shown is not None:
        folder = Path(shown)
        if folder.parent == outputs and re.fullmatch(rf"{re.escape(run)}-\d+-\d+", folder.name) and not folder.exists():
            return folder
    return outputs / f"{run}-{datetime.now():%Y%m%d-%H%M%S}"


def make_command(plan: Plan, folder: Path | None = None, processes: int = 1) -> list[str]:
    """Return the command that runs a plan with this Python, as words; without a folder, the overrides name it."""
    if processes < 1:
        raise ConfigError(f"processes: got {processes}; at least 1 is needed")
    launcher = ["-m", "vlm"]
    if processes > 1:
        launcher += ["launch", "--nproc", str(processes), "--"]
    words = plan.words()
    if folder is not None:
        words.append(f"trainer.output_dir={_quote(str(folder))}")
    return [sys.executable, *launcher, "-cn", plan.run, *words]


def format_for_shell(command: Sequence[str]) -> str:
    """Return a command to copy into a shell; after the run's name, each word has its own line."""
    start = command.index("-cn") + 2
    return " \\\n  ".join([shlex.join(command[:start]), *map(shlex.quote, command[start:])])
