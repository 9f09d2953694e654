"""Refusals of features of images that are to be kept: the keys, what was given, what to do."""

from pathlib import Path

import pytest

from tests.fixtures import check_config, compose_config
from vlm.checks.feature_cache import cache_problems
from vlm.checks.fields import ConfigError

CACHE = "dataset.cache_features=true"
REFUSALS = {
    "whole encoder": (
        [CACHE, "trainer.unfreeze.train_vision_model=true", "trainer.learning_rate.visual_encoder_learning_rate=1e-5"],
        f"{CACHE}: features of images are computed once, but trainer.unfreeze.train_vision_model=true changes them",
    ),
    "adapted encoder": (
        [CACHE, "trainer.lora.visual_encoder.r=4", "trainer.learning_rate.visual_encoder_learning_rate=1e-5"],
        f"{CACHE}: features of images are computed once, but trainer.lora.visual_encoder.r=4 changes them",
    ),
    "stream": (
        [CACHE, "dataset.streaming=true", "trainer.max_steps=3", "trainer.packing=false"],
        f"{CACHE}: features of images are computed once, but the images of a stream are not known in advance",
    ),
    "limit alone": (
        ["dataset.cache_limit_gb=3"],
        "dataset.cache_limit_gb=3.0: it has no effect without dataset.cache_features=true",
    ),
    "no limit": (
        [CACHE, "dataset.cache_limit_gb=0"],
        "dataset.cache_limit_gb=0.0: a number above 0, or null, is needed",
    ),
}
"""Overrides -> how the message begins."""


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_the_keys(tmp_path: Path, overrides: list[str], message: str):
    (tmp_path / "records.json").write_text("[]")
    config = compose_config("pretrain-smol", [f"dataset.path={tmp_path / 'records.json'}", *overrides])
    with pytest.raises(ConfigError) as error:
        check_config(config)
    assert str(error.value).startswith(message)


def test_what_fits_is_not_refused(tmp_path: Path):
    for overrides in ([CACHE], [CACHE, "dataset.cache_limit_gb=0.5"], ["dataset.cache_features=false"]):
        config = compose_config("pretrain-smol", [f"dataset.path={tmp_path}", *overrides])
        assert not list(cache_problems(config))


def test_features_of_whole_models_are_not_kept_beside_sharded_weights(tmp_path: Path):
    words = [f"dataset.path={tmp_path}", CACHE, "model.hf_name=some/model"]
    assert not list(cache_problems(compose_config("pretrain-smol", words)))
    (problem,) = cache_problems(compose_config("pretrain-smol", [*words, "trainer/sharding=fsdp2"]))
    assert "not for a whole model with trainer.sharding=fsdp2" in problem
