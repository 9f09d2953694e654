"""Records on their way to a model: together by length, in windows that begin at the same places, each row kept once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.data.sample import BadSample, Sample
from vlm.inference.batch import WINDOW_BATCHES, Prompt, PromptDataset, batch_by_length, read_windows
from vlm.inference.resumable_table import ResumableTable


def prompt(number: int, length: int) -> Prompt:
    return Prompt(number, Sample(str(number), ()), {"input_ids": [1] * length})


def test_records_of_like_length_are_asked_together_the_longest_first():
    lengths = [5, 90, 7, 80, 6, 70, 8]
    bad = Prompt(7, Sample("7", ()), {}, BadSample("7", "broken"))
    batches = batch_by_length([*map(prompt, range(7), lengths), bad], 3)
    assert [[one.number for one in batch] for batch in batches] == [[1, 3, 5], [6, 2, 4], [0]]


class FakeSource:
    """A source whose records are tensors of their own number; every third is broken."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def read(self: PromptDataset, index: int) -> tuple[Sample, Any]:
    number = self.start + index
    item = {"input_ids": [number], "labels": [-100], "pixel_values": torch.full((1, 3), number, dtype=torch.uint8)}
    return Sample(str(number), ()), BadSample(str(number), "broken") if number % 3 == 2 else item


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("done", "first"), [(set(), 0), (set(range(WINDOW_BATCHES * 2)), WINDOW_BATCHES * 2), ({0, 1, 3}, 0)]
)
def test_windows_begin_at_the_same_places(
    done: set[int], first: int, num_workers: int, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    monkeypatch.setattr(PromptDataset, "__getitem__", read)
    size = 2 * WINDOW_BATCHES
    source: Any = FakeSource(size + 5)
    windows = list(read_windows(source, done, 2, num_workers))
    found = [one for window in windows for one in window]
    assert [one.number for one in found] == list(range(first, size + 5))
    assert [window[0].number for window in windows] == [one for one in (0, size) if one >= first]
    for one in found:
        assert (one.problem is not None) == (one.number % 3 == 2) == (not one.inputs)
        if one.inputs:
            assert one.inputs["input_ids"] == [one.number]
            assert torch.equal(one.inputs["pixel_values"], torch.full((1, 3), one.number, dtype=torch.uint8))


def test_nothing_is_read_where_all_is_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PromptDataset, "__getitem__", read)
    source: Any = FakeSource(4)
    assert list(read_windows(source, set(range(4)), 2, 0)) == []


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_table_has_the_order_of_its_records(tmp_path: Path, ending: str):
    table = ResumableTable(tmp_path / f"a.{ending}", ["name"], "f")
    assert table.begin_or_resume(overwrite=False) == set()
    with table.open_writer() as write:
        write([(2, {"name": "c"}), (0, {"name": "é"})])
    with table.partial.open("a") as file:
        file.write('[1, {"na')
    assert table.begin_or_resume(overwrite=False) == {0, 2}
    with table.open_writer() as write:
        write([(2, {"name": "later"}), (1, {"name": "b"})])
    assert table.rows() == [{"name": "é"}, {"name": "b"}, {"name": "later"}]
    table.finalize()
    written = table.path.read_text(encoding="utf-8").splitlines()
    assert written[-3:] == (
        ["é", "b", "later"] if ending == "csv" else ['{"name": "é"}', '{"name": "b"}', '{"name": "later"}']
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [table.path.name]


def test_rows_of_another_form_are_not_gone_on_with(tmp_path: Path):
    table = ResumableTable(tmp_path / "a.jsonl", [], "f")
    table.metadata.write_text(json.dumps({"fingerprint": "f"}))
    table.partial.write_text('{"name": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl\.partial was started with another checkpoint"):
        table.begin_or_resume(overwrite=False)
    assert table.begin_or_resume(overwrite=True) == set()
