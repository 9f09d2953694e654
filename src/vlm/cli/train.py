"""`python -m vlm`, `vlm -cn RUN`, `deepspeed --module vlm` and `torchrun -m vlm`: train what a configuration says.

Refuses what it can before importing torch; then hands a plain `RunConfig` to `vlm.train.run`.
"""

import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from vlm.checks.compose import with_config
from vlm.checks.fields import ConfigError
from vlm.checks.lora import QUANTIZABLE_PARTS
from vlm.checks.offline import check_offline
from vlm.checks.sweep import check_direction, is_sweep, worst_value
from vlm.cli.collection import collect_as_usual, no_collection
from vlm.cli.peft_use import may_use_peft
from vlm.cli.pipes import outlive_pipes
from vlm.cli.progress_note import tell
from vlm.clusters.processes import GUARD_EXIT_CODE
from vlm.clusters.world import take_world_from_scheduler
from vlm.config.derived import lower_is_better
from vlm.config.schema import RunConfig, TrainerOptions
from vlm.runs.outcome import metric_of, outcome_of
from vlm.runs.read import RunDirectory
from vlm.runs.sweep import finish_sweep
from vlm.train.backend_threads import end_with_backend_threads
from vlm.train.monitor.run_log import RunLog
from vlm.train.objectives.table import make_objective
from vlm.train.signals import SignalListener

BITSANDBYTES_OPTIMIZERS = re.compile("8bit|bnb|paged|lion|ademamix")
DYNAMO_SWITCH = "TORCHDYNAMO_DISABLE"
"""The environment variable that turns torch's compiler off."""
UNUSED_LIBRARIES = ("datasets", "scipy")
"""What transformers imports where it is installed, and no run needs there: `Trainer`'s data sets are ours, and no
detectors are trained. Tables of records and metrics import them when they need them."""


def main(words: Sequence[str] | None = None, *, owns_process: bool = False) -> None:
    """Compose the configuration that the command line asks for, check it, and run it; a sweep ends with its table.

    `owns_process` says that nothing but this run needs what the process imports.
    """
    sweeps: list[Path] = []

    def run_or_sweep(config: RunConfig, name: str, overrides: list[str]) -> float | None:
        """Train, and return what the run came to where it is one of a sweep."""
        if not is_sweep():
            return train(config, name, overrides, owns_process=owns_process)
        assert config.trainer.output_dir is not None
        folder = Path(config.trainer.output_dir)
        sweeps[:] = [Path(HydraConfig.get().sweep.dir)]
        return train_in_sweep(config, name, overrides, folder)

    with listen_to_signals():
        take_world_from_scheduler()
        try:
            with_config(words, run_or_sweep, make_objective, trains=True)
        except BaseException as error:
            end_with_backend_threads(error)
            raise
        finally:
            if sweeps and os.environ.get("RANK", "0") == "0":
                finish_sweep(sweeps[0])
        end_with_backend_threads()


def train_in_sweep(config: RunConfig, name: str, overrides: list[str], folder: Path) -> float:
    """Train one run of a sweep, and return its metric; the worst where a guard ended it, so that the others follow."""
    try:
        check_direction(config.trainer.keep_best, lower_is_better=is_lower_better(config.trainer))
    except ConfigError as error:  # of all runs
        sys.exit(f"vlm: {error}")
    try:
        train(config, name, overrides)
    except SystemExit as stop:
        if stop.code != GUARD_EXIT_CODE:
            raise
        return worst_value()
    run = RunDirectory(folder)
    outcome = outcome_of(run, metric_of([run]))
    return worst_value() if outcome is None else outcome.value


def is_lower_better(trainer: TrainerOptions) -> bool:
    """Return whether less of the metric that runs of a sweep are compared by is better."""
    if trainer.keep_best is None:
        return True  # a loss
    return lower_is_better(trainer.keep_best) if trainer.greater_is_better is None else not trainer.greater_is_better


def train(config: RunConfig, name: str, overrides: list[str], *, owns_process: bool = False) -> None:
    """Train on this rank, together with every other rank, to the end even if nobody reads the log any more."""
    outlive_pipes()
    check_offline(config)
    with RunLog() as run_log:
        unused = UNUSED_LIBRARIES if not owns_process or may_use_peft(config) else (*UNUSED_LIBRARIES, "peft")
        _train(config, name, overrides, run_log, unused)


def _train(config: RunConfig, name: str, overrides: list[str], run_log: RunLog, unused: Sequence[str]) -> None:
    tell("Loading PyTorch and transformers")
    with uncompiled_bitsandbytes(config), without_libraries(*unused), no_collection():
        from vlm.train.distributed import Rank0Failed, close_process_group
        from vlm.train.run import run  # torch comes with it

    collect_as_usual()
    try:
        with nullcontext() if config.trainer.deepspeed else without_deepspeed():
            run(config, name, overrides, run_log)
    except Rank0Failed:
        raise
    except SystemExit:  # on a signal or by a guard, on every rank after the same step
        close_process_group()
        raise
    close_process_group()


def listen_to_signals() -> AbstractContextManager[object]:
    """Return a context in which signals end a run as `vlm.train.signals` says; only a main thread can hear them."""
    return SignalListener() if threading.current_thread() is threading.main_thread() else nullcontext()


@contextmanager
def uncompiled_bitsandbytes(config: RunConfig) -> Iterator[None]:
    """Import without torch's compiler, where a run needs nothing of bitsandbytes.

    transformers' `Trainer` imports peft, which imports bitsandbytes, which decorates four kernels for the CPU with
    `torch.compile`, and that imports the compiler: two seconds for kernels that such a run never calls.
    """
    optimizer = config.trainer.optim or ""
    quantized = any(getattr(config.model, part).quantization for part in QUANTIZABLE_PARTS)
    if quantized or BITSANDBYTES_OPTIMIZERS.search(optimizer) or DYNAMO_SWITCH in os.environ:
        yield
        return
    os.environ[DYNAMO_SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[DYNAMO_SWITCH]


@contextmanager
def without_libraries(*names: str) -> Iterator[None]:
    """Let what is imported within take libraries for not installed; those that are imported already stay."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType] - what hides a module from imports
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Let accelerate take no model within for one that DeepSpeed wraps: it would import DeepSpeed to find that out."""
    from accelerate.utils import other

    is_available = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        other.is_deepspeed_available = is_available
