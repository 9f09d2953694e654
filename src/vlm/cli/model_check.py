"""`vlm models --check`: tries a family on a small model, and prints the verdict of each proof."""

import sys
from collections.abc import Iterable
from pathlib import Path

from tabulate import tabulate

from vlm.assembly.family import load_family_config
from vlm.assembly.family_trial.catalogue import (
    has_failed,
    report_progress,
    try_types,
    write_json,
    write_markdown,
)
from vlm.assembly.family_trial.table import try_family
from vlm.assembly.family_trial.verdicts import State, Verdicts
from vlm.config.shown import shorten
from vlm.families.installed import image_text_types
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES, get_family

ALL = "all"
REASON_WIDTH = 100
"""Characters of a line of reasons."""


def check(
    name: str, *, trust_remote_code: bool = False, json_file: Path | None = None, markdown_file: Path | None = None
) -> None:
    """Try a model, a type or all types, print the verdicts, and write them to files; exit with 1 if a proof failed.

    Args:
        name: a Hub name or folder, a type, or `all`.
        trust_remote_code: whether code of the checkpoint's repository may run.
        json_file: where verdicts by type are written; None: nowhere.
        markdown_file: where the page of the table is written; None: nowhere.

    Raises:
        ValueError: there is no such model or type.
    """
    known = list(dict.fromkeys([*image_text_types(), *FAMILIES]))
    if name == ALL:
        tried = _try_all(known)
    elif name in known and not Path(name).is_dir():
        tried = _try_all([name])
    else:
        config = load_family_config(name, trust_remote_code=trust_remote_code)
        processor = load_family_processor(name, get_family(config.model_type), trust_remote_code=trust_remote_code)
        tried = {config.model_type: try_family(config, processor, trust_remote_code=trust_remote_code)}
    if len(tried) == 1:
        (verdicts,) = tried.values()
        rows = [(proof, verdict.state, shorten(verdict.reason)) for proof, verdict in verdicts.items()]
        print(tabulate(rows, ("proof", "verdict", "reason"), tablefmt="plain", maxcolwidths=[None, None, REASON_WIDTH]))
    else:
        print(tabulate(_summaries(tried.items()), ("type", "verdicts"), tablefmt="plain"))
    if json_file is not None:
        write_json(tried, json_file)
    if markdown_file is not None:
        write_markdown(tried, markdown_file)
    if any(map(has_failed, tried.values())):
        sys.exit(1)


def _try_all(types: list[str]) -> dict[str, Verdicts]:
    """Try types one after the other, with a line of progress for each."""
    found: dict[str, Verdicts] = {}
    for number, tried in enumerate(try_types(types), start=1):
        report_progress(tried, number, len(types))
        found[tried.model_type] = tried.verdicts
    return found


def _summaries(tried: Iterable[tuple[str, Verdicts]]) -> Iterable[tuple[str, str]]:
    """Yield each type with what is not proved of it."""
    for name, verdicts in tried:
        rest = [f"{proof} {verdict.state}" for proof, verdict in verdicts.items() if verdict.state is not State.PROVED]
        yield name, ", ".join(rest) or "all proved"
