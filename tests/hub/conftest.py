"""A Hub for a module's tests, and checkpoints to push to it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.server import LocalHub

TOKEN, READER = "hf_" + "w" * 30, "hf_" + "r" * 30


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    """A Hub that knows two tokens: of `ann`, who may write to `ann` and `lab`, and one that may only read."""
    hub = LocalHub()
    hub.accounts = {
        TOKEN: {"name": "ann", "orgs": ["lab"], "role": "write"},
        READER: {"name": "ann", "orgs": [], "role": "read"},
    }
    with hub.running():
        yield hub


@pytest.fixture
def online(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The client of this process asks that Hub, as `ann`, and sends whole files."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    files = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub.asked.clear()
    hub.arrived.clear()
    hub.trouble = None
    return hub


@pytest.fixture(scope="module")
def run_folder(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run left; its model is `final`."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    return train("pretrain-smol", folder, "trainer.max_steps=2", "trainer.num_samples=0", plots=True)
