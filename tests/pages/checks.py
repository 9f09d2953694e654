"""Checks of commands, each by what would read it: argparse, Hydra and a run's own early checks, files, the Makefile.

`check_command` says whether a command would be understood; it runs nothing that takes longer. To let pages name
another program, add a row to `PROGRAMS`.
"""

import argparse
import ast
import importlib.util
import json
import os
import pickle
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from importlib import import_module
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from tests.fixtures import GROUPS, compose_groups, parse_word
from tests.pages.blocks import ROOT, Command
from tests.pages.place import Place
from vlm.checks import compose
from vlm.checks.compose import open_mapping_key, strip_launcher_arguments
from vlm.cli import main as command_line
from vlm.cli.model_options import read_inference_settings
from vlm.config.packaged import run_names
from vlm.config.shown import PresentableParser


class MisunderstoodError(Exception):
    """A command would be refused, with what is said of it."""


class UnderstoodError(BaseException):
    """A command has been understood; it goes no further. No handler of errors takes it for one."""


def check_command(command: Command, place: Place) -> None:
    """Check a command of a page.

    Raises:
        MisunderstoodError: it would be refused, or nothing here understands it.
    """
    program, *words = command.words
    check_program = PROGRAMS.get(Path(program).name if program.startswith(".venv") else program)
    if check_program is None:
        raise MisunderstoodError(f"{command}\nno checker understands {program}; add it to PROGRAMS in {__file__}")
    try:
        check_program(words, place)
    except MisunderstoodError as error:
        raise MisunderstoodError(f"{command}\n{error}") from error


def check_vlm(words: Sequence[str], place: Place) -> None:
    """Check what stands behind `vlm`: a subcommand by its parser, a run by its composition and its early checks."""
    words = place.provide(words)
    if importlib.util.find_spec("optuna") is None:  # of an extra that not everybody has
        words = [word for word in words if not re.search(r"^hydra[/.]sweeper|=.*\binterval\(", word)]
    if words[:1] == ["launch"]:
        check_launch(words[1:], place)
        return
    with understanding():
        command_line.main(words)


def check_launch(words: Sequence[str], place: Place) -> None:
    """Check `vlm launch [options] -- RUN`."""
    cut = words.index("--") if "--" in words else len(words)
    with understanding():
        command_line.main(["launch", *words[:cut], "--", "-cn", "x"])
    check_vlm(words[cut + 1 :], place)


def check_python(words: Sequence[str], place: Place) -> None:
    """Check `python -m MODULE …` and `python FILE …`."""
    if words[:2] == ["-m", "vlm"]:
        check_vlm(words[2:], place)
    elif words[:1] == ["-m"] and words[1] in FOREIGN_OPTIONS:
        check_foreign(words[1])(words[2:], place)
    elif words[:1] == ["-m"]:
        if importlib.util.find_spec(words[1]) is None:
            raise MisunderstoodError(f"there is no module {words[1]}")
        check_script(lambda: runpy.run_module(words[1], run_name="__main__"), words[1:])
    elif (file := ROOT / words[0]).is_file():
        check_script(lambda: runpy.run_path(str(file), run_name="__main__"), words)
    elif (file := place.folder / words[0]).is_file():
        compile(file.read_text(encoding="utf-8"), words[0], "exec")
    else:
        raise MisunderstoodError(f"there is no file {words[0]}")


def check_script(run: Callable[[], object], words: Sequence[str]) -> None:
    """Run a program up to where it has read its words."""
    with understanding(argparse.ArgumentParser, PresentableParser), patch.object(sys, "argv", list(words)):
        run()


def check_deepspeed(words: Sequence[str], place: Place) -> None:
    """Check `deepspeed [options] --module vlm …`."""
    args = parse(deepspeed_parser(), words)
    if args.user_script != "vlm" or not args.module:
        raise MisunderstoodError("deepspeed [options] --module vlm …")
    check_vlm(args.user_args, place)


def check_torchrun(words: Sequence[str], place: Place) -> None:
    """Check `torchrun [options] -m vlm …`."""
    from torch.distributed.run import get_args_parser

    args = parse(get_args_parser(), words)
    if args.training_script != "vlm" or not args.module:
        raise MisunderstoodError("torchrun [options] -m vlm …")
    check_vlm(args.training_script_args, place)


def check_accelerate(words: Sequence[str], place: Place) -> None:
    """Check `accelerate launch [options] -m lmms_eval …`."""
    from accelerate.commands.launch import launch_command_parser

    if words[:1] != ["launch"]:
        raise MisunderstoodError("accelerate launch …")
    args = parse(launch_command_parser(), words[1:])
    check_python(["-m", args.training_script, *args.training_script_args], place)


