"""Suggests names for a name that does not exist. Imports its sibling `aliases`."""

from collections.abc import Sequence
from difflib import get_close_matches

from vlm.config.aliases import find_choice

MAX_LISTED_NAMES = 12
"""The largest number of allowed names that a message lists in full."""
MAX_SUGGESTED_NAMES = 4
"""The largest number of names after "Did you mean"."""


def nearest_names(name: str, allowed: Sequence[str]) -> list[str]:
    """Return the names that `name` may mean: those that begin with it, else contain it, else resemble it."""
    word = name.lower()
    for candidates in (
        [other for other in allowed if other.lower().startswith(word)],
        [other for other in allowed if len(word) > 2 and word in other.lower()],
        get_close_matches(name, allowed, n=1),
    ):
        if candidates and word:
            return candidates[:MAX_SUGGESTED_NAMES]
    return []


def suggest_names(name: str, allowed: Sequence[str], prefix: str = "", place: str = "", more: str = "") -> str:
    """Return hints for a name that is not allowed, each with a blank before it.

    Args:
        name: what was given.
        allowed: the names that exist.
        prefix: text to put before a suggested name.
        place: the group or key, to look up other frameworks' names.
        more: the sentence that says where all names are listed, if a message cannot list them.
    """
    alias = find_choice(place, name)
    near = nearest_names(name, allowed) if alias is None or alias not in allowed else [alias]
    hint = f" Did you mean {list_alternatives([prefix + other for other in near])}?" if near else ""
    if len(allowed) <= MAX_LISTED_NAMES or not (near or more):
        return f"{hint} Allowed are {', '.join(allowed) or 'none'}."
    return f"{hint} {more}" if more else hint


def list_alternatives(names: Sequence[str]) -> str:
    """Return names as in a sentence: `a, b or c`."""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def suggest_value(value: object, allowed: Sequence[str], key: str) -> str:
    """Return "Did you mean …?" with a blank before it, for a value that is not allowed; empty without a similar one.

    It suggests one value, or none if the allowed values are few and listed anyway.
    """
    if (alias := find_choice(key, str(value))) is not None and alias in allowed:
        return f" Did you mean {alias}?"
    near = nearest_names(str(value), allowed) if len(allowed) > MAX_SUGGESTED_NAMES else []
    return f" Did you mean {near[0]}?" if near else ""
