"""Processes that start at once: a parent that has imported the framework already forks for each of them.

A test takes them where what a process does is its point, and that a new interpreter imports everything is not. The
parent imports and does nothing else: it has one thread, and what it has imported was imported under the environment of
the tests, so a test of what is read at import needs an interpreter of its own.

Runs in it leave out what costs a tiny one more than its steps do, see `lighten`.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.waiting import HANG

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "deepspeed", "matplotlib.figure", "torch.utils.tensorboard", "torch.utils.flop_counter", "transformers.trainer",
    "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama", "vlm", "vlm.cli.train",
    "vlm.models", "vlm.train.run",
)  # fmt: skip
CPU_ONLY = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status as `subprocess` gives it, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(
    *commands: list[str], environments: Iterable[dict[str, str]] = ({},), cwd: Path | None = None, light: bool = True
) -> list[Ended]:
    """Run commands side by side, each as Python runs it; where one fails, all are ended.

    Args:
        commands: `-m`, a module and its words, or `-c`, code and its words.
        environments: of each process, what its environment has beside this process's.
        cwd: the working directory; defaults to this process's.
        light: whether runs leave out what `lighten` names.
    """
    with TemporaryDirectory() as folder:
        requests = [
            {
                "command": command, "environment": {**os.environ, **CPU_ONLY, **environment},
                "folder": str(cwd or Path.cwd()), "output": str(Path(folder, str(number))), "light": light,
            }
            for number, (command, environment) in enumerate(zip(commands, environments, strict=True))
        ]  # fmt: skip
        statuses = _parent().ask(requests)
        return [
            Ended(status, *(Path(f"{request['output']}.{name}").read_text(errors="replace") for name in ("out", "err")))
            for status, request in zip(statuses, requests, strict=True)
        ]


FROZEN_PARTS = {
    "preference-smol": ("connector",), "embed-smol": ("connector",), "head-": ("connector", "language_model"),
}  # fmt: skip
"""How the names of small runs begin -> the parts that they freeze."""
GROUPS = ("trainer/unfreeze=", "trainer/lora=")
TRAINING = {"connector": (), "language_model": ("model.head.pooling=query",)}
"""Part -> how words begin that train some of it, besides its own keys."""


def run_ranks(module: str, words: list[str], number: int = 2) -> list[Ended]:
    """Run a module on so many ranks of this machine's CPU, as `deepspeed --num_gpus N --module` does.

    The rates that all small runs have (`tests.fixtures`) are left out for parts that are frozen: on the command line
    they are refused.
    """
    for start, parts in FROZEN_PARTS.items():
        for part in parts if any(word.startswith(start) for word in words) else ():
            trains = (f"trainer.unfreeze.train_{part}=true", f"trainer.lora.{part}", *GROUPS, *TRAINING[part])
            if not any(word.startswith(trains) for word in words):
                rate = f"trainer.learning_rate.{part}_learning_rate="
                words = [word for word in words if not word.startswith(rate)]
    commands = [["-m", module, f"--local_rank={rank}", *words] for rank in range(number)]
    return run_forked(*commands, environments=rank_environments(number))


def rank_environments(number: int) -> list[dict[str, str]]:
    """Return the environment of each of so many ranks on this machine, as a launcher makes it."""
    port = find_free_port()
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_SIZE": str(number),
            "CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
        for rank in range(number)
    ]  # fmt: skip


def find_free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Parent:
    """The process that has imported the framework, as the tests talk to it; it ends when they do."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **CPU_ONLY},
        )  # fmt: skip

    def ask(self, requests: list[dict[str, Any]]) -> list[int]:
        """Let the parent fork once for each request, and return their exit statuses when all have ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        hang = threading.Timer(HANG, self.process.kill)
        hang.start()
        try:
            self.process.stdin.write(f"{json.dumps(requests)}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        finally:
            hang.cancel()


_parent = cache(Parent)


# In the parent


def serve() -> Callable[[], object] | None:
    """Fork for what is asked for until nothing more is; in a fork, return what it has to do."""
    gc.disable()
    for module in PRELOADED:
        import_module(module)
    gc.freeze()  # what is shared with the forks stays shared
    gc.enable()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        requests = json.loads(line)
        forks = []
        for request in requests:
            if (fork := os.fork()) == 0:
                answers.close()
                return partial(become, request)
            forks.append(fork)
        print(json.dumps(wait_for_all(forks)), file=answers, flush=True)
    return None


def wait_for_all(forks: list[int]) -> list[int]:
    """Wait until all have ended and return their exit statuses; as soon as one fails, the others are killed."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(forks):
        fork, status = os.wait()
        statuses[fork] = os.waitstatus_to_exitcode(status)
        if statuses[fork]:
            for other in set(forks) - set(statuses):
                os.kill(other, signal.SIGKILL)
    return [statuses[fork] for fork in forks]


def become(request: dict[str, Any]) -> None:
    """Do in a fork what `python -m MODULE WORDS` or `python -c CODE WORDS` does in a new process."""
    for number, target in enumerate((os.devnull, f"{request['output']}.out", f"{request['output']}.err")):
        file = os.open(target, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    if request["light"]:
        lighten()
    option, program, *words = request["command"]
    sys.argv = [option, *words]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})


def lighten() -> None:
    """Let runs of this process draw no plots, measure no processor, wait for no disk, and compose once.

    Hydra composes everything a second time to find out that a run is no sweep.
    """
    from hydra._internal.hydra import Hydra
    from hydra.types import RunMode

    from vlm.train.monitor import callbacks, peak_flops

    os.fsync = lambda descriptor: None
    Hydra.get_mode = lambda *given, **named: RunMode.RUN
    callbacks.draw_loss = callbacks.draw_speed = lambda *given: None
    peak_flops.measure_tflops = lambda device, dtype: 1.0


if __name__ == "__main__":
    action = serve()
    if action is not None:
        action()
