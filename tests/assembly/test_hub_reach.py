"""Whether the Hub answers is found out before its client begins to retry."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.fixtures import compose_config
from vlm.assembly import hub_reach
from vlm.assembly.family import read_config
from vlm.checks.fields import ConfigError
from vlm.checks.offline import check_offline


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A Hub that accepts no connection, and an empty cache; this process is online."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for name in hub_reach.PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return address


def test_a_hub_that_cannot_be_reached_is_named_at_once(closed_hub: str, monkeypatch: pytest.MonkeyPatch):
    def ask(*_: object, **__: object) -> None:
        pytest.fail("the client of the Hub was asked")

    monkeypatch.setattr("vlm.assembly.family.inspect_checkpoint", ask)
    with pytest.raises(ValueError, match="no such folder") as caught:
        read_config("some/encoder", "model.visual_encoder.hf_name=some/encoder")
    said = str(caught.value)
    assert said.startswith("model.visual_encoder.hf_name=some/encoder: no such folder (seen from ")
    assert f"the Hub ({closed_hub}) cannot be reached: Connection refused." in said
    assert "HF_ENDPOINT" in said


def test_what_needs_no_hub_is_not_looked_up(closed_hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub_reach.check_hub_answers(str(tmp_path), "x")  # a folder
    hub_reach.check_hub_answers("../no/name of the Hub", "x")  # the library says what is wrong with it
    monkeypatch.setattr(hub_reach, "try_to_load_from_cache", lambda *_, **__: "cache/config.json")
    hub_reach.check_hub_answers("some/encoder", "x")
    monkeypatch.setattr(hub_reach, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ValueError, match=closed_hub):
        hub_reach.check_hub_answers("another/encoder", "x")


def test_offline_a_model_that_is_not_here_is_refused_with_the_ways_out(
    closed_hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_reach.check_hub_answers(str(tmp_path), "x")
    with pytest.raises(ValueError, match="no such folder") as caught:
        read_config("some/encoder", "model.visual_encoder.hf_name=some/encoder")
    said = str(caught.value)
    assert "it is not in the cache of the Hub" in said
    assert "HF_HUB_OFFLINE is set. Name a folder instead, such as trainer.from_pretrained=" in said
    config = compose_config("finetune-smol", ["dataset.path=x", "model.visual_encoder.hf_name=some/encoder"])
    with pytest.raises(ConfigError, match=r"^model\.visual_encoder\.hf_name=some/encoder: no such folder"):
        check_offline(config)
    config.trainer.from_pretrained = str(tmp_path)
    check_offline(config)
    config.trainer.from_pretrained = None
    cached = tmp_path / "cache" / "models--some--encoder"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0")
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "snapshots" / "0" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model\.language_model\.hf_name="):
        check_offline(config)


def test_addresses_are_shown_without_passwords():
    assert hub_reach.without_password("https://ann:secret@hub.example:8443/a?token=1") == "https://hub.example:8443/a"
    assert hub_reach.without_password("1") == "1"


def test_an_empty_variable_names_no_proxy(closed_hub: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", "")
    assert not hub_reach.behind_proxy()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert hub_reach.behind_proxy()
