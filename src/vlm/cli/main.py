"""The console script `vlm`: subcommands, the overview, and the training entry for everything else."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vlm.cli.collection import hush_device_notes, hush_leak_reports, rare_collection
from vlm.cli.overview import FIRST_STEPS, overview
from vlm.cli.pipes import end_with_pipes
from vlm.cli.unknown_command import describe_unknown_command
from vlm.config.shown import present_what_is_printed, presentable

COMMANDS = {
    "check": "check",
    "generate": "generate",
    "chat": "chat",
    "predict": "predict",
    "eval": "evaluate",
    "runs": "runs",
    "compare": "compare",
    "report": "report",
    "compare-models": "compare_models",
    "serve": "serve",
    "web": "web",
    "data": "data",
    "launch": "launch",
    "submit": "submit",
    "watch": "watch",
    "models": "models",
    "import": "import_checkpoint",
    "export": "export_checkpoint",
    "merge-lora": "merge_lora",
    "average": "average",
    "verify": "verify",
    "push-to-hub": "push_to_hub",
    "doctor": "doctor",
    "completion": "completion",
}
"""Subcommand -> its module in `vlm.cli`, whose `main` takes the words after it."""

STOPPED_STATUS = 130
"""The exit status of a command that Ctrl-C ended: 128 plus the number of SIGINT."""

SELF_REPORTING_COMMANDS = ("data", "models")
"""Subcommands that print their own messages: any other error of theirs is a bug, and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that the command line names; any other command line is a training run.

    Where a subcommand raises `ValueError` or `OSError`, the process ends with the error's message. Training runs and
    `SELF_REPORTING_COMMANDS` are excepted. A command ends without a message when the reader of its output has gone;
    a training run continues.
    """
    if argv is None:  # the process is this command's
        hush_leak_reports()
        os.environ["MPLBACKEND"] = "agg"  # plots are files; Jupyter names a backend that only its kernel may have
    present_what_is_printed()
    hush_device_notes()
    with end_with_pipes(), rare_collection():
        _run_command(list(sys.argv[1:] if argv is None else argv), owns_process=argv is None)


def _run_command(words: list[str], *, owns_process: bool) -> None:
    if words[:1] and words[0].startswith(("--local_rank", "--local-rank")):  # of DeepSpeed's launcher
        from vlm.checks.compose import strip_launcher_arguments

        words = strip_launcher_arguments(words)
    if not words:
        print(FIRST_STEPS)
    elif words in (["--help"], ["-h"], ["help"]):
        print(overview())
    elif words == ["--version"]:
        from importlib.metadata import version

        print(version("small-vlm"))
    elif words[0] == "__complete":  # asked by the scripts of `vlm completion`
        from vlm.cli.completion import find_candidates

        print("\n".join(find_candidates(words[1:] or [""], COMMANDS)))
    elif words and words[0] in COMMANDS:
        run = import_module(f"vlm.cli.{COMMANDS[words[0]]}").main
        try:
            run(words[1:])
        except (ValueError, OSError) as error:
            if words[0] in SELF_REPORTING_COMMANDS:
                raise
            sys.exit(f"vlm {words[0]}: {presentable(error)}")
        except KeyboardInterrupt:  # of a command that has nothing more to say
            print(f"\nvlm {words[0]}: stopped", file=sys.stderr)
            sys.exit(STOPPED_STATUS)
    elif message := describe_unknown_command(words, list(COMMANDS)):
        sys.exit(f"vlm: {presentable(message)}")
    else:
        try:
            import_module("vlm.cli.train").main(words, owns_process=owns_process)
        except KeyboardInterrupt:  # before the run listens to signals
            from vlm.clusters.processes import SAVED_EXIT_CODE

            sys.exit(SAVED_EXIT_CODE)
