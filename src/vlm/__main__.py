"""The Hydra entry: `python -m vlm`, `vlm`, `deepspeed --module vlm` and `torchrun -m vlm` all come here.

Refuses what it can before importing torch; then hands a plain `RunConfig` to `vlm.train.run`.
"""

import logging
import os
import re
import sys
from difflib import get_close_matches
from importlib import resources

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vlm.config.check import ConfigError, check
from vlm.config.schema import RunConfig, key_names

NOT_RUNS = ("base",)


def main(argv: list[str] | None = None) -> None:
    """Compose the configuration that the command line asks for, check it, and run it."""
    words = take_launcher_words(sys.argv[1:] if argv is None else argv)
    sys.argv = [sys.argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing: `explain` says it better
    ConfigStore.instance().store(name="schema", node=RunConfig)
    refused: list[Exception] = []

    def job(composed: DictConfig) -> None:
        try:
            _run(composed)
        except (OmegaConfBaseException, ConfigError) as error:
            refused.append(error)  # Hydra would print the whole command line before it

    try:
        hydra.main(version_base="1.3", config_path="pkg://vlm.config", config_name="base")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        refused.append(error)
    if refused:
        sys.exit(f"vlm: {explain(refused[0])}")


def _run(composed: DictConfig) -> None:
    """From the composed configuration on, everything is plain dataclasses."""
    hydra_config = HydraConfig.get()
    name = hydra_config.job.config_name or "base"
    if name in NOT_RUNS:
        raise ConfigError(f"choose a run: -cn {'|'.join(run_names())}, or a YAML of your own with --config-dir")
    need_values(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    check(config)
    overrides = [override.split("=")[0].lstrip("+~").replace("/", ".") for override in hydra_config.overrides.task]
    logging.getLogger("vlm").setLevel(logging.INFO)
    from vlm.train.run import run  # torch comes with it

    try:
        run(config, name, overrides)
    except ValueError as error:
        if is_users(error):
            raise ConfigError(str(error)) from error
        raise


def need_values(composed: DictConfig) -> None:
    """Raise ConfigError where a key that must be given is not.

    Raises:
        ConfigError: names all such keys.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: a value is needed, for example {missing[0]}=…")


def is_users(error: BaseException) -> bool:
    """Whether an error was raised by this package about the user's input, and needs no traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("vlm.")


def take_launcher_words(words: list[str]) -> list[str]:
    """The command line without `--local_rank=N`, which launchers add and Hydra refuses; it goes to the environment."""
    kept = []
    rest = iter(words)
    for word in rest:
        if match := re.fullmatch(r"--local[-_]rank(?:=(\d+))?", word):
            os.environ.setdefault("LOCAL_RANK", match.group(1) or next(rest))
        else:
            kept.append(word)
    return kept


def run_names() -> list[str]:
    """The shipped runs."""
    files = resources.files("vlm.config").iterdir()
    names = sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
    return [name for name in names if name not in NOT_RUNS]


def explain(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's in the user's terms: the key, what was got, what is allowed."""
    if isinstance(error, ConfigError):
        return str(error)
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(one) for one in chain)
    if isinstance(error, MissingMandatoryValue):
        return text
    if unknown := re.search(r"Key '([^']+)' (?:not in|is not in struct)", text):
        where = re.search(r"full_key: (\S+)", text)
        key = where.group(1) if where else unknown.group(1)
        parent, _, name = key.rpartition(".")
        allowed = key_names(parent)
        near = get_close_matches(name, allowed, n=1)
        hint = f" Did you mean {parent + '.' if parent else ''}{near[0]}?" if near else ""
        listing = f" Allowed there: {', '.join(allowed)}." if allowed and len(allowed) <= 12 else ""
        if not allowed and ".options" in key:
            listing = f" Declare it in the connector's YAML, or write +{key}=…."
        return f"{key}: no such key.{hint}{listing}"
    lines = next(
        (str(one) for one in chain if "full_key" in str(one)), str(error).split("Config search path")[0]
    ).splitlines()
    key = next((line.split(": ", 1)[1] for line in lines if line.strip().startswith("full_key")), None)
    kept = [line for line in lines if not re.match(r"\s*(full_key|reference_type|object_type)", line)]
    return f"{key}: {' '.join(kept)}" if key else "\n".join(kept).strip()


if __name__ == "__main__":
    from vlm.cli import main as cli

    cli()
