"""`vlm serve`: limits and keys of its command line, and what it refuses before a model is loaded."""

from pathlib import Path

import pytest

from tests.command_line import refusal
from vlm.checks.fields import ConfigError
from vlm.cli.serve import KEY_VARIABLE, format_url, get_default_name, make_parser, read_api_key, read_serving_config
from vlm.config.serving_schema import ServingConfig


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_limits_are_set_by_their_keys():
    config = read_serving_config(["serving.max_images=3", "serving.request_seconds=1.5"])
    assert (config.max_images, config.request_seconds) == (3, 1.5)
    assert config.max_queue == ServingConfig().max_queue


@pytest.mark.parametrize(("word", "words"), [
    ("max_images=3", "only serving.KEY=VALUE"),
    ("inference.temperature=1", "only serving.KEY=VALUE"),
    ("serving.max_imags=3", "Did you mean serving.max_images"),
    ("serving.max_images=many", "serving.max_images"),
    ("serving.max_images=-1", "serving.max_images=-1: 0 or more is needed"),
    ("serving.max_images=null", "serving.max_images"),
    ("serving.max_batch=0", "at least 1"),
    ("serving.max_aspect_ratio=.nan", "serving.max_aspect_ratio"),
])  # fmt: skip
def test_a_limit_that_is_none_is_refused(word: str, words: str):
    with pytest.raises(ConfigError) as refused:
        read_serving_config([word])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_beyond_this_machine_a_key_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_api_key(None, False, "127.0.0.1") is None
    assert read_api_key(None, False, "::1") is None
    for host in ("0.0.0.0", "::", "192.168.0.5", "gpu.example"):
        with pytest.raises(ValueError, match="no API key"):
            read_api_key(None, False, host)
        assert read_api_key(None, True, host) is None
    file = tmp_path / "key"
    file.write_text("of-a-file\n")
    assert read_api_key(file, False, "::") == "of-a-file"
    monkeypatch.setenv(KEY_VARIABLE, "of-the-environment")
    assert read_api_key(None, False, "::") == "of-the-environment"
    assert read_api_key(file, False, "::") == "of-a-file"
    with pytest.raises(ValueError, match="give one of them"):
        read_api_key(None, True, "::")
    for wrong in ("", "two words", "ä", "a\nb"):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        with pytest.raises(ValueError, match="one word"):
            read_api_key(None, False, "127.0.0.1")


def test_whether_a_model_thinks_is_an_option_whose_default_is_how_it_was_trained():
    words = {(): None, ("--thinking",): True, ("--no-thinking",): False}
    assert {given: make_parser().parse_args(["x", *given]).thinking for given in words} == words


def test_what_cannot_be_served_is_refused_at_once():
    assert "vlm serve: nowhere/at/all: no such folder" in refusal("serve", "nowhere/at/all", "--port", "0")
    assert "from 0 to 65535" in refusal("serve", "nowhere", "--port", "70000")
    assert "no API key" in refusal("serve", "nowhere", "--host", "0.0.0.0")
    assert "serving.max_imags" in refusal("serve", "nowhere", "serving.max_imags=1")


def test_a_checkpoint_is_called_by_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cats" / "final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [get_default_name(name) for name in ("cats/final", "cats", "me/cats-7b")] == ["cats", "cats", "me/cats-7b"]


def test_addresses_are_written_as_clients_write_them():
    assert format_url("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert format_url("::1", 8000) == "http://[::1]:8000"
