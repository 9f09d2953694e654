"""Hostile checkpoints: each is refused in a sentence with the file's name, runs nothing, hangs nowhere.

All of `hostile.MUTATIONS` are opened with the marker `attack`; a dozen of them in every run of the tests.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.attack.hostile import CASES, save_hostile, save_whole
from tests.attack.hostile_settings import CANARY
from tests.attack.mutations import KINDS, MUTATIONS
from tests.attack.open_hostile import ask, outcome
from tests.forked import run_forked
from tests.tiny_parts import Parts
from vlm.assembly import processor_trial

MAX_LENGTH = 1000
"""Characters of a refusal, in one to three lines."""
SHORT = (
    ("composed", "connector-missing"), ("prediction", "head-missing"), ("adapter", "adapter-lacks-b"),
    ("adapter", "code-pickled-adapter"), ("adapter", "adapter-gone"),
    ("composed", "weights-extra"), ("composed", "weights-integers"), ("composed", "weights-nan"),
    ("composed", "model.safetensors-cut-0.5"), ("composed", "model.safetensors-is-pipe"),
    ("composed", "config.json-list"),
    ("adapter", "base.json-object"), ("adapter", "base-in-circle"), ("composed", "index-outside"),
    ("composed", "composed-text_config-type-unknown"), ("composed", "composed-text-num_hidden_layers-huge"),
    ("composed", "composed-text-vocab_size-huge"), ("composed", "template-loop"), ("composed", "code-pickle"),
)  # fmt: skip
"""The most telling cases."""

Outcomes = Mapping[tuple[str, str], Mapping[str, str]]


@pytest.fixture(scope="module")
def whole(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole checkpoint of each kind."""
    root = tmp_path_factory.mktemp("whole")
    folders = {kind: root / kind / "whole" for kind in KINDS}
    for kind, folder in folders.items():
        folder.parent.mkdir()
        save_whole(kind, folder, parts)
    return folders


def check_refused(kind: str, name: str, how: Mapping[str, str], folder: Path) -> None:
    """Fail unless a hostile checkpoint was refused as it should be."""
    mutation = MUTATIONS[name]
    if mutation.harmless and how["how"] == "answered":
        return
    assert how["how"] == "refused", how
    assert (mutation.file or str(folder)) in how["text"]
    assert how["text"].count("\n") < 3
    assert len(how["text"]) <= MAX_LENGTH
    assert "\x1b" not in how["text"]
    assert not (folder.parent / CANARY).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_checkpoints_answer(whole: dict[str, Path], kind: str):
    assert ask(kind, whole[kind]) is not None


@pytest.mark.parametrize(("kind", "name"), SHORT)
def test_a_hostile_checkpoint_is_refused(
    whole: dict[str, Path], tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processor_trial, "MAX_SECONDS", 1)
    save_hostile(kind, name, whole[kind], tmp_path / name)
    check_refused(kind, name, outcome(kind, tmp_path / name), tmp_path / name)


@pytest.fixture(scope="module")
def hostile(whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcomes]:
    """The folder of all hostile checkpoints, and how each was taken by a process that opened one after the other."""
    root = tmp_path_factory.mktemp("hostile")
    for kind, name in CASES:
        (root / kind).mkdir(exist_ok=True)
        save_hostile(kind, name, whole[kind], root / kind / name)
    results = root / "results.jsonl"
    for kind in KINDS:
        run_forked(["-m", "tests.attack.open_hostile", str(root), str(results), kind])
    lines = map(json.loads, results.read_text().splitlines())
    return root, {tuple(line.pop("case")): line for line in lines}


@pytest.mark.attack
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_hostile_checkpoint_is_refused(hostile: tuple[Path, Outcomes], kind: str, name: str):
    root, outcomes = hostile
    assert (kind, name) in outcomes, "the process ended before, see the case that hung"
    check_refused(kind, name, outcomes[kind, name], root / kind / name)
