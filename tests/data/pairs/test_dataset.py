"""Pairs as data sets and batches: every member is encoded as a prompt of its side, distinct ones once."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_parts import Parts
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY, Collator
from vlm.data.dataset import load_dataset
from vlm.data.encoding.labels import encode_prompt
from vlm.data.pairs.dataset import MemberDataset, PairCollator, PairDataset, find_members
from vlm.data.pairs.encoder import PairEncoder
from vlm.data.sample import Turn
from vlm.data.skipped import Skipped

RECORDS: list[dict[str, Any]] = [
    {"query": {"image": "0.png"}, "positive": "a red square", "negatives": ["a blue one", "a circle"]},
    {"query": {"text": "which?", "image": "1.png"}, "positive": "a blue one"},
    {"query": {"image": "0.png"}, "positive": {"image": "1.png"}},
]


@pytest.fixture(scope="module")
def pairs(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PairDataset]:
    folder = tmp_path_factory.mktemp("pairs")
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (24, 24), colour).save(folder / f"{number}.png")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    _, processor = parts.model("clip", "llama")

    def load(**fields: Any) -> PairDataset:
        encoder = PairEncoder(processor, **{"longest": 500, "truncate": False, **fields})
        config = DatasetConfig(path=str(folder / "pairs.jsonl"), format="pair", cache_dir=str(folder / "cache"))
        return PairDataset(load_dataset(config, encoder))

    return load


def test_members_are_prompts_of_their_sides(pairs: Callable[..., PairDataset]):
    dataset = pairs(suffix=(3,), query_prompt="Find it.", document_prompt="Represent it.")
    processor = dataset.dataset.processor
    item = dataset[0]
    assert not isinstance(item, Skipped)
    expected = [
        encode_prompt(processor, [Turn("system", (prompt,)), *member.turns[-1:]])
        for prompt, member in zip(["Find it.", *["Represent it."] * 3], dataset.members(0), strict=True)
    ]
    assert [inputs["input_ids"] for inputs in item["members"]] == [[*ids, 3] for ids in expected]
    assert dataset.lengths[0] == max(map(len, expected)) + 1
    whole = dataset.dataset.encoded(0)
    assert whole.input_ids == [token for ids in expected for token in (*ids, 3)]


def test_a_batch_has_a_row_for_each_member(pairs: Callable[..., PairDataset]):
    dataset = pairs()
    collate = PairCollator(Collator.of(dataset.dataset.processor, deduplicate=("pixel_values",)), "label")
    skipped = Skipped(5, "5", "broken", None, "pairs")
    batch: Any = collate([dataset[0], skipped, dataset[1], dataset[2]])
    assert batch["labels"]["label"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert len(batch["input_ids"]) == len(batch["groups"]) == 8
    keys = batch["groups"].tolist()
    assert (keys[0], keys[4]) == (keys[2], keys[6]), "equal queries; a positive that is another's negative"
    assert len(set(keys)) == 6
    assert len(batch["pixel_values"]) == 2, "equal images stand once"
    assert batch[SKIPPED_KEY] == [skipped]
    assert [ref.record for ref in batch[SAMPLE_REFS]] == [0, 1, 2]
    nothing: Any = collate([skipped])
    assert torch.isnan(nothing["labels"]["label"]).tolist() == [True]


def test_distinct_members_are_measured_once(pairs: Callable[..., PairDataset]):
    dataset = pairs()
    members = find_members(dataset)
    assert len(members.places) == 6
    assert members.queries[0] == members.queries[2] != members.queries[1]
    assert members.positives[1] in members.documents.tolist()
    assert len(members.documents) == 4, "three texts and an image"
    rows = MemberDataset(dataset, members)
    blank = MemberDataset(dataset, members, blank=True)
    first, without = rows[0], blank[0]
    assert not isinstance(first, Skipped)
    assert not isinstance(without, Skipped)
    assert first["input_ids"] == without["input_ids"]
    assert not torch.equal(first["pixel_values"], without["pixel_values"])
    collate = PairCollator(Collator.of(dataset.dataset.processor), "label")
    assert "labels" not in collate([first, without])


def test_a_member_that_is_too_long_leaves_its_record_out(pairs: Callable[..., PairDataset]):
    with pytest.raises(ValueError, match="tokens, at most 12 are allowed"):
        pairs(longest=12)
