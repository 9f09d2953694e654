"""What a preflight finds of a tiny run: where it starts, its data, its first batch and rates."""

import pytest

from tests.fixtures import compose_config
from vlm.config.schema import RunConfig
from vlm.train.preflight.findings import Findings
from vlm.train.preflight.inspect import describe_form, describe_start


def test_the_start_is_told():
    words = ["dataset.path=x"]
    assert describe_start(compose_config("finetune-smol", words)).endswith(" with a new connector")
    config = compose_config("finetune-smol", [*words, "trainer.from_pretrained=a/b"])
    assert describe_start(config) == "the checkpoint a/b"
    config = compose_config("finetune-llava-onevision", words)
    assert describe_start(config).startswith("the model llava-hf/")


def test_records_of_no_known_form_are_said_to_be_read_and_no_more():
    record = {"a": "1.png", "b": "a cat"}
    assert describe_form(record, "caption") == "read with dataset.format=caption"
    assert describe_form({"c": 1}, "llava") == "read with dataset.format=llava"
    assert describe_form({"image": "1.png", "caption": "a"}, "my:reader") == "read with dataset.format=my:reader"
    assert describe_form({"file": "1.png", "text": "a"}, "caption").endswith("caption, which fits them")
    pairs = {"messages": [{"role": "user", "content": "a"}], "rejected_response": "b"}
    told = describe_form(pairs, "messages")
    assert told.endswith("messages, but they look like pairs of a chosen and a rejected reply")


def test_parts_data_and_first_batch_are_those_of_the_run(findings: Findings):
    assert "visual_encoder" in findings.parts
    assert len(findings.data.lengths) == 24
    assert findings.data.forms == ["records.json: read with dataset.format=llava, which fits them"]
    assert "【" in findings.first_sample
    assert "<mark>" in findings.first_batch
    assert 'src="data:image/png;base64,' in findings.first_batch
    assert "first_batch/" not in findings.first_batch
    assert not findings.is_refused


def test_the_rates_of_each_part_rise_and_fall(findings: Findings):
    assert set(findings.rates) == {"connector", "language_model"}
    for points in findings.rates.values():
        assert points[0] == (0, 0.0)
        assert max(rate for _, rate in points) == pytest.approx(1e-3)
        assert points[-1][1] == pytest.approx(0, abs=1e-9)


def test_time_and_disk_are_predicted(findings: Findings, config: RunConfig):
    duration, disk = findings.duration, findings.disk
    assert duration is not None
    assert disk is not None
    assert duration.steps == 9  # 3 epochs of 24 samples, 8 a step
    assert duration.training == pytest.approx(9 * duration.step)
    assert (duration.checkpoints, duration.evaluations) == (3, 0)
    assert duration.basis == "its counted operations"
    assert 0 < disk.final < disk.needed
    assert disk.checkpoint > 0
