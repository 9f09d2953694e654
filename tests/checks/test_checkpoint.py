"""What a checkpoint's files tell: names of repositories, run directories, heads, adapters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.checks.checkpoint import check_checkpoint, check_final_folder, is_hub_name


@pytest.mark.parametrize("name", ["owner/name", "llava-hf/llava-1.5-7b-hf", "a_b/c.d"])
def test_a_repository_has_an_owner_and_a_name(name: str):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["zip://a::b", "pipe:x/y", "a/../b", "../b", "/a/b", "a/b/c", "https://host/name", "a b/c", "a/b\n", ""]
)
def test_addresses_and_paths_are_no_names(name: str):
    assert not is_hub_name(name)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Make the folders of three finished runs: `whole`, `adapter` and `head`; only what tells their kinds is there."""
    for name, kind in {"whole": "vlm", "adapter": "vlm", "head": "vlm_prediction"}.items():
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        (final / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    (tmp_path / "adapter" / "final" / "base.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_files_tell_what_a_checkpoint_is(runs: Path):
    whole, adapter, head = (runs / name / "final" for name in ("whole", "adapter", "head"))
    check_checkpoint(whole, heads=False, adapter=False)
    check_checkpoint(adapter, heads=False, adapter=True)
    check_checkpoint(head, heads=True, adapter=False)
    check_checkpoint("owner/name", heads=True, adapter=True)  # its files are on the Hub
    with pytest.raises(ValueError, match="no prediction heads: ask it with vlm generate"):
        check_checkpoint(whole, heads=True)
    with pytest.raises(ValueError, match="has no adapter"):
        check_checkpoint(whole, adapter=True)
    (whole / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        check_checkpoint(whole, heads=False)


def test_an_intermediate_checkpoint_is_not_published(runs: Path):
    folder = runs / "whole" / "final"
    check_final_folder(folder)
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="an intermediate checkpoint, for resuming"):
        check_final_folder(folder)


MISTAKES = {
    "generate whole --prompt hi": "its model is whole/final",
    "generate head/final --prompt hi": "has prediction heads: ask it with vlm predict",
    "chat head/final": "has prediction heads: ask it with vlm predict",
    "eval whole --data records.json": "its model is whole/final",
    "eval head/final --data records.json": "has prediction heads: ask it with vlm predict",
    "compare-models whole/final head/final --data records.json": "has prediction heads: ask it with vlm predict",
    "predict whole/final --prompt hi": "has no prediction heads: ask it with vlm generate",
    "export whole out --format llava": "its model is whole/final",
    "export adapter/final out --format gguf": "vlm merge-lora adapter/final MERGED",
    "export whole/final out --format vllm-lora": "has no adapter",
    "merge-lora adapter out": "its model is adapter/final",
    "serve whole": "its model is whole/final",
    "push-to-hub whole --repo me/it --yes": "its model is whole/final",
    "push-to-hub adapter/final --repo me/it --yes": "add --merge",
    "push-to-hub whole/final --repo me/it --yes": "no token found",
}
"""Command line -> what its error says."""

TELL_ALL = """
import sys
from vlm.cli.main import main
for line in sys.stdin.read().splitlines():
    try:
        main(line.split())
    except SystemExit as stop:
        print(stop.code)
    slow = {"torch", "transformers"} & sys.modules.keys()
    assert not slow, (line, slow)
"""


def test_commands_tell_what_files_tell_before_torch_is_imported(runs: Path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    records = json.dumps([{"id": "a", "conversations": turns}])
    (runs / "records.json").write_text(records, encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-c", TELL_ALL], cwd=runs, input="\n".join(MISTAKES), capture_output=True, text=True,
        check=True, env={"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(runs)},
    ).stdout.splitlines()  # fmt: skip
    assert len(told) == len(MISTAKES), told
    assert [said for said, words in zip(told, MISTAKES.values(), strict=True) if words not in said] == []
