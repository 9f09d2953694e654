"""The user's own classes and functions, which a configuration names as `package.module:attribute`.

Only `import_named` imports by name, and only names that were passed to `permit_names`: those on the command line and in
the user's own YAML. Names from anywhere else, such as a checkpoint's configuration or the page, are refused. Imports
the standard library only.
"""

import os
import re
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from importlib import import_module

_CUSTOM_NAME = re.compile(r"[\w.]+:\w+")

_permitted: ContextVar[frozenset[str]] = ContextVar("permitted", default=frozenset())
"""The names that may be imported. Other threads have none, such as those in which the page answers requests."""


def is_custom_name(name: str) -> bool:
    """Return whether a name has the form `package.module:attribute`."""
    return _CUSTOM_NAME.fullmatch(name) is not None


def permit_names(names: Iterable[str]) -> None:
    """Let this thread import these names. Call it only with names that the user wrote."""
    _permitted.set(_permitted.get() | frozenset(names))


def is_permitted(name: str) -> bool:
    """Return whether this thread may import a name."""
    return name in _permitted.get()


def import_named(name: str, key: str) -> object:
    """Import `package.module:attribute` and return it. Modules are also searched for in the working directory.

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
        sys.path.append(os.getcwd())  # `python -m vlm` already has it, the command `vlm` does not
    try:
        return _get_attribute(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={name}: {error}") from error


def import_packaged(name: str) -> object:
    """Import a name from a table of this package and return it."""
    assert name.startswith("vlm."), name
    return _get_attribute(name)


def _get_attribute(name: str) -> object:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
