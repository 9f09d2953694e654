"""From what the page's fields say to a checked configuration and the exact command that runs it.

Needs neither torch nor Gradio. Words stay a list from here to the process: nothing is ever read by a shell.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Lock

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlm.checks.compose import check_known_keys, check_required_values, open_mapping_key
from vlm.checks.fields import ConfigError
from vlm.checks.messages import explain
from vlm.checks.run import check
from vlm.config.packaged import packaged_names, run_names
from vlm.config.schema import RunConfig
from vlm.train.objectives.table import make_objective

PARTS = ("visual_encoder", "connector", "language_model", "head")
HF_NAME_KEYS = {"visual_encoder": "model.visual_encoder.hf_name", "language_model": "model.language_model.hf_name"}
"""Parts that may also be a folder or a name on the Hub, and the key that says so."""

_compose_lock = Lock()
"""Hydra composes one configuration at a time in a process."""


@dataclass(frozen=True)
class Plan:
    """A run as somebody wants it.

    Attributes:
        run: a shipped run.
        parts: part -> a packaged choice, or a folder or Hub name; none: as the run has it.
        keys: keys of their own fields -> value; empty ones and None: as the run has them.
        lines: further overrides as they are typed, one a line.
    """

    run: str
    parts: dict[str, str | None] = field(default_factory=dict)
    keys: dict[str, str | None] = field(default_factory=dict)
    lines: str | None = None

    def words(self) -> list[str]:
        """The overrides of the command line, in the order of the fields.

        Raises:
            ConfigError: a line is an option, or reaches for Hydra's own settings or the environment.
        """
        parts = [
            _part_override(part, choice.strip()) for part, choice in self.parts.items() if choice and choice.strip()
        ]
        keys = [f"{key}={_quote(value.strip())}" for key, value in self.keys.items() if value and value.strip()]
        lines = [line.strip() for line in (self.lines or "").splitlines()]
        typed = [line for line in lines if line and not line.startswith("#")]
        for line in typed:
            if line.startswith("-"):
                raise ConfigError(f"{line}: options are not taken here; a line is key=value")
            if line.lstrip("+~").partition("=")[0].partition("/")[0].partition(".")[0] in ("hydra", "_target_"):
                raise ConfigError(f"{line}: Hydra's own settings are set on the command line only")
        words = [*parts, *keys, *typed]
        for word in words:
            if "${" in word:  # it could read the environment, and an error would show what it holds
                raise ConfigError(f"{word}: ${{…}} is not filled in here; write the value itself")
        return words

    def compose_config(self) -> RunConfig:
        """The configuration, refused by the checks of the command line.

        Raises:
            ConfigError: with the key, what was got and what is allowed.
        """
        return compose_and_check(self.run, self.words())

    def overridden_keys(self) -> list[str]:
        """The keys that the overrides set, as `with_config` names them to those who act on a configuration."""
        return [word.split("=")[0].lstrip("+~").replace("/", ".") for word in self.words()]


def choices(part: str) -> list[str]:
    """The packaged choices of a part."""
    return packaged_names("vlm.config", f"model/{part}", ".yaml")


def _part_override(part: str, choice: str) -> str:
    if choice in choices(part):
        return f"model/{part}={choice}"
    if part not in HF_NAME_KEYS:
        raise ConfigError(f"model/{part}={choice}: no such choice. Allowed are {', '.join(choices(part))}.")
    return f"{HF_NAME_KEYS[part]}={_quote(choice)}"


def _quote(value: str) -> str:
    """A value of a field, quoted where Hydra's grammar would read more in it than its characters."""
    plain = all(character.isalnum() or character in "/-_.:%+@?|" for character in value)
    if plain:
        return value
    # Backslashes mean themselves, but for those before a quotation mark.
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + (r"\"" if found[2] else ""), value) + '"'


def compose_and_check(run: str, words: Sequence[str]) -> RunConfig:
    """The configuration of a shipped run under overrides, checked as on the command line.

    Raises:
        ConfigError: as the command line says it.
    """
    if run not in run_names():
        raise ConfigError(f"choose a run: {', '.join(run_names())}")
    with _compose_lock:
        ConfigStore.instance().store(name="schema", node=RunConfig)
        try:
            with initialize_config_module("vlm.config", version_base="1.3"):
                composed = compose(run, [open_mapping_key(word) for word in words])
                check_known_keys(composed)
                check_required_values(composed)
                config = OmegaConf.to_object(composed)
                assert isinstance(config, RunConfig)
                check(config, make_objective(config))
        except (HydraException, OmegaConfBaseException, YAMLError, ConfigError) as error:
            raise ConfigError(explain(error)) from error
    if config.dataset.allow_pipe:
        raise ConfigError("dataset.allow_pipe=true: a shell would run what records name; on the command line only")
    return config


def choose_run_folder(run: str, outputs: Path, before: str | None = None) -> Path:
    """A directory for a run: the one that was shown before while nothing uses it, else a new one."""
    if before is not None:
        shown = Path(before)
        if shown.parent == outputs and re.fullmatch(rf"{re.escape(run)}-\d+-\d+", shown.name) and not shown.exists():
            return shown
    return outputs / f"{run}-{datetime.now():%Y%m%d-%H%M%S}"


def make_command(plan: Plan, folder: Path | None = None, processes: int = 1) -> list[str]:
    """The words that run a plan: this Python, and one process for each GPU where there are several.

    Args:
        plan: what is run.
        folder: the run directory; None: the overrides name it.
        processes: how many.

    Raises:
        ConfigError: there is no such number of processes.
    """
    if processes < 1:
        raise ConfigError(f"processes: got {processes}, at least 1 is needed")
    launcher = ["-m", "vlm"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "vlm"]
    words = plan.words()
    if folder is not None:
        words.append(f"trainer.output_dir={_quote(str(folder))}")
    return [sys.executable, *launcher, "-cn", plan.run, *words]


def format_for_shell(command: Sequence[str]) -> str:
    """A command to copy into a shell, a word of its own line each from the run's name on."""
    at = command.index("-cn") + 2
    return " \\\n  ".join([shlex.join(command[:at]), *map(shlex.quote, command[at:])])
