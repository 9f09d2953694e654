"""`vlm models --check`: the verdicts of a folder and of a type, its exit status, and its files."""

import json
from pathlib import Path

import pytest

from tests.families.tiny_families import save_family
from vlm.assembly.family_trial import table
from vlm.assembly.family_trial.catalogue import TriedType
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.table import PROOFS
from vlm.assembly.family_trial.verdicts import DisprovedError, State, Verdict
from vlm.cli import model_check
from vlm.cli.main import main

PROVED = dict.fromkeys(PROOFS, Verdict(State.PROVED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-Interleave."""
    root = tmp_path_factory.mktemp("family")
    save_family("llava-interleave", root)
    return root


def test_a_folder_is_checked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["models", "--check", str(folder), "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [[name, "proved"] for name in PROOFS]
    assert json.loads((tmp_path / "a.json").read_text())["types"]["llava"] == dict.fromkeys(PROOFS, "proved")
    assert "| `llava`" in (tmp_path / "a.md").read_text()


def test_a_failed_proof_is_the_exit_status(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(subject: Subject) -> None:
        raise DisprovedError("the replies are not supervised")

    for name in PROOFS:
        monkeypatch.setitem(table.PROOFS, name, lambda subject: None)
    monkeypatch.setitem(table.PROOFS, "packing", fail)
    main(["models", "--check", str(folder)])  # only runs that pack rows need it
    monkeypatch.setitem(table.PROOFS, "labels", fail)
    with pytest.raises(SystemExit) as ended:
        main(["models", "--check", str(folder)])
    assert ended.value.code == 1
    assert "failed     the replies are not supervised" in capsys.readouterr().out


def test_all_types_are_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    unpacked = {**PROVED, "packing": Verdict(State.FAILED, "samples see each other")}
    given: list[str] = []

    def try_types(types: list[str]) -> list[TriedType]:
        given.extend(types)
        return [TriedType("qwen3_vl", PROVED, 1.0), TriedType("gemma3", unpacked, 2.0)]

    monkeypatch.setattr(model_check, "try_types", try_types)
    main(["models", "--check", "all"])
    said = capsys.readouterr()
    assert {"qwen3_vl", "gemma4", "evolla", "phi4_multimodal"} < set(given)
    assert "qwen3_vl  all proved\ngemma3    packing failed" in said.out
    assert f"[2/{len(given)}] gemma3: 11 proved, 1 failed (2.0 s)" in said.err
    main(["models", "--check", "gemma3"])
    assert given[-1] == "gemma3"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--check", "/nowhere/at/all"], "vlm models: /nowhere/at/all"),
        (["--json", "a.json"], "2"),
    ],
)
def test_what_cannot_be_checked_is_told(words: list[str], told: str):
    with pytest.raises(SystemExit) as ended:
        main(["models", *words])
    assert str(ended.value.code).startswith(told)
