"""One command starts a run, goes on with it, and leaves it alone once it is done."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.fixtures import compose_config, losses, reseal
from vlm.config.schema import RunConfig
from vlm.train.resume.changes import compare_settings
from vlm.train.resume.lock import RunLock
from vlm.train.resume.record import Progress, make_record, read_record, write_record
from vlm.train.run_directory import add_command, write_run_files
from vlm.train.trainer import VLMTrainer

SHORT = (
    "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.num_samples=0",
    "trainer.save_total_limit=9",
)  # fmt: skip

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing disturbed."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "whole", *SHORT)


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def stopped(done: Path) -> Path:
    """A copy of it as it was after its first checkpoint."""
    rewind(done, 2)
    return done


def rewind(folder: Path, step: int) -> None:
    """Remove what a run wrote after a checkpoint."""
    shutil.rmtree(folder / "final", ignore_errors=True)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_weights(run: Path, other: Path) -> None:
    expected, found = weights(other), weights(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_secrets_are_masked_in_what_a_run_writes_and_a_new_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def configure(secret: str) -> RunConfig:
        address = f"https://user:{secret}@host.org/a.jsonl?X-Amz-Signature={secret}&part=1"
        config = compose_config("pretrain-smol", [f"trainer.hub_token={secret}"])
        config.dataset.eval_path, config.dataset.options = address, {"api_key": secret}
        return config

    config, renewed = configure("first-secret"), configure("second-secret")
    record = make_record(config, 1)
    assert compare_settings(record, make_record(renewed, 1), renewed) == []
    assert record.fingerprints() == make_record(renewed, 1).fingerprints()
    unmasked = replace(record, config=json.loads(json.dumps(asdict(config))))  # as earlier versions wrote it
    for written in (record, unmasked):
        folder = tmp_path / str(written is record)
        folder.mkdir()
        write_record(folder, written, Progress(1, 2, 0.5))
        before, _ = read_record(folder)
        assert [change.key for change in compare_settings(before, record, config)] == []
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-m", "vlm", "trainer.hub_token=first-secret", "--token", "first-s"]
    )
    (tmp_path / "run").mkdir()
    write_run_files(tmp_path / "run", config)
    add_command(tmp_path / "run")
    written = [tmp_path / "True", tmp_path / "run"]
    texts = [file.read_text() for folder in written for file in folder.iterdir()]
    assert all("first-s" not in text for text in texts)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["hub_token"] == "***"
    command = (tmp_path / "run" / "command.txt").read_text()
    assert command.count("-m vlm 'trainer.hub_token=***' --token '***'\n") == 2


def test_the_same_command_goes_on(whole: Path, stopped: Path, train: Train):
    train("pretrain-smol", stopped, *SHORT)
    assert_same_weights(stopped, whole)
    assert losses(stopped) == losses(whole)


def test_a_run_that_is_done_stays_as_it_is(done: Path, train: Train, caplog: pytest.LogCaptureFixture):
    before = snapshot(done)
    with caplog.at_level(logging.INFO, logger="vlm.train.resume.directory"):
        train("pretrain-smol", done, *SHORT)
        train("pretrain-smol", done, *SHORT, "trainer.resume_from_checkpoint=true", "trainer.save_steps=1")
    assert snapshot(done) == before
    assert f"The run in {done} is done after 4 steps. Its model is" in caplog.text


def test_a_run_that_is_killed_in_its_first_save_begins_again(
    whole: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With `true` too, at the first start and at the second."""

    def dies(self: VLMTrainer, folder: str) -> None:
        raise KeyboardInterrupt

    words = [*SHORT, "trainer.resume_from_checkpoint=true"]
    monkeypatch.setattr(VLMTrainer, "_save_rng_state", dies)
    with pytest.raises(KeyboardInterrupt):
        train("pretrain-smol", tmp_path / "run", *words)
    monkeypatch.undo()
    train("pretrain-smol", tmp_path / "run", *words)
    assert_same_weights(tmp_path / "run", whole)
    assert losses(tmp_path / "run") == losses(whole)


def test_more_steps_are_trained_and_no_step_twice(done: Path, whole: Path, train: Train):
    longer = [*SHORT, "trainer.max_steps=6", "trainer.lr_scheduler_type=constant_with_warmup"]
    with pytest.raises(ValueError, match=r"trainer\.lr_scheduler_type: cosine -> constant_with_warmup"):
        train("pretrain-smol", done, *longer)
    train("pretrain-smol", done, *SHORT, "trainer.max_steps=6")
    assert losses(done)[:4] == losses(whole)
    assert len(losses(done)) == 6
    changes = [json.loads(line)["changes"] for line in (done / "changes.jsonl").read_text().splitlines()]
    assert changes == [{"trainer.max_steps": [4, 6]}]
    assert json.loads((done / "final" / "run.json").read_text())["progress"]["step"] == 6
    assert not [folder.name for folder in done.glob("final.*")]


