"""A sign of life while a checkpoint loads, which happens in another thread. Needs neither torch nor Gradio."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

Loaded = TypeVar("Loaded")

FIRST_SIGN_SECONDS, SIGN_SECONDS = 0.3, 1.0
"""How long loading takes before the page says so, and the time between two signs of life."""
SMALLEST_SIZE = 50_000_000
"""Bytes of weights from which on their size is shown."""


def start_loading(load: Callable[[], Loaded]) -> Future[Loaded]:
    """Load in another thread. A load that nobody waits for any longer ends by itself."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="loading")
    loading = pool.submit(load)
    pool.shutdown(wait=False)
    return loading


def loading_signs(loading: Future[Loaded], checkpoint: str) -> Iterator[str]:
    """Yield how long a checkpoint has been loading, about once a second; nothing if it is in memory already."""
    began, name, pause = time.monotonic(), describe_weights(checkpoint), FIRST_SIGN_SECONDS
    while not wait([loading], pause).done:
        yield f"Loading {name} · {time.monotonic() - began:.0f} s"
        pause = SIGN_SECONDS


def describe_weights(checkpoint: str) -> str:
    """Return a checkpoint's name, with the size of its weights where they are large and on this machine."""
    files = Path(checkpoint).glob("*.safetensors") if Path(checkpoint).is_dir() else ()
    num_bytes = sum(file.stat().st_size for file in files if file.is_file())
    return f"{checkpoint} ({num_bytes / 1e9:.1f} GB)" if num_bytes >= SMALLEST_SIZE else checkpoint
