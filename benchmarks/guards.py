"""The guards of a run, timed call by call, or switched off for every other step: `survival` measures what they cost."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

from transformers import Trainer

from benchmarks.variants import synchronized_time
from vlm.train.guards.logged_loss import LoggedLoss
from vlm.train.guards.step_guard import StepGuard
from vlm.train.guards.watchdog import Watchdog

GUARDS: dict[tuple[type, str], Callable[..., object]] = {
    (StepGuard, "begin_step"): lambda *_, **__: None,
    (StepGuard, "watch_loss"): lambda guard, loss, **_: loss,
    (StepGuard, "judge"): lambda *_: True,
    (LoggedLoss, "begin_step"): lambda *_: None,
    (LoggedLoss, "end_step"): lambda *_, **__: None,
    (Watchdog, "mark"): lambda *_: None,
    (Watchdog, "_write_heartbeat"): lambda *_: None,
}
"""A method of a guard, between the first and the last step -> what it does where there is no guard."""


@contextmanager
def timed_guards() -> Iterator[list[float]]:
    """Within, add the seconds of each call of a guard to the list, once the device is done with what came before."""
    seconds: list[float] = []

    def timed(method: Callable[..., Any], idle: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = synchronized_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.append(synchronized_time() - start)

        return call

    with _replaced_guards(timed):
        yield seconds


@contextmanager
def guards_in_turns() -> Iterator[list[bool]]:
    """Within, a run trains on each step's batches twice in a row: once under guards, once without, in turns first.

    Yields:
        Of each step that has begun, whether it is under guards.
    """
    are_on: list[bool] = []
    batches: Any = None
    get_batch_samples = Trainer.get_batch_samples

    def repeat_batches(*args: Any, **kwargs: Any) -> Any:
        nonlocal batches
        pair, is_second = divmod(len(are_on), 2)
        are_on.append(bool(is_second) == bool(pair % 2))
        if not is_second:
            batches = get_batch_samples(*args, **kwargs)
        return deepcopy(batches)

    def switched(method: Callable[..., Any], idle: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return (method if not are_on or are_on[-1] else idle)(*args, **kwargs)

        return call

    with patch.object(Trainer, "get_batch_samples", repeat_batches), _replaced_guards(switched):
        yield are_on


@contextmanager
def _replaced_guards(replace: Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for (owner, name), idle in GUARDS.items():
            stack.enter_context(patch.object(owner, name, replace(getattr(owner, name), idle)))
        yield
