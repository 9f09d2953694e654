"""Records of a file as samples: checked and counted at the start, with a policy for those that are bad or too long."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.constants import HF_HOME

from tests.tiny_parts import IGNORE_INDEX, Parts, picture
from vlm.config.dataset_schema import DatasetConfig, MixtureSourceConfig
from vlm.data import token_counts as counts
from vlm.data.dataset import BlankImageDataset, SampleDataset, load_dataset
from vlm.data.encoding.labels import encode
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.holdout import count_shared_images, split_off_eval
from vlm.data.skipped import Skipped
from vlm.data.vision.images import open_media
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
    """`load(records, first=None, **policies)`: a dataset of these records, whose images are `0.png` to `3.png`."""
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])

    def make(records: list[Any], first: int | None = None, **policies: Any) -> SampleDataset:
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        config = DatasetConfig(**{"path": str(path), "max_skipped": 1.0, **policies})
        encoder = SampleEncoder(processor, LONGEST, truncate=config.over_length == "truncate")
        return load_dataset(config, encoder, first=first)

    return make


GOOD = [record(0, ["0.png"]), record(1, [], "two"), record(2, ["1.png", "2.png"], "a mat"), record(3, ["3.png"])]
LONG = record(9, ["0.png"], "a cat " * 40)
HUGE_PROMPT = {**record(8, ["0.png"]), "conversations": [
    {"from": "human", "value": "<image>\n" + "what? " * 60}, {"from": "gpt", "value": "a cat"},
]}  # fmt: skip


def ids(data: SampleDataset) -> list[str]:
    return [data.sample(index).id for index in range(len(data))]


def truncated(data: SampleDataset) -> int:
    return sum(one.truncated for one in data.contributions)


MANY_PICTURES = record(7, [f"{number % 4}.png" for number in range(8)])


# Samples


def test_lengths_and_images_are_known_beforehand(load, processor: VLMProcessor):
    data = load(GOOD)
    assert len(data) == 4
    assert data.lengths.tolist() == [len(data[index]["input_ids"]) for index in range(4)]
    assert data.num_images.tolist() == [1, 0, 2, 1]
    assert (data.skipped, truncated(data)) == ([], 0)


def test_a_sample_is_its_ids_labels_and_pixels(load, processor: VLMProcessor):
    data = load(GOOD)
    for index, names in enumerate((["0"], [], ["1", "2"], ["3"])):
        encoded, sample = encode(processor, data.sample(index)), data[index]
        assert (sample["input_ids"], sample["labels"]) == (encoded.input_ids, encoded.labels)
        if not names:
            assert "pixel_values" not in sample
        else:
            expected = processor.pixel_values([picture(int(name)) for name in names])
            assert sample["pixel_values"].dtype == torch.uint8
            assert torch.equal(processor.normalise(sample["pixel_values"]), expected)


def test_the_first_records_alone(load):
    assert ids(load(GOOD, first=2)) == ["r0", "r1"]


def test_images_are_looked_for_in_the_image_folder(load, tmp_path: Path, processor: VLMProcessor):
    load(GOOD)
    (tmp_path / "else").mkdir()
    config = DatasetConfig(path=str(tmp_path / "records.json"), image_folder=str(tmp_path / "else"))
    with pytest.raises(ValueError, match=r"image file .*else/0.png does not exist"):
        load_dataset(config, SampleEncoder(processor, LONGEST, truncate=False))


def test_what_a_sample_may_be_cut_to_is_counted(load, processor: VLMProcessor):
    """Up to its last image, and to the first token of its first reply."""
    later = [*record(0, [])["conversations"], *record(1, ["0.png"])["conversations"]]
    data = load([GOOD[0], {"id": "later", "image": "0.png", "conversations": later}])
    encoder, image = data.sources[0].encoder, processor.image_token_id
    for index in range(2):
        encoded = data.encoded(index)
        first = next(place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
        behind = max(place for place, token in enumerate(encoded.input_ids) if token == image) + 1
        assert encoder.min_length(encoded) == max(first + 1, behind)
        assert (behind > first) == (index == 1)


# Policies


BAD = {
    "mapping": (["x"], "each record must be a JSON object", None),
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
    assert ids(data) == ["r0", "r1", "r2", "r3"]
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
    assert ids(data) == ["r0", "r1"]
    assert [skipped.id for skipped in data.skipped] == ["r9"]


def test_an_overlong_record_is_truncated_and_counted(load):
    """To the limit, its image whole, some of its reply left; as often as it is asked for."""
    data = load([GOOD[0], LONG, GOOD[1]], over_length="truncate")
    assert truncated(data) == 1
    assert data.lengths[1] == LONGEST
    for _ in range(2):
        sample = data[1]
        assert len(sample["input_ids"]) == len(sample["labels"]) == LONGEST
        assert sample["labels"][-1] == sample["input_ids"][-1]
        assert sample["input_ids"].count(data.processor.image_token_id) == 9


@pytest.mark.parametrize(("bad", "said"), [(HUGE_PROMPT, "or every reply"), (MANY_PICTURES, "cut an image")])
def test_what_cannot_be_truncated_is_left_out_and_listed(load, bad: dict[str, Any], said: str):
    """Neither an image nor all that is learnt may be cut."""
    data = load([GOOD[0], bad], over_length="truncate")
    assert ids(data) == ["r0"]
    assert said in data.skipped[0].reason


def test_a_file_without_a_usable_record_is_an_error(load):
    with pytest.raises(ValueError, match="it holds no records"):
        load([])
    with pytest.raises(ValueError, match=r"none of the 2 records can be used, mostly because: .*z.png"):
        load([record(5, ["z.png"]), ["x"]], on_bad_sample="skip")


TORN = record(4, ["torn.png"])


def test_images_of_the_first_records_are_decoded_beforehand(load):
    with pytest.raises(ValueError, match=r"record 1: record 'r4': image .*torn.png does not open"):
        load([GOOD[0], TORN], check_samples=2)
    assert len(load([GOOD[0], TORN], check_samples=1)) == 2
    with pytest.raises(ValueError, match=r"torn.png does not open"):
        load([GOOD[0], TORN], check_samples=None)


def test_an_image_that_is_torn_behind_its_header_names_its_record_when_it_is_read(load):
    """Of later records, only headers are opened beforehand."""
    data = load([GOOD[0], TORN], check_samples=0)
    assert isinstance(data[0], dict)
    assert isinstance(data[1], Skipped)
    assert (data[1].record, data[1].id, data[1].policy) == (1, "r4", "on_bad_sample")
    assert data[1].reason.startswith(f"image {data[1].file} does not open")
    said = r"records.json, record 1: record 'r4': image .*torn.png does not open.*on_bad_sample=skip leaves"
    with pytest.raises(ValueError, match=said):
        raise data[1].as_error()


def test_an_image_that_is_missing_is_told_where_it_was_looked_for(load, tmp_path: Path):
    lost = [*GOOD, record(5, ["z.png"])]
    with pytest.raises(ValueError, match=r"z.png does not exist. dataset.image_folder is not set, so .* records, "):
        load(lost, image_folder=None)
    with pytest.raises(ValueError, match=r"not exist. Image paths are relative to dataset.image_folder. dataset"):
        load(lost, image_folder=str(tmp_path))


def test_more_bad_records_than_allowed_stop_the_run(load):
    bad = [*GOOD, ["x"], record(5, ["z.png"]), ["x"]]
    assert len(load(bad, on_bad_sample="skip", max_skipped=0.43)) == 4
    said = r"3 of 7 records cannot be used, more than dataset.max_skipped=0.4 .*: each record must .*\(2\); image f"
    with pytest.raises(ValueError, match=said):
        load(bad, on_bad_sample="skip", max_skipped=0.4)


def test_bad_records_of_one_kind_are_one_reason_and_name_their_form(load):
    """With what reads them; and in the same words each time."""
    chats = [{"id": str(number), "conversations": [{"role": "user", "content": "?"}]} for number in range(12)]
    said = (
        r"Reasons: turn 1: `from` and `value` must be strings; it looks like chat messages: "
        r"add dataset.format=messages dataset.options.key=conversations \(12\)$"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            load([*GOOD, *chats], on_bad_sample="skip", max_skipped=0.4)


def test_binary_columns_of_parquet_are_images(load, tmp_path: Path):
    """As pandas writes them, and several in a list."""
    picture(size=(12, 10)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    rows = [{"image": content, "caption": 3}, {"image": content, "caption": 4}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = load([], path=str(tmp_path / "a.parquet"), format="caption")
    assert [data.sample(index).turns[-1].content for index in range(2)] == [("3",), ("4",)]
    assert open_media(data.sample(0))[0].size == (12, 10)


# Counting


def test_what_was_counted_is_not_counted_again(load, monkeypatch: pytest.MonkeyPatch):
    first = load([*GOOD, ["x"]], on_bad_sample="skip")
    real = counts.count_record
    monkeypatch.setattr(counts, "count_record", lambda source, record, **options: (
        real(source, record, **options) if record == 4 else pytest.fail("counted again")
    ))  # fmt: skip
    again = load([*GOOD, ["x"]], on_bad_sample="skip")
    assert again.lengths.tolist() == first.lengths.tolist()
    assert again.skipped == first.skipped


def test_an_image_that_was_missing_is_looked_for_again(load, tmp_path: Path):
    records = [*GOOD[:2], record(5, ["late.png", "0.png"]), record(6, ["never.png"])]
    before = load(records, on_bad_sample="skip")
    assert [skipped.id for skipped in before.skipped] == ["r5", "r6"]
    picture().save(tmp_path / "late.png")
    after = load(records, on_bad_sample="skip")
    assert [skipped.id for skipped in after.skipped] == ["r6"]
    assert ids(after) == ["r0", "r1", "r5"]
    assert after.lengths.tolist() == [len(after[index]["input_ids"]) for index in range(3)]
    assert after.num_images.tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match=r"record 3: record 'r6': image file .*never.png does not exist"):
        load(records)


def test_the_first_bad_record_stops_the_count(load, monkeypatch: pytest.MonkeyPatch):
    """What was counted up to there is kept."""
    records = [record(number, []) for number in range(30)]
    broken = [*records[:16], ["x"], *records[17:]]
    monkeypatch.setattr(counts, "CHUNK", 7)
    counted: list[int] = []
    real = counts.count_record
    monkeypatch.setattr(counts, "count_record", lambda s, record, **o: counted.append(record) or real(s, record, **o))
    for expected in (21, 7):
        counted.clear()
        with pytest.raises(ValueError, match=r"record 16: each record must be a JSON object"):
            load(broken, num_workers=0)
        assert len(counted) == expected


@pytest.mark.parametrize("change", [{"max_frames": 9}, {"system_prompt": "Be brief."}, {"check_samples": 1}])
def test_another_setting_is_counted_anew(load, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]):
    load(GOOD)
    counted = []
    real = counts.count_record
    monkeypatch.setattr(counts, "count_record", lambda *a, **k: counted.append(1) or real(*a, **k))
    load(GOOD)
    assert not counted
    load(GOOD, **change)
    assert len(counted) == 4


def test_processes_count_the_same(load, monkeypatch: pytest.MonkeyPatch):
    records = [record(number, [f"{number % 4}.png"], "a cat " * (number % 5 + 1)) for number in range(40)] + [["x"]]
    alone = load(records, on_bad_sample="skip", num_workers=0)
    monkeypatch.setattr(counts, "FEW", 0)
    monkeypatch.setattr(counts, "CHUNK", 7)
    together = load(records, on_bad_sample="skip", num_workers=2, check_samples=99)
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert together.places.tolist() == alone.places.tolist()
    assert together.skipped == alone.skipped


# Several sources


@pytest.fixture
def mixture(load, tmp_path: Path, processor: VLMProcessor) -> Callable[..., SampleDataset]:
    """`mixture(a={…}, b={…})`: two sources of ten records each, of different formats."""
    load(GOOD)  # writes the pictures
    captions = [{"id": f"c{number}", "picture": f"{number % 4}.png", "text": f"cat {number}"} for number in range(10)]
    (tmp_path / "captions.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in captions))
    (tmp_path / "talk.json").write_text(json.dumps([record(number, []) for number in range(10)]))

    def make(a: dict[str, Any], b: dict[str, Any], **policies: Any) -> SampleDataset:
        keys = {"image_key": "picture", "caption_key": "text"}
        sources = {
            "captions": MixtureSourceConfig(
                path=str(tmp_path / "captions.jsonl"), format="caption", options=keys, **a
            ),
            "talk": MixtureSourceConfig(path=str(tmp_path / "talk.json"), **b),
        }  # fmt: skip
        return load_dataset(
            DatasetConfig(sources=sources, **policies), SampleEncoder(processor, LONGEST, truncate=False), seed=1
        )

    return make


def test_sources_have_their_own_formats(mixture):
    data = mixture({}, {})
    assert ids(data) == [f"c{number}" for number in range(10)] + [f"r{number}" for number in range(10)]
    assert [one.source for one in data.contributions] == ["captions", "talk"]
    assert [one.samples for one in data.contributions] == [10, 10]
    assert [one.images for one in data.contributions] == [10, 0]
    assert data.lengths.tolist() == [len(data[index]["input_ids"]) for index in range(20)]


def test_a_weight_says_how_often_each_sample_is_taken(mixture):
    taken = Counter(ids(mixture({"weight": 2.5}, {"weight": 0.3})))
    captions = [taken[f"c{number}"] for number in range(10)]
    assert sorted(captions) == [2] * 5 + [3] * 5
    assert sorted(taken[f"r{number}"] for number in range(10)) == [0] * 7 + [1] * 3
    assert taken == Counter(ids(mixture({"weight": 2.5}, {"weight": 0.3})))


def test_a_cap_draws_so_many_records(mixture):
    data = mixture({"max_samples": 4}, {"max_samples": 99})
    assert [one.samples for one in data.contributions] == [4, 10]
    assert len(set(ids(data))) == 14
    assert ids(data)[:4] != ["c0", "c1", "c2", "c3"]


def test_a_source_may_have_a_template_and_a_system_prompt_of_its_own(mixture, processor: VLMProcessor):
    data = mixture({"template": "plain"}, {"system_prompt": "Be brief."})
    said = [processor.tokenizer.decode(data[index]["input_ids"]) for index in (0, 10)]
    assert said[0] == "<s>" + "<image>" * 9 + "cat 0\n"
    assert "Be brief." in said[1]
    assert "<|im_start|>" in said[1]


def test_held_out_records_are_trained_on_by_no_repetition(mixture):
    rest, held = split_off_eval(mixture({"weight": 3}, {}), 0.3, seed=0)
    assert len(held) == 6
    assert len(set(ids(held))) == 6
    assert not set(ids(held)) & set(ids(rest))
    assert len(set(ids(rest))) == 14


# Parts of it


def test_blank_images_change_the_pixels_alone(load, processor: VLMProcessor):
    data = load(GOOD)
    blank = BlankImageDataset(data)
    assert len(blank) == len(data)
    assert blank.lengths is data.lengths
    assert blank.num_images is data.num_images
    for index in range(len(data)):
        sample, plain = blank[index], data[index]
        assert (sample["input_ids"], sample["labels"]) == (plain["input_ids"], plain["labels"])
        if "pixel_values" not in plain:
            assert "pixel_values" not in sample
        else:
            assert sample["pixel_values"].shape == plain["pixel_values"].shape
            assert processor.normalise(sample["pixel_values"]).abs().max() < 0.02


def test_a_share_is_held_out_by_seed(load):
    """Both parts together are the whole, in order; the same seed holds out the same."""
    data = load([record(number, [f"{number % 4}.png"] if number % 3 else []) for number in range(20)])

    rest, held = split_off_eval(data, 0.25, seed=1)
    assert (len(rest), len(held)) == (15, 5)
    assert sorted([*ids(rest), *ids(held)]) == sorted(ids(data))
    assert ids(rest) == [one for one in ids(data) if one in ids(rest)]
    assert ids(split_off_eval(data, 0.25, seed=1)[1]) == ids(held)
    assert ids(split_off_eval(data, 0.25, seed=2)[1]) != ids(held)
    for one in (rest, held):
        assert one.lengths.tolist() == [len(one[index]["input_ids"]) for index in range(len(one))]
        assert one.num_images.tolist() == [len(one.sample(index).images) for index in range(len(one))]


def test_held_out_records_whose_image_trains_too_are_counted(load, monkeypatch: pytest.MonkeyPatch):
    data = load([record(number, [f"{number % 4}.png"] if number % 3 else []) for number in range(20)])
    rest, held = split_off_eval(data, 0.25, seed=1)
    trained = {image.path for index in range(len(rest)) for image in rest.sample(index).images}
    images = [[image.path for image in held.sample(index).images] for index in range(len(held))]
    assert count_shared_images(rest, held) == sum(any(path in trained for path in paths) for paths in images) > 0
    assert count_shared_images(rest.subset([]), held) == 0
    monkeypatch.setattr("vlm.data.holdout.MAX_COMPARED", 1)
    assert count_shared_images(rest, held) is None


@pytest.mark.parametrize(("share", "held"), [(0.001, 1), (0.5, 2), (1.0, 3)])
def test_both_parts_have_at_least_one_sample(load, share: float, held: int):
    rest, found = split_off_eval(load(GOOD), share, seed=0)
    assert (len(rest), len(found)) == (4 - held, held)


def test_what_was_left_out_is_told_once(load):
    rest, held = split_off_eval(load([*GOOD, ["x"], LONG], on_bad_sample="skip", over_length="truncate"), 0.4, seed=0)
    assert [skipped.id for skipped in rest.skipped] == ["?"]
    assert truncated(rest) == 1
    assert (held.skipped, held.contributions) == ([], [])


def test_one_sample_cannot_be_split(load):
    with pytest.raises(ValueError, match=r"dataset.eval_split=0.5: at least two records are needed, got 1"):
        split_off_eval(load(GOOD[:1]), 0.5, seed=0)


def test_labels_cover_the_replies(load, processor: VLMProcessor):
    """What is learnt of a file, read back."""
    data = load(GOOD)
    said = [processor.tokenizer.decode([i for i in data[n]["labels"] if i != IGNORE_INDEX]) for n in range(4)]
    assert said == ["a cat<|im_end|>", "two<|im_end|>", "a mat<|im_end|>", "a cat<|im_end|>"]


def test_a_dataset_travels_to_a_data_worker(load):
    """Workers that are spawned get it pickled."""
    data = load(GOOD)
    again = pickle.loads(pickle.dumps(data))
    assert again[0]["input_ids"] == data[0]["input_ids"]


def test_a_count_that_was_stopped_goes_on(load, monkeypatch: pytest.MonkeyPatch):
    """Chunks that are whole stay; the torn end is counted again."""
    records = [record(number, [f"{number % 4}.png"], "a cat " * (number % 5 + 1)) for number in range(40)]
    monkeypatch.setattr(counts, "CHUNK", 7)
    counted = []
    real = counts.count_record

    def until(number: int) -> Callable[..., Any]:
        def one(source: Any, record: int, **options: Any) -> Any:
            if record == number:
                raise KeyboardInterrupt
            counted.append(record)
            return real(source, record, **options)

        return one

    monkeypatch.setattr(counts, "count_record", until(24))
    with pytest.raises(KeyboardInterrupt):
        load(records, num_workers=0)
    partial = max(Path(HF_HOME, "vlm", "counts").glob("*.partial"), key=lambda file: file.stat().st_mtime_ns)
    partial.write_bytes(partial.read_bytes()[:-9])
    counted.clear()
    monkeypatch.setattr(counts, "count_record", until(99))
    data = load(records, num_workers=0)
    assert counted == list(range(14, 40))
    assert data.lengths.tolist() == [len(data[index]["input_ids"]) for index in range(40)]
