"""Short names of keys and values: for lists, plots and the folders of sweeps. Imports the standard library only."""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256

GENERIC_NAMES = frozenset({"hf_name", "path", "type", "r", "alpha", "dropout", "weight", "name", "loss", "kind", "lr"})
"""Last words of keys that mean nothing without the word before."""

MAX_PATH_LENGTH = 24
"""Number of characters of a path that a list shows, counted from the end."""

MAX_NAME_LENGTH = 80
"""The longest name of a folder, in characters; file systems allow 255 bytes."""

RATES = "_learning_rate"
"""The ending of the keys of learning rates; if all parts have the same rate, it is shown once."""


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return key -> its last word, or its last two words if the last is generic or not unique."""
    lasts = [_words(key)[-1] for key in keys]
    short = {}
    for key, last in zip(keys, lasts, strict=True):
        words = _words(key)
        short[key] = ".".join(words[-2:]) if last in GENERIC_NAMES or lasts.count(last) > 1 else last
    is_clear = len(set(short.values())) == len(short)
    return short if is_clear else {key: ".".join(_words(key)) for key in keys}


def _words(key: str) -> list[str]:
    return re.split(r"[./]", key.split("@")[0])


def describe_values(values: Mapping[str, object]) -> str:
    """Return settings as short words, with paths cut to their end: `seed=1 connector_learning_rate=0.001`."""
    rates = [key for key in values if key.endswith(RATES)]
    if len(rates) > 1 and len({repr(values[key]) for key in rates}) == 1:
        values = {key: value for key, value in values.items() if key not in rates[1:]}
        values = {"learning_rate" if key == rates[0] else key: value for key, value in values.items()}
    short = short_keys(list(values))
    return " ".join(f"{short[key]}={_shorten_path(show_value(value))}" for key, value in values.items())


def _shorten_path(text: str) -> str:
    return text if len(text) <= MAX_PATH_LENGTH or "/" not in text else f"…{text[-MAX_PATH_LENGTH:]}"


def show_value(value: object) -> str:
    """Return a value as YAML writes it, with numbers in their shortest form."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def folder_name(values: Mapping[str, str]) -> str:
    """Return a name for the folder of a run that differs from others by these settings; `.` without any.

    It has only letters, digits and `. _ + -`, so that neither a shell nor Hydra needs quotation marks. A name that
    would be too long, or not unique, ends with a digest of all values.
    """
    if not values:
        return "."
    short = short_keys(list(values))
    name = "--".join(f"{short[key]}-{_plain(value)}" for key, value in values.items()).lstrip(".-")
    is_told = all(re.fullmatch(r"[\w.+/-]+", value) for value in values.values())
    if len(name) <= MAX_NAME_LENGTH and is_told:
        return name
    digest = sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME_LENGTH - 9]}-{digest}"


def _plain(value: str) -> str:
    """Return a value of the command line with `-` for every character that is special in a path or a shell."""
    return re.sub(r"[^\w.+-]+", "-", value.strip("'\"")).rstrip("-") or "empty"
