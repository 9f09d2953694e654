"""Classes and functions of the user's own, which a configuration names `package.module:attribute`.

Imports the standard library only.
"""

import os
import re
import sys
from importlib import import_module

_CUSTOM_NAME = re.compile(r"[\w.]+:\w+")


def is_custom_name(name: str) -> bool:
    """Return whether a name has the form `package.module:attribute`."""
    return _CUSTOM_NAME.fullmatch(name) is not None


def import_named(name: str, key: str) -> object:
    """Return what `package.module:attribute` names; modules are looked for in the working directory, too.

    Args:
        name: the name.
        key: where the user gave it, for the message.

    Raises:
        ValueError: there is no such module, or it has no such attribute.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python -m vlm` has it anyway, the command `vlm` has not
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={name}: {error}") from error
