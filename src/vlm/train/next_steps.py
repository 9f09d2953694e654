"""What one would do next with a finished model, as command lines to copy, with the paths of this run."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from vlm.config.packaged import run_names
from vlm.config.schema import RunConfig
from vlm.runs.read import REPORT_FILE

FIRST_STAGE, SECOND_STAGE = "pretrain-", "finetune-"
"""How the names of packaged runs begin, of which one continues the other."""


def describe_next_steps(commands: Mapping[str, str], config: RunConfig, name: str, final: Path) -> str:
    """Return the lines that a run ends with: its report, and a command for each thing to do next.

    Args:
        commands: purpose -> command, see `Objective.next_commands`.
        config: the run's configuration.
        name: the configuration's name.
        final: the folder of the finished model.
    """
    report = shlex.quote(str(final.parent / REPORT_FILE))
    lines = {"look at it": report, **_second_stage(config, name, final), **commands}
    width = max(map(len, lines)) + 2
    return "\n".join(f"  {purpose:<{width}}{command}" for purpose, command in lines.items())


def _second_stage(config: RunConfig, name: str, final: Path) -> dict[str, str]:
    """Return the command of the stage that continues a first one; none for other runs."""
    second = name.replace(FIRST_STAGE, SECOND_STAGE, 1)
    if not name.startswith(FIRST_STAGE) or second not in run_names():
        return {}
    words = ["vlm", "-cn", second, override("trainer.from_pretrained", str(final)), "dataset.path=RECORDS"]
    if config.dataset.image_folder:
        words.append(override("dataset.image_folder", config.dataset.image_folder))
    if config.trainer.use_cpu:
        words.append("trainer.use_cpu=true")
    return {"finetune it": shlex.join(words)}


def override(key: str, value: str) -> str:
    """Return a word of the command line that sets a key to a text, in quotation marks where Hydra wants them."""
    if re.fullmatch(r"[\w./:+-]+", value, re.ASCII):
        return f"{key}={value}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"