def check_make(words: Sequence[str], place: Place) -> None:
    """Check that targets and variables are in the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        if not re.search(rf"^{name} \??=" if equals else rf"^{name}:.*##", text, re.MULTILINE):
            raise MisunderstoodError(f"the Makefile has no {'variable' if equals else 'target'} {name}")


def check_pip(words: Sequence[str], place: Place) -> None:
    """Check that this package has the extras that are installed, and that nothing else is."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    action, *rest = words
    for word in rest:
        named = re.fullmatch(r"(?:small-vlm|\.|dist/[\w.*…-]+\.whl)(?:\[([\w,]+)\])?", word)
        unknown = set((named[1] or "").split(",")) - {"", *extras} if named else {word}
        if action != "install" or (unknown and word not in ("-e", "--no-build-isolation", "-U", "-q")):
            raise MisunderstoodError(f"pip {action}: {', '.join(unknown)}: neither an extra nor an option known here")


def check_push(words: Sequence[str], place: Place) -> None:
    """Check `push-to-hub`, which is a program of its own too."""
    check_vlm(["push-to-hub", *words], place)


def check_hf(words: Sequence[str], place: Place) -> None:
    """Check a command of huggingface_hub's own program."""
    from huggingface_hub.cli import hf

    with understanding(), patch.object(sys, "argv", ["hf", *words, "--help"]):
        hf.main()


def check_foreign(program: str) -> Callable[[Sequence[str], Place], None]:
    """Return a check of a program that is not installed here: its options are among those known of it."""

    def check_options(words: Sequence[str], place: Place) -> None:
        for word in words:
            if word.startswith("-") and word.partition("=")[0] not in FOREIGN_OPTIONS[program]:
                raise MisunderstoodError(f"{program}: {word} is not known here; see FOREIGN_OPTIONS")

    return check_options


def check_vllm(words: Sequence[str], place: Place) -> None:
    """Check `vllm serve`."""
    if words[:1] != ["serve"]:
        raise MisunderstoodError("vllm serve …")
    check_foreign("vllm serve")(words[1:], place)


def check_curl(words: Sequence[str], place: Place) -> None:
    """Check that an address is one of the endpoint's, and that what is sent is JSON."""
    from vlm.inference.serving import app

    check_foreign("curl")(words, place)
    path = next((match[1] for word in words if (match := re.fullmatch(r"https?://[^/]+(/.*)", word))), None)
    if path is None or f'"{path}"' not in Path(app.__file__).read_text(encoding="utf-8"):
        raise MisunderstoodError(f"{path}: not an address of vlm serve")
    for option, value in pairwise(words):
        if option in ("-d", "--data"):
            json.loads(value)


def check_docker(words: Sequence[str], place: Place) -> None:
    """Check that a build has the Dockerfile's arguments, and what runs in a container of this package's image."""
    action, *rest = words
    parser = argparse.ArgumentParser("docker", allow_abbrev=False)
    if action == "build":
        parser.add_argument("-t", required=True)
        parser.add_argument("--build-arg", action="append", default=[])
        parser.add_argument("folder", choices=["."])
        given = {word.partition("=")[0] for word in parse(parser, rest).build_arg}
        known = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
        if unknown := given - known:
            raise MisunderstoodError(f"docker build: the Dockerfile has no argument {', '.join(unknown)}")
    elif action == "run":
        for option in ("--gpus", "--shm-size", "-v"):
            parser.add_argument(option, action="append")
        parser.add_argument("--rm", action="store_true")
        parser.add_argument("image", choices=["small-vlm", "small-vlm:cuda"])
        parser.add_argument("command", nargs=argparse.REMAINDER)
        check_command(Command("", 0, (), tuple(parse(parser, rest).command)), place)
    else:
        raise MisunderstoodError(f"docker {action}: build and run are known here")


def check_exactly(*commands: str) -> Callable[[Sequence[str], Place], None]:
    """Return a check of a command that has few forms."""

    def check_form(words: Sequence[str], place: Place) -> None:
        if shlex.join(words) not in commands:
            raise MisunderstoodError(f"allowed here: {', '.join(commands)}")

    return check_form


FOREIGN_OPTIONS = {
    "lmms_eval": ("--model", "--model_args", "--tasks", "--batch_size", "--output_path", "--limit", "--log_samples"),
    "vllm serve": ("--limit-mm-per-prompt", "--enable-lora", "--max-lora-rank", "--lora-modules", "--port"),
    "sglang.launch_server": ("--model-path", "--chat-template", "--port"),
    "curl": ("-H", "-d", "-s", "--data", "--header"),
}
"""A program that this environment lacks -> the options of it that pages may name, looked up in its source."""

USERS_OF_RUNS = [
    f"vlm.cli.{path.stem}"
    for path in sorted((ROOT / "src" / "vlm" / "cli").glob("*.py"))
    if re.search(r"^from vlm\.checks\.compose import .*with_config", path.read_text(encoding="utf-8"), re.MULTILINE)
]
"""Modules of the command line that compose runs."""

PROGRAMS: dict[str, Callable[[Sequence[str], Place], None]] = {
    "vlm": check_vlm,
    "push-to-hub": check_push,
    "python": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "make": check_make,
    "pip": check_pip,
    "hf": check_hf,
    "vllm": check_vllm,
    "curl": check_curl,
    "docker": check_docker,
    "git": check_exactly("clone '<this' 'repository>' small-vlm"),
    "cd": check_exactly("small-vlm"),
    ".": check_exactly(".venv/bin/activate"),
}
"""The first word of a command -> its check."""


