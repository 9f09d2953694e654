"""The verdicts of many types: each is tried in a process of its own, and the table of all is written to files."""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from tabulate import tabulate
from transformers.utils import logging

from vlm.assembly.family_trial.table import OPTIONAL, PROOFS, try_family
from vlm.assembly.family_trial.verdicts import State, Verdict, Verdicts, shorten_reason
from vlm.assembly.small_models.make import make_small
from vlm.families.processing import FamilyProcessor
from vlm.families.table import get_family

TYPE_SECONDS = 600.0
"""Seconds after which the process of a type is ended."""
MARKS = {State.PROVED: "yes", State.FAILED: "**no**", State.NOT_MADE: "?"}
"""How a verdict is in the table of a page."""


class Receiver(Protocol):
    """The end of a pipe that verdicts come out of, on any system."""

    def poll(self, timeout: float, /) -> bool:
        """Return whether something comes in time; raise EOFError if nothing can come any more."""
        ...

    def recv(self) -> Mapping[str, str]:
        """Return what came: proof -> verdict."""
        ...


@dataclass(frozen=True)
class TriedType:
    """A type on trial: its verdicts, and the seconds that they took."""

    model_type: str
    verdicts: Verdicts
    seconds: float


def try_type(model_type: str) -> dict[str, Verdict]:
    """Return the verdicts of a type's small model with a processor of the type's own classes, made without files."""
    try:
        small, family = make_small(model_type), get_family(model_type)
        if family.template is not None:  # the type's own processor brings no template
            small.processor.chat_template = small.processor.tokenizer.chat_template = None
        processor = FamilyProcessor(small.processor, family)
    except Exception as error:  # whatever the classes of a type do
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return not_made(reason)
    return try_family(small.config, processor)


def not_made(reason: str) -> dict[str, Verdict]:
    """Return the verdicts of a trial that ended before its first proof."""
    return dict.fromkeys(PROOFS, Verdict(State.NOT_MADE, shorten_reason(reason)))


def try_types(
    model_types: Iterable[str],
    max_seconds: float = TYPE_SECONDS,
    try_one: Callable[[str], Mapping[str, Verdict]] = try_type,
) -> Iterator[TriedType]:
    """Yield types with their verdicts, each found in a process of its own: one that crashes or hangs ends alone.

    Args:
        model_types: the types.
        max_seconds: seconds after which the process of a type is ended.
        try_one: finds the verdicts of a type; a function of a module's top, which another process imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for model_type in model_types:
        started = time.monotonic()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_verdicts, args=(model_type, sender, try_one), daemon=True)
        process.start()
        sender.close()
        verdicts = _receive(receiver, max_seconds)
        process.join(1.0)
        if process.is_alive():
            process.kill()
            process.join()
        if verdicts is None:
            ending = f"ended with exit code {process.exitcode}"
            verdicts = not_made(f"its process {ending} within {time.monotonic() - started:.0f} s")
        yield TriedType(model_type, verdicts, time.monotonic() - started)


def _send_verdicts(model_type: str, sender: Connection, try_one: Callable[[str], Mapping[str, Verdict]]) -> None:
    """Try a type in this process, whose lines of progress are the parent's to write."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sender.send({name: str(verdict) for name, verdict in try_one(model_type).items()})


def _receive(receiver: Receiver, max_seconds: float) -> dict[str, Verdict] | None:
    """Return the verdicts that a process sends in time; None if it ends without."""
    try:
        if not receiver.poll(max_seconds):
            return None
        return {name: Verdict.parse(text) for name, text in receiver.recv().items()}
    except EOFError:
        return None


def has_failed(verdicts: Verdicts) -> bool:
    """Return whether a proof failed that every run needs."""
    return any(verdict.state is State.FAILED for name, verdict in verdicts.items() if name not in OPTIONAL)


def passes(verdicts: Verdicts) -> bool:
    """Return whether all proofs are made that every run needs."""
    return all(verdict.state is State.PROVED for name, verdict in verdicts.items() if name not in OPTIONAL)


def write_json(tried: Mapping[str, Verdicts], file: Path) -> None:
    """Write verdicts: `{"transformers": version, "date": day, "types": {type: {proof: verdict}}}`."""
    types = {name: {proof: str(verdict) for proof, verdict in verdicts.items()} for name, verdicts in tried.items()}
    content = {"transformers": version("transformers"), "date": date.today().isoformat(), "types": types}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_markdown(tried: Mapping[str, Verdicts], file: Path) -> None:
    """Write a page with the table of verdicts, and the reasons of those that are not proved."""
    rows = [
        (f"`{name}`", *(MARKS[verdicts[proof].state] for proof in PROOFS))
        for name, verdicts in tried.items()
        if not is_untried(verdicts)
    ]
    passing = [verdicts for verdicts in tried.values() if passes(verdicts)]
    packed, paired = (
        sum(verdicts[proof].state is State.PROVED for verdicts in passing) for proof in ("packing", "pairs")
    )
    lines = [
        "# What is proved of each type",
        "",
        "Written by `vlm models --check all --markdown docs/families-proved.md` on "
        f"{date.today().isoformat()} with transformers {version('transformers')}: of {len(tried)} types, "
        f"{len(passing)} pass all proofs that a run needs, {packed} of them `packing` too, "
        f"which only `trainer.packing=true` needs, and {paired} `pairs`, which preferences need with it; "
        "`videos` is for runs whose records have some, and holds where frames are read as images. Each "
        "type is tried on a small model with random weights, and a processor of the type's own classes with a "
        "tokenizer and, where the classes bring none, a chat template made for the trial; a run tries the checkpoint's "
        "own. [families.md](families.md#what-is-proved-before-training) says what each proof is.",
        "",
        tabulate(rows, ("type", *PROOFS), tablefmt="github", disable_numparse=True),
        "",
        "`?` is a proof that could not be made; such a run needs `model.unproved=true`.",
        "",
        "## Reasons",
        "",
        *_list_reasons(tried),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def is_untried(verdicts: Verdicts) -> bool:
    """Return whether no proof of a type could be made, all for one reason."""
    states = {verdict.state for verdict in verdicts.values()}
    return states == {State.NOT_MADE} and len({verdict.reason for verdict in verdicts.values()}) == 1


def _list_reasons(tried: Mapping[str, Verdicts]) -> Iterator[str]:
    """Yield a line for each type with the reasons of what is not proved, and what was found, equal ones once."""
    for name, verdicts in tried.items():
        if is_untried(verdicts):
            yield f"- `{name}` is not tried: {_as_text(next(iter(verdicts.values())).reason)}"
            continue
        proofs_by_verdict: dict[Verdict, list[str]] = {}
        for proof, verdict in verdicts.items():
            if verdict.reason:
                proofs_by_verdict.setdefault(verdict, []).append(proof)
        for verdict, proofs in proofs_by_verdict.items():
            yield f"- `{name}`, {', '.join(proofs)} {verdict.state}: {_as_text(verdict.reason)}"


def _as_text(reason: str) -> str:
    """Return a reason as a page shows it: what would be markup is in it as it is."""
    return f"`{reason}`" if "`" not in reason else reason.replace("<", "&lt;")


def report_progress(tried: TriedType, number: int, total: int) -> None:
    """Print a line about a type on standard error, with its time."""
    states = [verdict.state for verdict in tried.verdicts.values()]
    said = ", ".join(f"{states.count(state)} {state}" for state in State if state in states)
    print(f"[{number}/{total}] {tried.model_type}: {said} ({tried.seconds:.1f} s)", file=sys.stderr, flush=True)
