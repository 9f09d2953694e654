"""Two ranks: a preflight and `trainer.auto_batch` before a run, and what each rank holds against what was predicted."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.preflight_ranks import WITHIN, Held, file_of, words_of_way
from tests.fixtures import losses
from tests.forked import run_ranks
from tests.train.preflight.conftest import WORDS

SHORT = [*WORDS, "trainer.max_steps=2", "trainer.save_strategy=no", "dataset.max_length=64"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["none", "zero2", "zero3", "fsdp2"])
def test_a_run_begins_behind_its_preflight_with_rows_that_fit_every_rank(common: list[str], tmp_path: Path, way: str):
    auto = ["preflight=true", "trainer.auto_batch=true", "trainer.auto_batch_memory_gb=5"]
    words = ["-cn", "finetune-smol", *common, *SHORT, *auto, *words_of_way(way, tmp_path)]
    for ended in run_ranks("vlm", [*words, f"trainer.output_dir={tmp_path / 'run'}"]):
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_tokens_per_batch"] == 512
    sharded = "on each of 2 ranks" if way == "none" else f"on each of 2 ranks with {way}"
    assert sharded in (tmp_path / "run" / "preflight.html").read_text(encoding="utf-8")
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_each_rank_holds_what_is_predicted(common: list[str], tmp_path: Path):
    ways = ("none", "zero1", "zero2", "zero3", "fsdp2")
    words = ["--inspect", str(tmp_path), ",".join(ways), *common, *WORDS]
    for ended in run_ranks("benchmarks.preflight_ranks", words):
        assert ended.returncode == 0, ended.stderr[-3000:]
    held = {way: Held(**json.loads(file_of(way, tmp_path).read_text())) for way in ways}
    off = {(way, name): value for way, found in held.items() for name, value in found.off().items()}
    del off["fsdp2", "peak"]  # weights that it has freed count as well
    assert {key: value for key, value in off.items() if abs(value) > WITHIN} == {}
