"""The sign of life while a checkpoint loads."""

from pathlib import Path
from threading import Event

import pytest

from vlm.web import loading


def test_loading_says_how_long_it_has_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "FIRST_SIGN_SECONDS", 0.001)
    monkeypatch.setattr(loading, "SIGN_SECONDS", 0.001)
    loaded = Event()
    future = loading.start_loading(lambda: loaded.wait() and "model")
    signs = loading.loading_signs(future, "run/final")
    assert next(signs) == "Loading run/final · 0 s"
    loaded.set()
    list(signs)
    assert future.result() == "model"
    assert list(loading.loading_signs(future, "run/final")) == []


def test_what_is_wrong_with_a_checkpoint_is_raised_to_whoever_waits():
    def fail() -> None:
        raise ValueError("no checkpoint there")

    future = loading.start_loading(fail)
    list(loading.loading_signs(future, "x"))
    with pytest.raises(ValueError, match="no checkpoint there"):
        future.result()


def test_large_weights_are_told_with_their_size(tmp_path: Path):
    assert loading.describe_weights(str(tmp_path)) == str(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1_500_000_000)  # sparse
    assert loading.describe_weights(str(tmp_path)) == f"{tmp_path} (1.5 GB)"
    assert loading.describe_weights("owner/name") == "owner/name"