def test_a_longer_run_that_is_killed_goes_on_beside_the_earlier_final(done: Path, whole: Path, train: Train):
    longer = [*SHORT, "trainer.max_steps=6"]
    train("pretrain-smol", done, *longer)
    expected = losses(done)
    for removed in ("checkpoint-6", "final"):
        shutil.rmtree(done / removed)
    (done / "checkpoint-4").rename(done / "checkpoint-4.kept")
    shutil.copytree(whole / "final", done / "final")
    with pytest.raises(ValueError, match="no checkpoint of its last step to resume from"):
        train("pretrain-smol", done, *longer)
    (done / "checkpoint-4.kept").rename(done / "checkpoint-4")
    train("pretrain-smol", done, *longer)
    assert losses(done) == expected
    shutil.rmtree(done / "final")
    shutil.copytree(whole / "final", done / "final")  # killed before it was written anew
    train("pretrain-smol", done, *longer)
    assert json.loads((done / "final" / "run.json").read_text())["progress"]["step"] == 6


def test_fewer_steps_than_were_trained_are_refused(stopped: Path, train: Train):
    with pytest.raises(ValueError, match=r"trainer\.max_steps=1, and .*checkpoint-2 is beyond it"):
        train("pretrain-smol", stopped, *SHORT, "trainer.max_steps=1")


CHANGED = {
    "learning rate": ("trainer.learning_rate.connector_learning_rate=2e-3", "0.001 -> 0.002"),
    "batch size": ("trainer.per_device_train_batch_size=4", "8 -> 4"),
    "accumulation": ("trainer.gradient_accumulation_steps=2", "1 -> 2"),
    "seed": ("trainer.seed=1", "42 -> 1"),
    "length": ("dataset.max_length=128", "2048 -> 128"),
    "sampling": ("trainer.train_sampling_strategy=sequential", "random -> sequential"),
    "packing": ("trainer.packing=true", "false -> true"),
    "schedule": ("trainer.lr_scheduler_type=constant", "cosine -> constant"),
    "precision": ("trainer.bf16=true", "false -> true"),
    "decay": ("trainer.weight_decay.connector_weight_decay=0.1", "0.0 -> 0.1"),
    "loss": ("trainer.loss_average=micro_batch", "token -> micro_batch"),
}


def test_changes_of_a_run_are_shown_and_refused(stopped: Path, train: Train):
    """All at once: each is named, nothing is written, and the run can still go on."""
    before = snapshot(stopped)
    with pytest.raises(ValueError, match="belongs to a run with other settings") as refused:
        train("pretrain-smol", stopped, *SHORT, *(word for word, _ in CHANGED.values()))
    for word, values in CHANGED.values():
        assert f"  {word.partition('=')[0]}: {values}\n" in str(refused.value)
    assert "trainer.resume_changes=accept" in str(refused.value)
    assert snapshot(stopped) == before


def test_what_does_not_fit_is_refused_whatever_is_accepted(stopped: Path, train: Train):
    with pytest.raises(ValueError, match=r"trainer\.optim: null -> sgd"):
        train("pretrain-smol", stopped, *SHORT, "trainer.optim=sgd", "trainer.resume_changes=accept")


def test_an_accepted_learning_rate_is_the_learning_rate(stopped: Path, train: Train):
    words = [*SHORT, "trainer.learning_rate.connector_learning_rate=2e-3", "trainer.resume_changes=accept"]
    earlier = logged_rates(stopped)
    train("pretrain-smol", stopped, *words)
    rates = logged_rates(stopped)
    assert rates[:2] == earlier[:2]
    assert rates[2:] == pytest.approx([2 * rate for rate in earlier[2:]])
    assert "connector_learning_rate: 0.001" in (stopped / "config.yaml").read_text()
    (line,) = [json.loads(line) for line in (stopped / "changes.jsonl").read_text().splitlines()]
    assert line["step"] == 2
    assert line["changes"]["trainer.learning_rate.connector_learning_rate"] == [0.001, 0.002]
    before = snapshot(stopped)
    train("pretrain-smol", stopped, *words)
    assert snapshot(stopped) == before


