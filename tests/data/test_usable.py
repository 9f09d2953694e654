"""One verdict on a record: training, `vlm data show`, `stats` and `clean` say the same of each that cannot be used."""

import json
from pathlib import Path

import pytest

from tests.data.records.test_broken import BROKEN, FILES, talk
from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.tools.show import load_shown_records
from vlm.data.tools.stats import compute_stats
from vlm.data.tools.verdicts import CleanTask, RecordChecker
from vlm.data.usable import RecordReader, check_reply

ASKED, BLANK, GOOD = ({"from": who, "value": text} for who, text in (("human", "what?"), ("gpt", " "), ("gpt", "that")))
SILENT = {
    "the assistant begins": {"conversations": [GOOD, ASKED, GOOD]},
    "empty reply": {"conversations": [ASKED, {"from": "gpt", "value": ""}]},
    "blank reply": {"conversations": [ASKED, BLANK]},
    "weight 0": {"conversations": [ASKED, {**GOOD, "weight": 0}]},
    "silent, and a broken image": {**talk("torn.jpg"), "conversations": [{**ASKED, "value": "<image>a"}, BLANK]},
    "image under another key": {"img": "good.png", "conversations": [ASKED, GOOD]},
    "captions": {"image": "good.png", "caption": "a"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "no known form": {"foo": 1},
    "no reply": {"conversations": [ASKED]},
    "a role that is not known": {"conversations": [ASKED, {"from": "robot", "value": "a"}]},
    "an image by its address": {**talk("https://example.com/a.png")},
    "a key that changes what is learned": {"conversations": [ASKED, GOOD], "audio": "a.wav"},
    "two system turns": {"conversations": [{"from": "system", "value": "a"}, ASKED, GOOD], "system": "b"},
    "a negative weight": {"conversations": [ASKED, {**GOOD, "weight": -1}]},
    "alpaca": {"instruction": "a", "output": "b"},
}


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    """Every broken record of `test_broken`, and more that only some tools used to refuse, among good ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture().save(tmp_path / "outside.png")
    picture().save(folder / "good.png")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    records = [record for record, _ in BROKEN.values()] + list(SILENT.values())
    (tmp_path / "r.json").write_text(json.dumps([*records, talk("good.png")]))
    return DatasetConfig(
        path=str(tmp_path / "r.json"), image_folder=str(folder), on_bad_sample="skip", max_skipped=1.0,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_training_show_stats_and_clean_say_the_same(config: DatasetConfig, parts: Parts, tmp_path: Path):
    encoder = SampleEncoder(parts.processor(), 200, truncate=False)
    number = len(BROKEN) + len(SILENT)
    assert number >= 30
    trained = load_dataset(config, encoder)
    training = {skipped.record: skipped.reason for skipped in trained.skipped}
    (counted,) = compute_stats(config, encoder)
    stats = {place: problem.reason for place, problem in counted.counts.problems.items()}
    shown = load_shown_records(config, encoder, number=number + 1)
    show = {record.record: record.problem for record in shown if record.problem is not None}
    task = CleanTask(str(config.path), tmp_path / "cache", str(config.image_folder), min_side=1)
    check = RecordChecker(task, task.records())
    verdicts = [check(index) for index in range(number + 1)]
    clean = {index: verdict.detail for index, verdict in enumerate(verdicts) if verdict.reason is not None}
    assert list(training) == list(range(number))
    assert show == stats == training
    assert clean == {index: _as_clean_says(reason) for index, reason in training.items()}


def _as_clean_says(reason: str) -> str:
    """The options of a run as those of `clean`, which does not train."""
    options = reason.replace("dataset.format=", "--format ").replace("dataset.options.", "--option ")
    return options.replace("to train on the text alone", "to read the text alone")


def test_an_error_of_a_reader_of_the_users_own_concerns_its_record_only():
    def read(record: object, folder: Path) -> Sample:
        raise KeyError("label")

    with pytest.raises(BadSample, match=r"its reader raised KeyError: 'label' \(test_usable.py, line \d+\)"):
        RecordReader(read, Path(), "my:read")({"id": "7"})
    with pytest.raises(BadSample, match="as it was"):
        RecordReader(read, Path(), "my:read")(BadSample("7", "as it was"))


def test_a_reply_is_needed_where_replies_are_learned():
    sample = Sample("7", (Turn("user", ("what?",)),), label=1)
    with pytest.raises(BadSample, match="no reply to train on"):
        check_reply(sample, needed=True)
    check_reply(sample, needed=False)
