"""`vlm completion SHELL`: the script by which a shell completes command lines; `vlm __complete`, which it asks.

The scripts are in `shells/`: each passes the words after `vlm`, the last one as far as it is typed, and gets one
candidate a line. Candidates that end in `=`, `.` or `/` continue. `completion_words` finds those of a training run.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module, resources

from vlm.cli.completion_words import find_paths, find_run_words, list_formats, matching
from vlm.config.choices import EVAL_METRICS, LOSS_METRICS
from vlm.config.packaged import packaged_names
from vlm.config.shown import PresentableParser

SHELLS = ("bash", "zsh", "fish")

GLOBAL_OPTIONS = ("-cn", "--config-dir", "--help", "--version")
"""What a command line may begin with besides a command."""

RUN_COMMANDS = ("submit", "check")
"""Commands whose words are a run's, besides their own options."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm completion`."""
    purpose = (
        "Print the script with which a shell completes commands, options, runs, groups, keys and paths. For bash and "
        'zsh, put eval "$(vlm completion SHELL)" into ~/.bashrc or ~/.zshrc.'
    )
    examples = (
        'eval "$(vlm completion bash)"',
        "vlm completion fish > ~/.config/fish/completions/vlm.fish",
    )
    parser = PresentableParser("vlm completion", "vlm completion SHELL", purpose, examples=examples)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    return parser


def main(words: Sequence[str]) -> None:
    """Print a shell's script."""
    shell = make_parser().parse_args(words).shell
    print(resources.files("vlm.cli").joinpath("shells", f"vlm.{shell}").read_text(encoding="utf-8"), end="")


def find_candidates(words: Sequence[str], commands: dict[str, str]) -> list[str]:
    """Return what the last word may become, in the order in which it is shown.

    Args:
        words: the words after `vlm`, the last one as far as it is typed.
        commands: command -> its module in `vlm.cli`.
    """
    first, current = words[0], words[-1]
    if len(words) == 1:
        found = matching(current, [*commands, *GLOBAL_OPTIONS])
        return found or find_run_words(words)
    if first not in commands:
        return find_run_words(words)
    if first == "launch" and "--" in words[:-1]:
        return find_run_words(words[words.index("--") + 1 :])
    if first == "data":
        return _find_data_words(words)
    if first == "models" and not current.startswith("-"):
        folders = ("model", "model/visual_encoder", "model/language_model")
        names = (name for folder in folders for name in packaged_names("vlm.config", folder, ".yaml"))
        return matching(current, sorted(names))
    if first in RUN_COMMANDS and not current.startswith("--"):
        return find_run_words(words[1:])
    return _options(first, words, commands)


def _options(command: str, words: Sequence[str], commands: dict[str, str]) -> list[str]:
    """Return candidates of a command with a parser: its options, their choices, and paths."""
    module = import_module(f"vlm.cli.{commands[command]}")
    make: Callable[[], argparse.ArgumentParser] | None = getattr(module, "make_parser", None)
    return find_paths(words[-1]) if make is None else find_parser_words(make(), words[1:])


def find_parser_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return candidates for the last word of a command line that a parser reads."""
    previous, current = (words[-2] if len(words) > 1 else ""), words[-1]
    actions = {option: action for action in parser._actions for option in action.option_strings}
    if previous in ("-cn", "--config-name"):
        return find_run_words(["-cn", current])
    option, equals, _ = current.partition("=")
    if equals and option in actions:
        return [f"{option}={value}" for value in find_parser_words(parser, [option, current.partition("=")[2]])]
    if previous in actions and actions[previous].nargs != 0:
        chosen = actions[previous].choices
        if previous == "--format" and chosen is None:
            return matching(current, list_formats())
        if previous == "--metrics":
            begun, comma, last = current.rpartition(",")
            return [f"{begun}{comma}{name}" for name in matching(last, (*EVAL_METRICS, *LOSS_METRICS[:1]))]
        return find_paths(current) if chosen is None else matching(current, [*map(str, chosen)])
    if current.startswith("-"):
        return matching(current, [name for name in actions if name != "-h"])
    positional = [action for action in parser._actions if not action.option_strings]
    if len(positional) == 1 and positional[0].choices is not None:
        return matching(current, [*map(str, positional[0].choices)])
    if any("inference." in str(action.metavar) for action in positional) and current.startswith("inf"):
        return find_run_words(["-cn", "base", current])
    return find_paths(current)


def _find_data_words(words: Sequence[str]) -> list[str]:
    """Return candidates for `vlm data TOOL …`."""
    from vlm.cli.data import TOOLS

    if len(words) == 2:
        return matching(words[-1], list(TOOLS))
    is_run = "-cn" in words or words[-1].startswith("-c")
    return find_run_words(words[2:]) if is_run else find_paths(words[-1])
