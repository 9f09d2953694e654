"""Records of a file as samples: checked and counted at the start, with a policy for those that are bad or too long."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_parts import IGNORED, Parts, picture
from vlm.config.schema import DatasetConfig
from vlm.data.dataset import BlankPictures, SampleDataset, Skipped, check_picture, load_dataset, split_dataset
from vlm.data.encode import encode
from vlm.data.sample import BadSample
from vlm.models import VLMProcessor

LONGEST = 60
"""Tokens; the good records below have fewer."""


@pytest.fixture(scope="module")
def processor(parts: Parts) -> VLMProcessor:
    """CLIP at 24 pixels (9 patches), Llama, ChatML."""
    return parts.processor()


def record(number: int, images: list[str], reply: str = "a cat") -> dict[str, Any]:
    asked = "".join("<image>\n" for _ in images) + "what?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": reply}]
    return {"id": f"r{number}", "image": images, "conversations": turns}


@pytest.fixture
def load(tmp_path: Path, processor: VLMProcessor) -> Callable[..., SampleDataset]:
    """`load(records, most=None, **policies)`: a dataset of these records, whose pictures are `0.png` to `3.png`."""
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])

    def make(records: list[Any], most: int | None = None, **policies: Any) -> SampleDataset:
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        config = DatasetConfig(path=str(path), **policies)
        return load_dataset(config, str(path), None, processor, LONGEST, show_progress=False, most=most)

    return make


GOOD = [record(0, ["0.png"]), record(1, [], "two"), record(2, ["1.png", "2.png"], "a mat"), record(3, ["3.png"])]
LONG = record(9, ["0.png"], "a cat " * 40)
HUGE_PROMPT = {**record(8, ["0.png"]), "conversations": [
    {"from": "human", "value": "<image>\n" + "what? " * 60}, {"from": "gpt", "value": "a cat"},
]}  # fmt: skip
MANY_PICTURES = record(7, [f"{number % 4}.png" for number in range(8)])


# Samples


def test_lengths_and_pictures_are_known_beforehand(load, processor: VLMProcessor):
    data = load(GOOD)
    assert len(data) == 4
    assert data.lengths == [len(data[index]["input_ids"]) for index in range(4)]
    assert data.num_images == [1, 0, 2, 1]
    assert (data.skipped, data.num_truncated) == ([], 0)


def test_a_sample_is_its_ids_labels_and_pixels(load, processor: VLMProcessor):
    data = load(GOOD)
    for index, names in enumerate((["0"], [], ["1", "2"], ["3"])):
        encoded, sample = encode(processor, data.samples[index]), data[index]
        assert (sample["input_ids"], sample["labels"]) == (encoded.input_ids, encoded.labels)
        if not names:
            assert sample["pixel_values"] is None
        else:
            expected = processor.pixel_values([picture(int(name)) for name in names])
            assert torch.equal(sample["pixel_values"], expected)


def test_the_first_records_alone(load):
    assert [sample.id for sample in load(GOOD, most=2).samples] == ["r0", "r1"]


def test_pictures_are_looked_for_in_the_image_folder(load, tmp_path: Path, processor: VLMProcessor):
    load(GOOD)
    (tmp_path / "else").mkdir()
    config = DatasetConfig(path=str(tmp_path / "records.json"))
    with pytest.raises(ValueError, match=r"image file .*else/0.png does not exist"):
        load_dataset(config, config.path, str(tmp_path / "else"), processor, LONGEST, show_progress=False)


# Policies


BAD = {
    "mapping": (["x"], "a mapping is needed", None),
    "missing": (record(5, ["z.png"]), "z.png does not exist", "z.png"),
    "no picture": (record(5, ["text.png"]), "text.png does not open", "text.png"),
    "noncharacter": (record(5, [], "a \ufdd1 cat"), "noncharacters", None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_stops_the_run_before_it_begins(load, name: str, tmp_path: Path):
    """The error says which file, which record, why, and how to leave it out."""
    bad, said, _ = BAD[name]
    with pytest.raises(ValueError, match=rf"records.json, record 2: .*{said}.*dataset.on_bad_sample=skip leaves such"):
        load([*GOOD[:2], bad, *GOOD[2:]])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_left_out_and_listed(load, name: str, tmp_path: Path):
    bad, said, file = BAD[name]
    data = load([*GOOD[:2], bad, *GOOD[2:]], on_bad_sample="skip")
    assert [sample.id for sample in data.samples] == ["r0", "r1", "r2", "r3"]
    (skipped,) = data.skipped
    assert isinstance(skipped, Skipped)
    assert said in skipped.reason
    assert skipped.source == str(tmp_path / "records.json")
    assert skipped.record == 2
    assert skipped.id == ("r5" if isinstance(bad, dict) else "?")
    assert Path(skipped.file).name == file if file else skipped.file is None


def test_an_overlong_record_stops_the_run(load):
    with pytest.raises(ValueError, match=rf"record 1: record 'r9': \d+ tokens, at most {LONGEST} are allowed.*"
                                         r"dataset.over_length=skip leaves such records out"):  # fmt: skip
        load([GOOD[0], LONG], on_bad_sample="skip")


def test_an_overlong_record_is_left_out_and_listed(load):
    data = load([GOOD[0], LONG, GOOD[1]], over_length="skip")
    assert [sample.id for sample in data.samples] == ["r0", "r1"]
    assert [skipped.id for skipped in data.skipped] == ["r9"]


def test_an_overlong_record_is_truncated_and_counted(load):
    """To the limit, its image whole, some of its reply left; as often as it is asked for."""
    data = load([GOOD[0], LONG, GOOD[1]], over_length="truncate")
    assert data.num_truncated == 1
    assert data.lengths[1] == LONGEST
    for _ in range(2):
        sample = data[1]
        assert len(sample["input_ids"]) == len(sample["labels"]) == LONGEST
        assert sample["labels"][-1] == sample["input_ids"][-1]
        assert sample["input_ids"].count(data.processor.image_token_id) == 9


@pytest.mark.parametrize(("bad", "said"), [(HUGE_PROMPT, "cut every reply"), (MANY_PICTURES, "cut an image")])
def test_what_cannot_be_truncated_is_left_out_and_listed(load, bad: dict[str, Any], said: str):
    """Neither an image nor all that is learnt may be cut."""
    data = load([GOOD[0], bad], over_length="truncate")
    assert [sample.id for sample in data.samples] == ["r0"]
    assert said in data.skipped[0].reason


def test_a_file_without_a_usable_record_is_an_error(load):
    with pytest.raises(ValueError, match="the file is empty"):
        load([])
    with pytest.raises(ValueError, match=r"none of its 2 records can be used; the first was left out because.*z.png"):
        load([record(5, ["z.png"]), ["x"]], on_bad_sample="skip")


def test_a_picture_that_is_torn_behind_its_header_names_its_record_when_it_is_read(load):
    """Only headers are opened beforehand."""
    data = load([record(4, ["torn.png"])])
    with pytest.raises(BadSample, match=r"record 'r4': image .*torn.png does not open"):
        data[0]


def test_a_header_is_read_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    check_picture(tmp_path / "a.png", "x")


# Parts of it


def test_blank_pictures_change_the_pixels_alone(load, processor: VLMProcessor):
    data = load(GOOD)
    blank = BlankPictures(data)
    assert (len(blank), blank.lengths, blank.num_images) == (len(data), data.lengths, data.num_images)
    for index in range(len(data)):
        sample, plain = blank[index], data[index]
        assert (sample["input_ids"], sample["labels"]) == (plain["input_ids"], plain["labels"])
        if plain["pixel_values"] is None:
            assert sample["pixel_values"] is None
        else:
            assert sample["pixel_values"].shape == plain["pixel_values"].shape
            assert sample["pixel_values"].abs().max() < 0.02


def test_a_share_is_held_out_by_seed(load):
    """Both parts together are the whole, in order; the same seed holds out the same."""
    data = load([record(number, [f"{number % 4}.png"] if number % 3 else []) for number in range(20)])

    def ids(one: SampleDataset) -> list[str]:
        return [sample.id for sample in one.samples]

    rest, held = split_dataset(data, 0.25, seed=1)
    assert (len(rest), len(held)) == (15, 5)
    assert sorted([*ids(rest), *ids(held)]) == sorted(ids(data))
    assert ids(rest) == [one for one in ids(data) if one in ids(rest)]
    assert ids(split_dataset(data, 0.25, seed=1)[1]) == ids(held)
    assert ids(split_dataset(data, 0.25, seed=2)[1]) != ids(held)
    for one in (rest, held):
        assert one.lengths == [len(one[index]["input_ids"]) for index in range(len(one))]
        assert one.num_images == [len(sample.pictures) for sample in one.samples]


@pytest.mark.parametrize(("share", "held"), [(0.001, 1), (0.5, 2), (1.0, 3)])
def test_both_parts_have_at_least_one_sample(load, share: float, held: int):
    rest, found = split_dataset(load(GOOD), share, seed=0)
    assert (len(rest), len(found)) == (4 - held, held)


def test_what_was_left_out_is_told_once(load):
    rest, held = split_dataset(load([*GOOD, ["x"], LONG], on_bad_sample="skip", over_length="truncate"), 0.4, seed=0)
    assert [skipped.id for skipped in rest.skipped] == ["?"]
    assert rest.num_truncated == 1
    assert (held.skipped, held.num_truncated) == ([], 0)


def test_one_sample_cannot_be_split(load):
    with pytest.raises(ValueError, match=r"dataset.eval_split=0.5: at least two records are needed, got 1"):
        split_dataset(load(GOOD[:1]), 0.5, seed=0)


def test_labels_cover_the_replies(load, processor: VLMProcessor):
    """What is learnt of a file, read back."""
    data = load(GOOD)
    said = [processor.tokenizer.decode([i for i in data[n]["labels"] if i != IGNORED]) for n in range(4)]
    assert said == ["a cat<|im_end|>", "two<|im_end|>", "a mat<|im_end|>", "a cat<|im_end|>"]


def test_a_dataset_travels_to_a_data_worker(load):
    """Workers that are spawned get it pickled."""
    data = load(GOOD)
    again = pickle.loads(pickle.dumps(data))
    assert again[0]["input_ids"] == data[0]["input_ids"]
