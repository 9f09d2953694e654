"""Threads that serve process groups are told from others, also while threads come and go."""

import threading
from pathlib import Path

import pytest

from vlm.train.backend_threads import backend_threads


def test_threads_are_known_by_their_names():
    ended = threading.Event()

    def serve() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("gloo_loop")
        named.set()
        ended.wait()

    named, thread = threading.Event(), threading.Thread(target=serve)
    before = backend_threads()
    thread.start()
    named.wait()
    assert sorted(backend_threads()) == sorted([*before, "gloo_loop"])
    ended.set()
    thread.join()


def test_a_thread_that_ends_while_threads_are_listed_is_none(monkeypatch: pytest.MonkeyPatch):
    listed = list(Path("/proc/self/task").glob("*/comm"))
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/proc/self/task/0/comm"), *listed]))
    assert "gloo_loop" not in backend_threads()
