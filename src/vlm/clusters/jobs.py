"""Job files for schedulers, from the templates in `templates/`. Imports the standard library only.

Slurm jobs are plain sbatch scripts and not submitit's: that pickles a Python function and queues it again on a signal
of its own, while these jobs are queued again on an exit code, run one launcher a node, and are files to read and edit.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from string import Template

from vlm.clusters.processes import GUARD_EXIT_CODE, SAVED_EXIT_CODE


@dataclass(frozen=True)
class Target:
    """A kind of job file: its template, the end of its name, the command that hands it in, and keys of its own."""

    template: str
    suffix: str
    submit: tuple[str, ...]
    keys: tuple[str, ...]


SLURM_KEYS = {
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "cpus": "cpus-per-task",
    "memory": "mem",
}
"""Key -> the option of sbatch."""

TARGETS = {
    "slurm": Target("slurm.sh", ".sbatch", ("sbatch",), tuple(SLURM_KEYS)),
    "torchrun": Target("torchrun.sh", ".sh", (), ("port", "restarts")),
    "skypilot": Target("skypilot.yaml", ".sky.yaml", ("sky", "jobs", "launch"), ("accelerator", "port", "restarts")),
    "kubernetes": Target("kubernetes.yaml", ".k8s.yaml", ("kubectl", "apply", "-f"), ("image", "volume", "port")),
}


@dataclass
class Job:
    """The resources of a job; keys of the command line have these names. None: not asked for."""

    name: str | None = None
    nodes: int = 1
    gpus: int = 8
    notice: int = 120
    setup: str = ""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus: int | None = None
    memory: str | None = None
    accelerator: str = "H100"
    image: str = "small-vlm:latest"
    volume: str = "outputs"
    port: int = 29500
    restarts: int = 3


COMMON_KEYS = ("name", "nodes", "gpus", "notice", "setup")
JOB_KEYS = tuple(field.name for field in fields(Job))


class JobTemplate(Template):
    """A template whose names stand as `@{name}`, since `$` is the shell's."""

    delimiter = "@"


def read_job(words: Sequence[str], target: str) -> tuple[Job, list[str]]:
    """Split `key=value` words into a job and the words of its run.

    Raises:
        ValueError: a value is of the wrong kind, or the target does not take a key.
    """
    job, run = Job(), []
    allowed = (*COMMON_KEYS, *TARGETS[target].keys)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in JOB_KEYS:
            run.append(word)
            continue
        if key not in allowed:
            raise ValueError(f"{key}={value}: --target {target} does not support it; allowed are {', '.join(allowed)}")
        if isinstance(getattr(job, key), int) or key == "cpus":
            if not value.isdigit() or (int(value) == 0 and key != "restarts"):
                raise ValueError(f"{key}={value}: a whole number from 1 on is needed")
            setattr(job, key, int(value))
        else:
            setattr(job, key, value)
    if job.name is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job.name):
        raise ValueError(f"name={job.name}: lower-case letters, digits and hyphens are allowed")
    return job, run


def render(job: Job, target: str, words: Sequence[str], file: Path, command: str) -> str:
    """Return the job file of a run.

    Args:
        job: its resources, with a name.
        target: a name of `TARGETS`.
        words: the run's words, as on its command line.
        file: where the job file will be.
        command: what wrote it.
    """
    template = JobTemplate(resources.files("vlm.clusters").joinpath("templates", TARGETS[target].template).read_text())
    slurm = {option: getattr(job, key) for key, option in SLURM_KEYS.items()} | {"gpus-per-node": job.gpus}
    line_break = "\n" + " " * {"kubernetes": 14, "skypilot": 2}.get(target, 0)
    no_setup = "# setup='source …' of vlm submit puts commands here, such as those that set NCCL up"
    values = {field.name: getattr(job, field.name) for field in fields(job)} | {
        "resources": "\n".join(f"#SBATCH --{option}={value}" for option, value in slurm.items() if value is not None),
        "setup": (job.setup or no_setup).replace("\n", line_break),
        "step": "" if job.cpus is None else f" --cpus-per-task={job.cpus}",  # srun does not take it from sbatch
        "launch": shlex.join([sys.executable, "-m", "vlm", "launch"]),
        "words": shlex.join(words).replace("\n", line_break),
        "file": shlex.quote(str(file)),
        "command": command.replace("\n", " "),
        "saved": SAVED_EXIT_CODE,
        "guard": GUARD_EXIT_CODE,
        "backoff": 6 * job.nodes,
    }
    return template.substitute(values)
