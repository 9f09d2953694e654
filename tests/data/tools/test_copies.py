"""Copies that `vlm data stats` reports: near copies, overlap with evaluation records, and how many were compared."""

import json
from pathlib import Path

import pytest

from tests.data.test_overlap import record
from tests.data.vision.test_similarity import scene
from tests.tiny_parts import Parts
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.tools.copies import describe_copies


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    for seed in range(6):
        scene(seed).save(tmp_path / f"{seed}.png")
    scene(0).resize((80, 60)).save(tmp_path / "copy.jpg")
    names = [*(f"{seed}.png" for seed in range(5)), "copy.jpg"]
    (tmp_path / "train.json").write_text(json.dumps([record(name, name, "what?", "that") for name in names]))
    (tmp_path / "val.json").write_text(json.dumps([record("val", "1.png", "what?", "that")]))
    (tmp_path / "test.json").write_text(json.dumps([record("test", "5.png", "what?", "that")]))
    train, evaluation, test, cache = (str(tmp_path / name) for name in ("train.json", "val.json", "test.json", "cache"))
    return DatasetConfig(path=train, eval_path=evaluation, test_path=test, cache_dir=cache)


def test_near_copies_and_overlap_are_told_with_examples(config: DatasetConfig, parts: Parts):
    told = describe_copies(config, SampleEncoder(parts.processor(), 200, truncate=False), 100)
    assert "1 of 6 different image files look like an earlier one" in told
    assert "copy.jpg looks like" in told
    evaluation, test = told.partition("── overlap with dataset.eval_path")[2].split("── overlap with dataset.test_path")
    assert "of 1 evaluation records, 1 share an image with the training data" in evaluation
    assert "val.json, record 0 (val) shares the image" in evaluation
    assert "of 1 evaluation records, 0 share an image with the training data, 0 have a near copy" in test
    assert "(--compare N)" not in told


def test_how_many_of_many_records_are_compared_is_told(config: DatasetConfig, parts: Parts):
    told = describe_copies(config, SampleEncoder(parts.processor(), 200, truncate=False), 2)
    assert "train.json: 2 of 6 records are compared (--compare N)" in told
    assert "1 of 2 different image files look like an earlier one" in told
