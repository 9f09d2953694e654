"""Overlap of training with evaluation data: which records are found, and what a run does about them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.data.vision.test_similarity import scene
from tests.tiny_parts import Parts
from vlm.config.dataset_schema import DatasetConfig
from vlm.data import overlap as module
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.overlap import check_overlap, find_near_copies, find_overlap, scan, text_digests
from vlm.data.sample import Sample, Turn
from vlm.data.sources import Source, make_sources

LONG = "A red bird sits on the thin branch of a tall tree and sings to the evening sun"


def record(name: str, image: str | None, asked: str, reply: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{asked}" if image else asked}, {"from": "gpt", "value": reply}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


TRAINING = [
    record("t0", "0.png", "what?", "a cat"),
    record("t1", "1.png", "what?", f"Look! {LONG}."),
    record("t2", None, "Two and two?", "Four."),
    record("lost", "no.png", "what?", "a cat"),
    record("t3", "2.png", "what?", "a dog"),
]
EVALUATION = [
    record("same image", "0.png", "who?", "nobody"),
    record("near image", "2.jpg", "what?", "a dog"),
    record("same reply", "7.png", "why?", LONG.upper() + ", he says"),
    record("same conversation", None, "two, and TWO?", "four"),
    record("short reply", "8.png", "what?", "a cat"),
    record("other text", None, "Two and three?", "Four."),
]


@pytest.fixture
def sources(tmp_path: Path, parts: Parts) -> tuple[Source, Source]:
    for seed in (0, 1, 2, 7, 8):
        scene(seed).save(tmp_path / f"{seed}.png")
    scene(2).resize((120, 90)).save(tmp_path / "2.jpg", quality=80)
    encoder = SampleEncoder(parts.processor(), 200, truncate=False)
    found = []
    for name, records in (("train.json", TRAINING), ("val.json", EVALUATION)):
        (tmp_path / name).write_text(json.dumps(records))
        config = DatasetConfig(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        found += make_sources(config, encoder)
    return found[0], found[1]


def placed(source: Source) -> Any:
    """All records of a source, one of them twice, as a data set has them."""
    places = np.array([(0, number) for number in [*range(len(source)), 0]])
    return SimpleNamespace(sources=[source], places=places)


def test_records_that_are_in_both_are_found(sources: tuple[Source, Source]):
    training, evaluation = (scan(source, range(len(source))) for source in sources)
    found = find_overlap(training, list(evaluation))
    assert (found.evaluated, found.compared) == (6, 4)
    assert (found.same_image, found.near_image, found.same_text) == (1, 1, 2)
    told = "\n".join(found.examples)
    assert "val.json, record 0 (same image) shares the image" in told
    assert "val.json, record 1 (near image) has a near copy of" in told
    assert "val.json, record 2 (same reply) shares a text with train.json, record 1 (t1)" in told
    assert "val.json, record 3 (same conversation) shares a text with train.json, record 2 (t2)" in told
    assert "short reply" not in told
    assert "other text" not in told


def test_a_run_warns_or_is_refused_and_compares_once(sources: tuple[Source, Source], caplog, monkeypatch):
    training, evaluation = map(placed, sources)
    check_overlap(DatasetConfig(overlap="allow"), training, evaluation)
    check_overlap(DatasetConfig(overlap="refuse"), training, None)
    assert not caplog.text
    check_overlap(DatasetConfig(overlap="warn"), training, evaluation)
    assert "dataset.overlap=warn: of 6 evaluation records, 1 share an image with the training data" in caplog.text
    monkeypatch.setattr(module, "scan", None)  # the result is in the cache
    with pytest.raises(ValueError, match=r"dataset.overlap=refuse: of 6 .*; the first: val.json, record 0 .*=warn"):
        check_overlap(DatasetConfig(overlap="refuse"), training, evaluation)


def test_no_overlap_is_told_too(sources: tuple[Source, Source], caplog: pytest.LogCaptureFixture):
    training, evaluation = map(placed, sources)
    evaluation.places = evaluation.places[4:6]
    caplog.set_level("INFO")
    check_overlap(DatasetConfig(overlap="refuse"), training, evaluation)
    assert "no evaluation record was found in the training data" in caplog.text


def test_near_copies_within_a_source(sources: tuple[Source, Source], tmp_path: Path):
    both = [one for source in sources for one in scan(source, range(len(source)))]
    found = find_near_copies(both)
    assert (found.images, found.copies) == (6, 1)
    assert found.examples == [f"{tmp_path / '2.jpg'} looks like {tmp_path / '2.png'}"]


def test_texts_are_compared_without_case_punctuation_and_system_turns():
    def sample(*texts: str) -> Sample:
        roles = ("system", "user", "assistant")[-len(texts) :]
        return Sample("a", tuple(Turn(role, (text,)) for role, text in zip(roles, texts, strict=True)))

    assert text_digests(sample("be kind", "Who?", "He.")) == text_digests(sample("who", "he"))
    assert not text_digests(sample("who", "he")) & text_digests(sample("who", "she"))
    assert len(text_digests(sample("who", " ".join(map(str, range(14)))))) == 3
