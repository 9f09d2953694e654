"""The verdicts of many types: a process for each, and the files with the table of all."""

import json
import os
import time
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import pytest

from vlm.assembly.family_trial.catalogue import (
    has_failed,
    is_untried,
    not_made,
    passes,
    report_progress,
    try_type,
    try_types,
    write_json,
    write_markdown,
)
from vlm.assembly.family_trial.table import PROOFS
from vlm.assembly.family_trial.verdicts import State, Verdict

DOZEN = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "internvl",
    "gemma3", "paligemma", "mistral3",
)  # fmt: skip
"""Types of which the table in the documentation is held to what a trial finds today."""

PROVED = dict.fromkeys(PROOFS, Verdict(State.PROVED))
FAILED = {**PROVED, "labels": Verdict(State.FAILED, "`<end>` is not supervised")}
UNPACKED = {**PROVED, "packing": Verdict(State.FAILED, "samples see each other")}
PARTLY = {**PROVED, "saving": Verdict(State.NOT_MADE, "no disk"), "sight": Verdict(State.NOT_MADE, "no disk")}


def try_badly(model_type: str) -> dict[str, Verdict]:
    """Crash, hang, or find everything proved, as the type says."""
    if model_type == "crashes":
        os._exit(3)
    if model_type == "hangs":
        time.sleep(600)
    return PROVED


def test_a_type_that_crashes_or_hangs_ends_alone():
    tried = {one.model_type: one.verdicts for one in try_types(["crashes", "good"], 60, try_badly)}
    assert tried["good"] == PROVED
    assert "its process ended with exit code 3" in tried["crashes"]["parts"].reason
    (hung,) = try_types(["hangs"], 0.1, try_badly)
    assert {verdict.state for verdict in hung.verdicts.values()} == {State.NOT_MADE}
    assert "exit code -9" in hung.verdicts["labels"].reason


def test_a_type_is_tried_with_a_processor_of_its_own_classes():
    assert passes(try_type("llava"))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DOZEN)
def test_the_table_says_what_a_trial_finds(model_type: str):
    kept = json.loads(resources.files("vlm.families").joinpath("proved.json").read_text(encoding="utf-8"))
    if kept["transformers"] != version("transformers"):
        pytest.skip("the table was written with another version of transformers")
    found = {name: verdict.state for name, verdict in try_type(model_type).items()}
    assert found == {name: Verdict.parse(text).state for name, text in kept["types"][model_type].items()}


def test_a_type_of_which_no_small_model_is_made_says_why():
    verdicts = try_type("evolla")
    assert is_untried(verdicts)
    assert "it reads proteins" in verdicts["parts"].reason


@pytest.mark.parametrize(
    ("verdicts", "failed", "passed"),
    [
        (PROVED, False, True),
        (FAILED, True, False),
        (UNPACKED, False, True),
        (PARTLY, False, False),
        (not_made("why"), False, False),
    ],
)
def test_packing_is_for_runs_that_pack(verdicts: dict[str, Verdict], failed: bool, passed: bool):
    assert has_failed(verdicts) == failed
    assert passes(verdicts) == passed


def test_the_files_say_what_is_proved_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tried = {"good": PROVED, "bad": FAILED, "apart": UNPACKED, "partly": PARTLY, "odd": not_made("it reads | proteins")}
    write_json(tried, tmp_path / "a.json")
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept.keys() == {"transformers", "date", "types"}
    assert kept["types"]["bad"]["labels"] == "failed: `<end>` is not supervised"
    assert kept["types"]["good"]["labels"] == "proved"
    write_markdown(tried, tmp_path / "a.md")
    page = (tmp_path / "a.md").read_text()
    assert "of 5 types, 2 pass all proofs that a run needs, 1 of them `packing` too" in page
    assert "| `bad` | yes" in page.replace("  ", " ").replace("  ", " ")
    assert "- `bad`, labels failed: `&lt;end>` is not supervised" in page
    assert "- `partly`, sight, saving not made: `no disk`" in page
    assert "- `odd` is not tried: `it reads | proteins`" in page
    assert "| `odd`" not in page
    (tried_once,) = try_types(["good"], 60, try_badly)
    report_progress(tried_once, 1, 2)
    assert f"[1/2] good: {len(PROOFS)} proved (" in capsys.readouterr().err
