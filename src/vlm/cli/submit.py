"""`vlm submit -cn RUN nodes=4 …`: a run as a job of a cluster: its file, and, with `--submit`, its place in the queue.

The configuration is checked here as a run checks it, so that a job does not wait for hours to be refused in a second.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import zip_longest
from pathlib import Path

from vlm.clusters.jobs import COMMON_KEYS, TARGETS, read_job, render
from vlm.config.shown import PresentableParser

EPILOG = f"""\
Keys of every job: {", ".join(COMMON_KEYS)} (GPUs per node; seconds of warning before the time limit; shell commands to
run first). Keys of each target:
{chr(10).join(f"  {name:<11} {', '.join(target.keys)}" for name, target in TARGETS.items())}
All other words belong to the run, as in vlm -cn RUN …. See docs/clusters.md.
"""


def main(argv: Sequence[str]) -> None:
    """Write the job file, and hand it in where asked."""
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    job, run = read_job(words, args.target)
    name = find_run_name(run)
    if name is None:
        parser.error("the run is missing: add -cn RUN. vlm --help lists the runs")
    job.name = job.name or "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    if not any(word.startswith("trainer.output_dir=") for word in run):  # the same one each time the job is queued
        root = "/outputs" if args.target == "kubernetes" else "outputs"
        run.append(f"trainer.output_dir={root}/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if not args.no_check:
        check_run(run)
    file = args.output or Path(f"{job.name}{TARGETS[args.target].suffix}")
    file.write_text(render(job, args.target, run, file, f"vlm submit {shlex.join(argv)}"), encoding="utf-8")
    print(f"Wrote {file}.")
    submit(args.target, file, hand_in=args.submit)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options; keys and the run's words are none."""
    parser = PresentableParser(
        "vlm submit",
        "vlm submit [options] -cn RUN nodes=N [key=value …]",
        "Write the job file that trains a run on a cluster, and submit it if you ask for that.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=(
            "vlm submit --target slurm -cn finetune-llava nodes=4 gpus=8 time=24:00:00 dataset.path=train.json",
            "vlm submit --target slurm --submit -cn pretrain-smol nodes=1 dataset.path=captions.json",
        ),
    )
    parser.add_argument("--target", choices=list(TARGETS), default="slurm", help="the scheduler (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the job file (default: named after the run)")
    parser.add_argument("--submit", action="store_true", help="also submit the job")
    parser.add_argument(
        "--no-check", action="store_true", help="skip the check of the run, for files that exist on the cluster only"
    )
    return parser


def find_run_name(words: Sequence[str]) -> str | None:
    """Return the configuration's name in the words of a run; None if there is none."""
    for word, following in zip_longest(words, words[1:]):
        if word in ("-cn", "--config-name"):
            return following or None
        if word.startswith("--config-name="):
            return word.partition("=")[2]
    return None


def check_run(words: Sequence[str]) -> None:
    """Refuse what a run with these words would refuse before it imports torch."""
    from vlm.checks.compose import with_config
    from vlm.train.objectives.table import make_objective

    with_config(words, lambda config, name, overrides: None, make_objective, trains=True)


def submit(target: str, file: Path, *, hand_in: bool) -> None:
    """Hand a job file in, or say how.

    Raises:
        ValueError: the target has no queue, or its command is not on this machine.
    """
    command = [*TARGETS[target].submit, str(file)]
    if not TARGETS[target].submit:
        how = f"Start it on each node: HEAD=<first node> bash {shlex.quote(str(file))}"
        if hand_in:
            raise ValueError(f"--submit: --target {target} has no queue. {how}")
        print(how)
    elif not hand_in:
        print(f"Hand it in:  {shlex.join(command)}")
    elif shutil.which(command[0]) is None:
        raise ValueError(f"--submit: there is no {command[0]} on this machine; where there is: {shlex.join(command)}")
    else:
        sys.exit(subprocess.run(command, check=False).returncode)
