"""Whether the Hub answers, found out in seconds: its client tries six times over half a minute, for each file.

Imports huggingface_hub, and no torch.
"""

import os
import socket
from functools import cache
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vlm.checks.offline import offline_problem

SECONDS_FOR_HUB = 3
"""How long the Hub may take to accept a connection."""

PROXIES = ("https_proxy", "http_proxy", "all_proxy")


def check_hub_answers(name: str, label: str, revision: str | None = None) -> None:
    """Raise ValueError where a model can only come from the Hub, and that accepts no connection or is not to be asked.

    Args:
        name: Hub name or folder. Folders and names whose configuration is in the cache are not looked up.
        label: what messages call it, such as `model.hf_name=NAME`.
        revision: branch, tag or commit.
    """
    if problem := offline_problem(name, label, revision):
        raise ValueError(problem)
    if constants.is_offline_mode() or behind_proxy() or Path(name).is_dir() or _is_cached(name, revision):
        return
    if reason := why_unreachable(constants.ENDPOINT):
        raise ValueError(
            f"{label}: no such folder (seen from {Path.cwd()}), and the Hub ({without_password(constants.ENDPOINT)}) "
            f"cannot be reached: {reason}. Name a local folder, or a mirror of the Hub in HF_ENDPOINT"
        )


def behind_proxy() -> bool:
    """Return whether connections go through a proxy, so that a direct one says nothing."""
    return any(value and name.lower() in PROXIES for name, value in os.environ.items())


@cache
def why_unreachable(address: str) -> str:
    """Return why the host of an address accepts no connection; empty where it does. Asked once in a process."""
    parts = urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    outcome: list[str] = []
    asked = Thread(target=lambda: outcome.append(_try_connection(parts.hostname or "", port)), daemon=True)
    asked.start()
    asked.join(SECONDS_FOR_HUB)  # a name server may take longer than any timeout of sockets
    return outcome[0] if outcome else f"no answer within {SECONDS_FOR_HUB} seconds"


def _try_connection(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), timeout=SECONDS_FOR_HUB):
            return ""
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__


def without_password(address: str) -> str:
    """Return an address without user, password and query; other texts as they are."""
    parts = urlsplit(address)
    if not parts.hostname:
        return address
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def _is_cached(name: str, revision: str | None) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:  # no name that the Hub can have: the library says so without asking
        return True
