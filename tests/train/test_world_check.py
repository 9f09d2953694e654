"""What ranks must have in common, and how they are told that they do not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.forked import find_free_port, run_forked
from vlm.train.world_check import check_equal, check_same_data, describe_difference, flatten


def test_each_rank_that_differs_is_named_with_what_it_has():
    facts = [{"seed": 1, "torch": "2"}, {"seed": 1, "torch": "2"}, {"seed": 3, "torch": "2"}, {"seed": 3}]
    assert describe_difference(facts) == (
        "seed is 3 on rank 2, 3 and 1 on rank 0; torch is None on rank 3 and '2' on rank 0"
    )
    assert describe_difference(facts[:2]) == ""


def test_a_long_list_is_cut():
    facts = [{str(number): rank for number in range(9)} for rank in range(2)]
    assert describe_difference(facts).endswith("; and 4 more")


def test_nested_keys_are_dotted():
    assert flatten({"trainer": {"unfreeze": {"a": 1}, "optim": None}, "dataset": {"sources": {}}}) == {
        "trainer.unfreeze.a": 1, "trainer.optim": None, "dataset.sources": {},
    }  # fmt: skip


def test_a_single_rank_agrees_with_itself():
    check_equal({"seed": 1}, "")


def test_ranks_with_other_commands_and_data_do_not_train(common: list[str], tmp_path):
    """Each says so, and in what it differs."""
    port = find_free_port()
    environments = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in ("0", "1")
    ]
    words = ["-cn", "pretrain-smol", *common, f"trainer.output_dir={tmp_path / 'run'}"]
    commands = [["-m", "vlm", *words, f"trainer.seed={seed}"] for seed in (1, 2)]
    ended = run_forked(*commands, environments=environments)
    assert any("ranks do not agree: trainer.seed is 2 on rank 1 and 1 on rank 0" in one.stderr for one in ended)
    assert not (tmp_path / "run").exists()


def test_data_of_another_content_is_named():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.train.world_check.all_gather_objects", lambda facts: [facts, {"train data: samples": 3}])
        with pytest.raises(ValueError, match=r"samples is 3 on rank 1 and 4 on rank 0\. Give every machine the same"):
            check_equal({"train data: samples": 4}, "Give every machine the same files")


def test_files_of_a_stream_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on machines with copies of their own, one of them cut short."""
    files = [tmp_path / name / "part.jsonl" for name in ("first", "second")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text("x" * (9 - number))
    gathered: list[dict[str, object]] = []
    streams: list[Any] = [SimpleNamespace(sources=[SimpleNamespace(name="web", path=str(file))]) for file in files]
    monkeypatch.setattr("vlm.train.world_check.check_equal", lambda facts, advice: gathered.append(facts))
    for stream in streams:
        check_same_data({"train": stream})
    assert describe_difference(gathered).startswith("train data, web: files is ")
