"""The folders and commands of the runs of a sweep."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm.checks.fields import ConfigError
from vlm.checks.sweep import (
    check_direction,
    is_sweep,
    job_name,
    place_run,
    register_resolvers,
    words_of_run,
    worst_value,
)

WORDS = [
    "-m",
    "-cn",
    "finetune-smol",
    "dataset.path=train.json",
    "trainer.seed=1,2",
    "+model.connector.options.width=2,4",
]


@contextmanager
def hydra(overrides: Sequence[str], folder: Path, **sweeper: str) -> Iterator[None]:
    """Hydra's settings as a run of a sweep sees them."""
    sweep = {"dir": str(folder), "subdir": "seed-1"}
    content = {"mode": RunMode.MULTIRUN, "sweep": sweep, "sweeper": sweeper, "overrides": {"task": list(overrides)}}
    before, HydraConfig.instance().cfg = HydraConfig.instance().cfg, OmegaConf.create({"hydra": content})
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def test_a_run_is_named_by_what_the_sweep_sets():
    own = ["dataset.path=train.json", "trainer.seed=1", "+model.connector.options.width=4"]
    assert job_name(own, WORDS) == "seed-1--width-4"
    assert job_name(own[:1], WORDS[:4]) == "."


def test_what_a_sweeper_draws_itself_names_the_run_and_secrets_do_not():
    own = ["dataset.path=train.json", "trainer.warmup_steps=0.03", "trainer.hub_token=hush"]
    assert job_name(own, WORDS[:4]) == "warmup_steps-0.03"


def test_a_run_of_a_sweep_gets_its_folder_and_secrets_beside_it_are_masked(tmp_path: Path):
    composed = OmegaConf.create({"trainer": {"output_dir": None}})
    file = tmp_path / "multirun.yaml"
    file.write_text("- trainer.hub_token=hf_abcdefghijklmnopqrst\n")
    assert not is_sweep()
    with hydra(["trainer.seed=1"], tmp_path):
        assert is_sweep()
        place_run(composed)
    assert composed.trainer.output_dir == str(tmp_path / "seed-1")
    assert "abcdefg" not in file.read_text()


def test_ranks_have_to_agree_on_the_folder(monkeypatch: pytest.MonkeyPatch):
    register_resolvers()
    config = OmegaConf.create({"output_dir": None, "folder": "${sweep_folder:${output_dir},smol,now}"})
    assert config.folder == "outputs/smol-sweep-now"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        OmegaConfBaseException, match=r"--multirun on 2 ranks: .*add trainer\.output_dir=outputs/smol-sweep"
    ):
        print(config.folder)
    config.output_dir = "out"
    assert config.folder == "out"


def test_the_command_of_a_run_repeats_it_alone(tmp_path: Path):
    words = [*WORDS, "--config-dir", "mine", "trainer.output_dir=sweep", "hydra/sweeper=optuna"]
    with hydra(["dataset.path=train.json", "trainer.seed=1", "trainer.output_dir=sweep"], tmp_path):
        assert words_of_run(words) == [
            "-cn", "finetune-smol", "--config-dir", "mine", "dataset.path=train.json", "trainer.seed=1",
            f"trainer.output_dir={tmp_path / 'seed-1'}",
        ]  # fmt: skip


def test_a_search_in_the_wrong_direction_is_refused(tmp_path: Path):
    with hydra([], tmp_path, direction="minimize"):
        check_direction(None, lower_is_better=True)
        with pytest.raises(ConfigError, match=r"exact_match is better when it is higher.*direction=maximize"):
            check_direction("exact_match", lower_is_better=False)
        assert worst_value() == math.inf
    with hydra([], tmp_path, direction="maximize"):
        assert worst_value() == -math.inf
    with hydra([], tmp_path):
        check_direction("exact_match", lower_is_better=False)
