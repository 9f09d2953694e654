"""Folders of a sweep (`--multirun`): one for the sweep, and in it one for each run, named after what differs.

`base.yaml` uses both names in `hydra.sweep`. Imports no torch.
"""

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vlm.checks.fields import ConfigError
from vlm.config.packaged import read_run_description
from vlm.config.secrets import is_secret_key, mask
from vlm.config.short_names import folder_name

MULTIRUN_FILE = "multirun.yaml"
"""The file that Hydra writes into the folder of a sweep: its own settings, with the whole command line."""


def register_resolvers() -> None:
    """Register the resolvers for a run's description, for the folder of a sweep and for the name of a run in it."""
    OmegaConf.register_new_resolver("run_description", lambda run: fill(read_run_description(run), 118), replace=True)
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True)
    OmegaConf.register_new_resolver(
        "sweep_job", lambda: job_name(HydraConfig.get().overrides.task, sys.argv[1:]), replace=True
    )


def _sweep_folder(output_dir: str | None, name: str, time: str) -> str:
    """Return the folder of a sweep; called before anything is written.

    Raises:
        ConfigError: there are several ranks, each of which would name the sweep's folder after another time.
    """
    if output_dir is None and (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            f"--multirun on {ranks} ranks: they have to agree on the folder of the sweep; add "
            f"trainer.output_dir=outputs/{name}-sweep"
        )
    return output_dir or f"outputs/{name}-sweep-{time}"


def job_name(overrides: Iterable[str], words: Iterable[str]) -> str:
    """Return the name of a run's folder: the values that the sweep set, with short keys; `.` if it set none.

    Args:
        overrides: the overrides of the run.
        words: the command line of the sweep; keys with a single value apply to all runs.
    """
    parse = OverridesParser.create().parse_overrides
    given = parse([word for word in words if "=" in word and not word.startswith("-")])
    fixed = {override.get_key_element() for override in given if not override.is_sweep_override()}
    own = [override for override in parse(list(overrides)) if override.get_key_element() not in fixed]
    values = {override.get_key_element().lstrip("+~"): override.get_value_element_as_str() for override in own}
    return folder_name({key: value for key, value in values.items() if not is_secret_key(key)})


def is_sweep() -> bool:
    """Return whether the current configuration belongs to a run of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def place_run(composed: DictConfig) -> None:
    """Give a run of a sweep its folder as `trainer.output_dir`, and mask secrets in what Hydra wrote next to it."""
    sweep = HydraConfig.get().sweep
    composed.trainer.output_dir = str(Path(sweep.dir) / sweep.subdir)
    file = Path(sweep.dir) / MULTIRUN_FILE
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        if (masked := mask(text)) != text:
            file.write_text(masked, encoding="utf-8")


def words_of_run(words: Iterable[str]) -> list[str]:
    """Return the command line that repeats one run of a sweep, made from the sweep's command line.

    Options of the sweep and of its sweeper are left out; the overrides of the run come last.
    """
    options = [word for word in words if word not in ("-m", "--multirun") and ("=" not in word or word[0] == "-")]
    own = [word for word in HydraConfig.get().overrides.task if not word.startswith("trainer.output_dir=")]
    sweep = HydraConfig.get().sweep
    return [*options, *own, f"trainer.output_dir={Path(sweep.dir) / sweep.subdir}"]


def worst_value() -> float:
    """Return the value of a failed run for a sweeper that searches, since Optuna's gives up at NaN."""
    return -math.inf if _direction() == "maximize" else math.inf


def _direction() -> str | None:
    direction = HydraConfig.get().sweeper.get("direction")
    return None if direction is None else str(direction).rpartition(".")[2]


def check_direction(key: str | None, *, lower_is_better: bool) -> None:
    """Refuse a sweeper whose direction does not fit the metric of its runs.

    Raises:
        ConfigError: `hydra.sweeper.direction` is not the direction of the metric.
    """
    needed = "minimize" if lower_is_better else "maximize"
    direction = _direction()
    if direction is not None and direction != needed:
        raise ConfigError(
            f"hydra.sweeper.direction={direction}: {key or 'eval_loss'} is better when it is "
            f"{'lower' if lower_is_better else 'higher'}; give hydra.sweeper.direction={needed}"
        )
