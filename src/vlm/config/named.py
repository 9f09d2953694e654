"""Classes and functions of the user's own, which a configuration names `package.module:attribute`.

`import_named` is the only way from a name to a module, and imports what `permit_names` was given: the names that stand
in the command line or in the user's own YAML. Names that come from anywhere else, such as a checkpoint's configuration
or the page, are refused. Imports the standard library only.
"""

import os
import re
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from importlib import import_module

_CUSTOM_NAME = re.compile(r"[\w.]+:\w+")

_permitted: ContextVar[frozenset[str]] = ContextVar("permitted", default=frozenset())
"""The names that may be imported. Another thread has none: the page answers in threads of its own."""


def is_custom_name(name: str) -> bool:
    """Return whether a name has the form `package.module:attribute`."""
    return _CUSTOM_NAME.fullmatch(name) is not None


def permit_names(names: Iterable[str]) -> None:
    """Let this thread import what these names stand for; call it with names that the user wrote, and no others."""
    _permitted.set(_permitted.get() | frozenset(names))


def is_permitted(name: str) -> bool:
    """Return whether this thread may import what a name stands for."""
    return name in _permitted.get()


def import_named(name: str, key: str) -> object:
    """Return what `package.module:attribute` names; modules are looked for in the working directory, too.

    Args:
        name: the name.
        key: where the user gave it, for the message.

    Raises:
        ValueError: the name has another form, was not permitted, or there is no such module or attribute.
    """
    if not is_custom_name(name):
        raise ValueError(f"{key}={name}: a name of the form package.module:attribute is needed")
    if name not in _permitted.get():
        raise ValueError(
            f"{key}={name}: it is not imported, since neither the command line nor your own YAML names it, and "
            f"importing runs code. If you trust it, give {key}={name} yourself"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python -m vlm` has it anyway, the command `vlm` has not
    try:
        return _get_attribute(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={name}: {error}") from error


def import_packaged(name: str) -> object:
    """Return what a name in a table of this package stands for."""
    assert name.startswith("vlm."), name
    return _get_attribute(name)


def _get_attribute(name: str) -> object:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
