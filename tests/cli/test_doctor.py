"""`vlm doctor`: a report that says what is missing and how to get it, and gives nothing away."""

import json
import tomllib
from pathlib import Path

import pytest

from vlm.assembly import hub_reach
from vlm.cli import doctor_facts
from vlm.cli.doctor_facts import EXTRAS, describe_endpoint, find_facts, hide_home
from vlm.cli.main import main

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:my-password@mirror.example/hub?token=other-secret")
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "https://me:my-password@mirror.example/hub?token=other-secret"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    main(["doctor", "--offline"])
    return capsys.readouterr().out


def test_the_report_tells_what_a_bug_report_needs(report: str):
    for text in (
        "### Versions",
        "- torch: ",
        "- memory: ",
        "free in the current folder",
        "- bf16: works",
        "- gloo: works",
    ):
        assert text in report
    assert "- Hugging Face cache: ~/hub, " in report
    assert "- endpoint: https://mirror.example/hub, not asked (offline)" in report


def test_the_report_gives_nothing_away(report: str, tmp_path: Path):
    for secret in (TOKEN, "my-password", "other-secret", str(tmp_path)):
        assert secret not in report
    assert "- token: there is one" in report


def test_every_extra_is_known():
    assert EXTRAS.keys() == PYPROJECT["project"]["optional-dependencies"].keys()
    assert all(isinstance(modules, tuple) and purpose for modules, purpose in EXTRAS.values())


def test_a_missing_extra_comes_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_facts, "find_spec", lambda name: None)
    extras = dict(next(section for section in find_facts(offline=True) if section.title == "Extras").rows)
    assert extras["quant"] == (
        "missing bitsandbytes, needed for 4-bit and 8-bit models (QLoRA): pip install 'small-vlm[quant]'"
    )
    assert extras["flash"].endswith("pip install --no-build-isolation 'small-vlm[flash]'")


def test_json_holds_the_same_rows(report: str, capsys: pytest.CaptureFixture[str]):
    main(["doctor", "--offline", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert f"- python: {content['Versions']['python']}" in report
    assert list(content) == [line.removeprefix("### ") for line in report.splitlines() if line.startswith("###")]


def test_a_library_that_is_broken_is_reported_and_not_the_end(monkeypatch: pytest.MonkeyPatch):
    def broken() -> str:
        raise RuntimeError("no device\nand more")

    monkeypatch.setattr(doctor_facts, "_try_bf16", broken)
    monkeypatch.setattr(doctor_facts, "_find_machine", lambda: (broken() for _ in "a"))
    sections = {section.title: dict(section.rows) for section in find_facts(offline=True)}
    assert sections["What works here"]["bf16"] == "fails: RuntimeError: no device"
    assert sections["Machine"] == {"failed": "RuntimeError: no device"}


def test_the_hub_is_asked_for_a_connection(monkeypatch: pytest.MonkeyPatch):
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(hub_reach.socket, "create_connection", refuse)
    assert describe_endpoint("https://hub.example", offline=False).startswith(
        "https://hub.example, cannot be reached (Connection refused); "
    )


def test_the_home_folder_is_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert hide_home("/home/someone/data and /mnt/data") == "~/data and /mnt/data"