def logged_rates(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate/connector"] for line in lines if "loss" in line]


def test_accepted_schedules_and_decays_take_effect_at_once(stopped: Path, train: Train):
    words = ["trainer.lr_scheduler_type=constant", "trainer.weight_decay.connector_weight_decay=0.1"]
    train("pretrain-smol", stopped, *SHORT, *words, "trainer.resume_changes=accept")
    assert logged_rates(stopped)[2:] == [0.001, 0.001]
    state: Any = torch.load(stopped / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert max(group["weight_decay"] for group in state["param_groups"]) == 0.1


def test_changed_intervals_are_taken(stopped: Path, train: Train):
    train("pretrain-smol", stopped, *SHORT, "trainer.save_steps=1", "trainer.logging_steps=2")
    assert (stopped / "checkpoint-3").is_dir()
    assert len(losses(stopped)) == 3


@pytest.fixture
def records(world: Path, tmp_path: Path) -> Path:
    """A copy of the records, which a test may change."""
    return Path(shutil.copyfile(world / "records.json", tmp_path / "records.json"))


def test_changed_records_are_refused_and_moved_ones_taken(train: Train, records: Path, tmp_path: Path):
    output = train("pretrain-smol", tmp_path / "run", *SHORT, f"dataset.path={records}")
    rewind(output, 2)
    (tmp_path / "moved").mkdir()
    moved = records.rename(tmp_path / "moved" / "records.json")
    words = [*SHORT, f"dataset.path={moved}"]
    content = json.loads(moved.read_text())
    moved.write_text(json.dumps(content[::-1]))
    with pytest.raises(ValueError, match=r"data\.train\.sources\.records\.json: \w+ -> \w+"):
        train("pretrain-smol", output, *words)
    assert not (output / "changes.jsonl").exists()
    moved.write_text(json.dumps(content))
    train("pretrain-smol", output, *words)
    assert (output / "final").is_dir()


def test_a_stream_that_was_moved_goes_on(train: Train, records: Path, tmp_path: Path):
    words = [*SHORT, "dataset.streaming=true", "dataset.shuffle_buffer=5"]
    output = train("pretrain-smol", tmp_path / "run", *words, f"dataset.path={records}")
    expected = losses(output)
    rewind(output, 2)
    (tmp_path / "moved").mkdir()
    moved = records.rename(tmp_path / "moved" / "records.json")
    train("pretrain-smol", output, *words, f"dataset.path={moved}")
    assert losses(output) == expected


def test_never_sets_the_earlier_run_aside(done: Path, whole: Path, train: Train):
    before = snapshot(done)
    train("pretrain-smol", done, *SHORT, "trainer.resume_from_checkpoint=never", "trainer.seed=1")
    assert snapshot(done.with_name("run.1")) == before
    assert losses(done) != losses(whole)
    train("pretrain-smol", done, *SHORT, "trainer.resume_from_checkpoint=false")
    assert (done.with_name("run.2") / "final").is_dir()
    assert_same_weights(done, whole)


def test_a_run_goes_back_to_an_earlier_checkpoint(done: Path, whole: Path, train: Train):
    """What came after it stays, under other names."""
    train("pretrain-smol", done, *SHORT, f"trainer.resume_from_checkpoint={done / 'checkpoint-2'}")
    names = [folder.name for folder in done.glob("checkpoint-*")]
    assert sorted(names) == ["checkpoint-2", "checkpoint-4", "checkpoint-4.superseded"]
    assert (done / "final.superseded" / "run.json").is_file()
    assert_same_weights(done, whole)
    assert losses(done) == losses(whole)


def test_a_run_that_began_with_anothers_checkpoint_goes_on_with_its_own(whole: Path, train: Train, tmp_path: Path):
    words = [*SHORT, f"trainer.resume_from_checkpoint={whole / 'checkpoint-2'}"]
    run = train("pretrain-smol", tmp_path / "run", *words)
    before = snapshot(run)
    train("pretrain-smol", run, *words)
    assert snapshot(run) == before
    (run / "final").rename(tmp_path / "final")
    train("pretrain-smol", run, *words)
    assert_same_weights(run, whole)


def test_another_run_in_the_directory_is_refused(whole: Path, train: Train, tmp_path: Path):
    with (
        RunLock(tmp_path / "run"),
        pytest.raises(ValueError, match="another run is training in it"),
    ):
        train("pretrain-smol", tmp_path / "run", *SHORT)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\xff\x00"])
def test_a_torn_line_of_metrics_is_no_obstacle(stopped: Path, whole: Path, train: Train, torn: bytes):
    with (stopped / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    (stopped / "checkpoint-2" / "file_sizes.json").unlink()
    train("pretrain-smol", stopped, *SHORT)
    assert losses(stopped) == losses(whole)


def test_checkpoints_and_final_have_the_fingerprints(whole: Path):
    records = [
        json.loads((whole / name / "run.json").read_text()) for name in ("checkpoint-2", "checkpoint-4", "final")
    ]
    assert all(record["fingerprints"] == records[0]["fingerprints"] for record in records)
    assert records[0]["fingerprints"].keys() == {"config", "data", "code", "versions"}
    assert [record["progress"]["step"] for record in records] == [2, 4, 4]


def test_other_code_and_versions_are_said(stopped: Path, train: Train, caplog: pytest.LogCaptureFixture):
    file = stopped / "checkpoint-2" / "run.json"
    record = json.loads(file.read_text())
    record["code"]["vlm"], record["versions"]["packages"]["torch"] = "0" * 32, "1.0"
    file.write_text(json.dumps(record))
    reseal(file.parent)
    with caplog.at_level(logging.INFO, logger="vlm.train.resume.directory"):
        train("pretrain-smol", stopped, *SHORT)
    assert "  code.vlm: 00000000000000000000000000000000 -> " in caplog.text
    assert f"  versions.packages.torch: 1.0 -> {version('torch')}\n" in caplog.text


def test_a_checkpoint_of_an_earlier_version_goes_on(stopped: Path, whole: Path, train: Train):
    """It has no record of its own: the run directory's files stand in for it."""
    for name in ("run.json", "loss_sums-0.json", "skipped-0.json", "file_sizes.json", "world.json", "guard.json",
                 "manifest.json"):  # fmt: skip
        (stopped / "checkpoint-2" / name).unlink()
    (stopped / "checkpoint-2" / "complete").touch()
    with pytest.raises(ValueError, match=r"trainer\.seed: 42 -> 1"):
        train("pretrain-smol", stopped, *SHORT, "trainer.seed=1")
    train("pretrain-smol", stopped, *SHORT)
    assert_same_weights(stopped, whole)
    (stopped / "final" / "run.json").unlink()
    before = snapshot(stopped)
    train("pretrain-smol", stopped, *SHORT)
    assert snapshot(stopped) == before


def test_other_settings_of_a_run_that_is_done_are_refused(done: Path, train: Train):
    """They would have no effect."""
    before = snapshot(done)
    for word in ("refuse", "accept"):
        with pytest.raises(
            ValueError, match=r"belongs to a run that is done and had other settings:\n  trainer\.seed: 42"
        ):
            train("pretrain-smol", done, *SHORT, "trainer.seed=1", f"trainer.resume_changes={word}")
    assert snapshot(done) == before


def test_accepted_records_are_trained_on_and_recorded(train: Train, records: Path, whole: Path, tmp_path: Path):
    output = train("pretrain-smol", tmp_path / "run", *SHORT, f"dataset.path={records}")
    rewind(output, 2)
    records.write_text(json.dumps(json.loads(records.read_text())[:20]))
    words = [*SHORT, f"dataset.path={records}", "trainer.resume_changes=accept"]
    train("pretrain-smol", output, *words)
    (line,) = [json.loads(line) for line in (output / "changes.jsonl").read_text().splitlines()]
    assert line["changes"]["data.train.samples"] == [24, 20]
    assert json.loads((output / "data.json").read_text())["train"]["samples"] == 24
    assert json.loads((output / "final" / "run.json").read_text())["data"]["train"]["samples"] == 20
    assert losses(output)[:2] == losses(whole)[:2]


def test_another_number_of_ranks_is_shown(stopped: Path, train: Train):
    file = stopped / "checkpoint-2" / "run.json"
    file.write_text(file.read_text().replace('"world_size": 1', '"world_size": 2'))
    reseal(file.parent)
    with pytest.raises(ValueError, match="\n  world_size: 2 -> 1\n"):
        train("pretrain-smol", stopped, *SHORT)
    train("pretrain-smol", stopped, *SHORT, "trainer.resume_changes=accept")


def test_a_run_that_is_done_is_done_on_any_number_of_ranks(done: Path, train: Train):
    file = done / "final" / "run.json"
    file.write_text(file.read_text().replace('"world_size": 1', '"world_size": 2'))
    before = snapshot(done)
    train("pretrain-smol", done, *SHORT, "trainer.gradient_accumulation_steps=2")
    assert snapshot(done) == before


def test_a_damaged_record_is_told(stopped: Path, train: Train):
    (stopped / "checkpoint-2" / "run.json").write_text('{"config": ')
    reseal(stopped / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2/run\.json: it is damaged"):
        train("pretrain-smol", stopped, *SHORT)


def test_the_working_directory_is_not_set_aside(done: Path, train: Train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(done)
    before = snapshot(done)
    with pytest.raises(ValueError, match=r"trainer\.output_dir=\. contains a run and the working directory"):
        train("pretrain-smol", Path(), *SHORT, "trainer.resume_from_checkpoint=never")
    assert snapshot(done) == before


def test_a_templates_content_is_compared(train: Train, tmp_path: Path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}")
    words = [*SHORT, f"dataset.template={template}"]
    output = train("pretrain-smol", tmp_path / "run", *words)
    rewind(output, 2)
    template.write_text(template.read_text().replace("}}<", "}}\n<"))
    with pytest.raises(ValueError, match=r"dataset\.template: own\.jinja \w+ -> own\.jinja \w+"):
        train("pretrain-smol", output, *words)
