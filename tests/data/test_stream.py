"""Streams: every record once an epoch, dealt to ranks and workers, the same order for the same seed."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.tiny_parts import Parts
from vlm.config.dataset_schema import DatasetConfig, MixtureSourceConfig
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.skipped import Skipped
from vlm.data.stream import SampleStream, open_stream

NUMBER = 24


@pytest.fixture
def encoder(parts: Parts) -> SampleEncoder:
    return SampleEncoder(parts.processor(), 60, truncate=False)


def write(path: Path, name: str, number: int = NUMBER) -> str:
    """Records of text only, whose replies are their names."""
    turns = [[{"from": "human", "value": "who?"}, {"from": "gpt", "value": f"{name}{n}."}] for n in range(number)]
    path.write_text("".join(f"{json.dumps({'id': f'{name}{n}', 'conversations': t})}\n" for n, t in enumerate(turns)))
    return str(path)


def names(stream: SampleStream, items: Any) -> list[str]:
    """The replies, as they were learnt."""
    decode = stream.processor.tokenizer.decode
    return [decode([label for label in item["labels"] if label >= 0]).partition(".")[0] for item in items]


@pytest.fixture
def opened(tmp_path: Path, encoder: SampleEncoder):
    """`opened(rank, ranks, seed, **keys)`: a stream of `a0` … `a23`."""
    path = write(tmp_path / "a.jsonl", "a")

    def make(rank: int = 0, ranks: int = 1, seed: int = 0, **keys: Any) -> SampleStream:
        config = DatasetConfig(**{"path": path, "shuffle_buffer": 5, **keys}, streaming=True)
        return open_stream(config, encoder, seed=seed, rank=rank, world_size=ranks)

    return make


def test_an_epoch_has_every_record_once_in_another_order(opened):
    stream = opened()
    first, second = (names(stream, part) for part in (islice(stream, NUMBER), islice(stream, NUMBER, 2 * NUMBER)))
    everything = sorted(f"a{number}" for number in range(NUMBER))
    assert sorted(first) == everything
    two_epochs = names(stream, islice(stream, 2 * NUMBER))
    assert two_epochs[:NUMBER] == first
    assert sorted(two_epochs[NUMBER:]) == everything
    assert two_epochs[NUMBER:] == second != first
    assert first != everything


def test_the_seed_decides(opened):
    first, again, other = (names(s, islice(s, NUMBER)) for s in (opened(), opened(), opened(seed=1)))
    assert first == again != other


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2)])
def test_ranks_and_workers_share_the_records(opened, ranks: int, workers: int):
    seen: Counter[str] = Counter()
    for rank in range(ranks):
        stream = opened(rank, ranks)
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        seen.update(names(stream, islice(loader, NUMBER // ranks)))
    assert seen == Counter(f"a{number}" for number in range(NUMBER))


def test_sources_are_drawn_from_by_weight(tmp_path: Path, encoder: SampleEncoder):
    sources = {
        name: MixtureSourceConfig(path=write(tmp_path / f"{name}.jsonl", name), weight=weight)
        for name, weight in (("a", 3.0), ("b", 1.0))
    }
    stream = open_stream(DatasetConfig(sources=sources, streaming=True), encoder, seed=0, rank=0, world_size=1)
    drawn = Counter(name[0] for name in names(stream, islice(stream, 400)))
    assert 260 < drawn["a"] < 340


def test_what_cannot_be_used_is_told_and_the_next_follows(opened, tmp_path: Path):
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[3], lines[5] = '{"id": "torn', json.dumps({"id": "long", "conversations": [
        {"from": "human", "value": "x " * 99}, {"from": "gpt", "value": "y"},
    ]})  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    items = list(islice(opened(), NUMBER))
    skipped = sorted((item for item in items if isinstance(item, Skipped)), key=lambda one: one.id)
    assert [(one.id, one.policy) for one in skipped] == [("?", "on_bad_sample"), ("long", "over_length")]
    assert "not JSON" in skipped[0].reason
    assert len(items) - len(skipped) == NUMBER - 2


@pytest.mark.parametrize("place", [0, 3])
def test_a_record_that_is_null_is_no_end(opened, tmp_path: Path, place: int):
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:place], "null", *lines[place + 1 :]]))
    items = list(islice(opened(on_bad_sample="skip"), NUMBER))
    assert sum(isinstance(item, Skipped) for item in items) == 1


def test_the_first_samples_in_order(opened):
    assert [sample.id for sample in opened().samples(3)] == ["a0", "a1", "a2"]


def test_a_stream_without_records_is_refused(tmp_path: Path, opened):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: "):
        opened(path=str(tmp_path / "empty.jsonl"))


def test_more_readers_than_records_are_refused(opened):
    with pytest.raises(ValueError, match=r"no record for reader 31 of 40"):
        next(iter(opened(rank=30, ranks=40)))