@contextmanager
def understanding(*parsers: type[argparse.ArgumentParser]) -> Iterator[None]:
    """Let commands run up to where their words are understood, and raise `MisunderstoodError` with what is refused.

    Args:
        parsers: classes of the parsers that read a whole command line (`PresentableParser`; Hydra's is another).
    """
    said = StringIO()
    environment, words = dict(os.environ), sys.argv
    try:
        with _stopped_when_parsed(parsers or (PresentableParser,)), _composed_quickly(), ExitStack() as streams:
            streams.enter_context(redirect_stderr(said))
            streams.enter_context(redirect_stdout(said))
            yield
    except UnderstoodError:
        pass
    except SystemExit as ended:
        if ended.code not in (None, 0):
            said.write(ended.code if isinstance(ended.code, str) else "")
            raise MisunderstoodError(said.getvalue()) from ended
    except (ValueError, OSError) as error:
        raise MisunderstoodError(str(error)) from error
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        sys.argv = words


@contextmanager
def _stopped_when_parsed(kinds: tuple[type[argparse.ArgumentParser], ...]) -> Iterator[None]:
    """Let parsers stop the program once they have read a whole command line."""

    def stopping(method: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        def parse_and_stop(parser: argparse.ArgumentParser, *given: object) -> argparse.Namespace:
            args = method(parser, *given)
            if type(parser) not in kinds:
                return args
            if hasattr(args, "overrides") and hasattr(args, "temperature"):
                read_inference_settings(args)
            raise UnderstoodError

        return parse_and_stop

    methods = ("parse_args", "parse_intermixed_args")
    stopped = {name: stopping(getattr(argparse.ArgumentParser, name)) for name in methods}
    with patch.multiple(argparse.ArgumentParser, **stopped):
        yield


@contextmanager
def _composed_quickly() -> Iterator[None]:
    """Let runs be composed once for each choice of groups, checked as ever, and go no further."""
    for module in USERS_OF_RUNS:
        import_module(module)  # before the patch, which they would keep
    with_config, compose_and_act = compose.with_config, compose._compose_and_act

    def check_alone(words: Sequence[str] | None, action: object, *given: Any, **named: Any) -> object:
        """Compose and check as the real one does, and stop where a run would begin."""
        return with_config(words, _stop, *given, **named)

    def act_on_cached(words: Sequence[str] | None, action: Callable[[Any], Any]) -> object:
        """Compose quickly; where that is refused, let the real one say why."""
        known = strip_launcher_arguments(list(sys.argv[1:] if words is None else words))
        if known[:1] == ["-cn"] and known[1:2] and all("=" in word for word in known[2:]):
            if known[1] not in run_names():
                raise MisunderstoodError(f"-cn {known[1]}: no such run")
            with suppress(Exception), _as_in_hydra(known[1], known[2:]):
                return action(compose_once(known[1], known[2:]))
        return compose_and_act(words, action)

    users = [module for module in list(sys.modules.values()) if vars(module).get("with_config") is with_config]
    with ExitStack() as patches:
        for module in users:
            patches.enter_context(patch.object(module, "with_config", check_alone))
        patches.enter_context(patch.object(compose, "_compose_and_act", act_on_cached))
        yield


def _stop(*_: object) -> None:
    raise UnderstoodError


@contextmanager
def _as_in_hydra(name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Let what Hydra says of itself be that of a run with these overrides."""
    settings = pickle.loads(_hydra_settings())
    OmegaConf.set_readonly(settings.hydra, False)
    settings.hydra.job.config_name = name
    settings.hydra.overrides.task = list(overrides)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(settings)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


@cache
def _hydra_settings() -> bytes:
    """What Hydra says of itself in some run, pickled."""
    with initialize_config_module("vlm.config", version_base="1.3"):
        return pickle.dumps(hydra_compose("base", return_hydra_config=True))


def compose_once(name: str, overrides: Sequence[str]) -> Any:
    """Return what Hydra composes of a packaged run; each choice of groups is composed once."""
    parsed = [parse_word(open_mapping_key(word)) for word in overrides]
    groups = [str(word.input_line) for word in parsed if word.key_or_group in GROUPS]
    config = pickle.loads(compose_groups(name, *groups))
    ConfigLoaderImpl._apply_overrides_to_config([word for word in parsed if word.key_or_group not in GROUPS], config)
    return config


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return what a parser makes of words.

    Raises:
        MisunderstoodError: it refuses them.
    """
    said = StringIO()
    try:
        with redirect_stderr(said):
            return parser.parse_args(list(words))
    except SystemExit as ended:
        raise MisunderstoodError(said.getvalue()) from ended


@cache
def deepspeed_parser() -> argparse.ArgumentParser:
    """Return a parser of the options of `deepspeed`, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "launcher", "runner.py").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser("deepspeed", allow_abbrev=False)
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = [name.value for name in call.args if isinstance(name, ast.Constant)]
            flag = any(word.arg == "action" for word in call.keywords)
            if str(names[0]).startswith("-"):
                parser.add_argument(*map(str, names), **({"action": "store_true"} if flag else {}))
    parser.add_argument("user_script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER)
    return parser
