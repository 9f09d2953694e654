"""A run from the first batch to the folder that loads alone."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.fixtures import compose_config, losses, newest_checkpoint
from tests.forked import find_free_port, run_forked
from tests.tiny_parts import Parts
from tests.waiting import wait_until
from vlm.runs.read import RunDirectory
from vlm.train.checkpoints.find import find_whole_checkpoint
from vlm.train.run import run
from vlm.train.run_directory import versions
from vlm.train.trainer import VLMTrainer

FILES = (
    "config.yaml", "command.txt", "versions.json", "data.json", "metrics.jsonl", "loss.png", "samples.md",
    "first_batch.html", "skipped.jsonl", "parts.json", "report.html", "final/config.json",
    "final/model.safetensors", "final/processor_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrain run over the tiny world, evaluated at its end."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    return train(
        "pretrain-smol", folder, "trainer.num_train_epochs=1", "dataset.eval_split=0.5",
        "trainer.eval_strategy=epoch", plots=True,
    )  # fmt: skip


def test_a_run_leaves_everything_behind(pretrained: Path):
    for name in FILES:
        assert (pretrained / name).is_file(), name
    assert list(pretrained.glob("runs/*/events.out.tfevents.*"))
    data = json.loads((pretrained / "data.json").read_text())
    assert (data["train"]["samples"], data["eval"]["samples"]) == (12, 12)
    page = (pretrained / "first_batch.html").read_text()
    assert "<mark>" in page
    assert "image token" in page
    assert "**answer**" in (pretrained / "samples.md").read_text()


def test_answers_go_to_tensorboard_with_their_images(pretrained: Path):
    """Also those at the end, where its callback closes the file; an image that stays the same goes once."""
    (folder,) = pretrained.glob("runs/*")
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags, run = events.Tags(), RunDirectory(pretrained)
    answers = run.samples[run.step]
    assert tags["images"] == [f"samples/{number}" for number, one in enumerate(answers) if one.image is not None]
    assert {event.step for event in events.Images("samples/0")} == {run.step}
    (text,) = events.Tensors("samples/0/text_summary")
    assert text.step == run.step
    shown = text.tensor_proto.string_val[0].decode()
    assert " ".join(shown.split()).endswith(f"**answer** {answers[0].answer}".strip())
    (settings,) = events.Tensors("settings/text_summary")
    assert b"    dataset.eval_split: 0.5\n" in settings.tensor_proto.string_val[0]
    assert "eval/loss_ci95" in tags["scalars"]


def test_evaluation_logs_the_loss_on_blank_pictures(pretrained: Path):
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "eval_loss" in line)
    assert {"eval_blank_loss", "eval_image_gain", "eval_loss_ci95", "eval_blank_loss_ci95"} <= logged.keys()
    assert logged["eval_blank_loss"] != logged["eval_loss"]


def test_what_the_evaluation_found_of_each_record_is_kept(pretrained: Path):
    run = RunDirectory(pretrained)
    kept = run.records_at(run.step)
    assert kept is not None
    loss = kept.metrics["loss"]
    assert len(loss.sums) == 12
    assert loss.value == pytest.approx(run.metrics.last("eval_loss"), abs=1e-4)
    assert (loss.score.high or 0) - loss.value == pytest.approx(run.metrics.last("eval_loss_ci95"), rel=1e-3)
    assert kept.metrics["image_gain"].counts.sum() == sum(json.loads(text)["eval"]["images"] for text in [
        (pretrained / "data.json").read_text()
    ])  # fmt: skip


def test_connector_checkpoints_hold_the_connector_alone(pretrained: Path):
    state = load_file(Path(find_whole_checkpoint(pretrained) or "") / "trained.safetensors")
    assert state
    assert all(name.startswith("connector.") for name in state)


def test_only_the_connector_moved(pretrained: Path, world: Path):
    with (
        safe_open(pretrained / "final" / "model.safetensors", "pt") as final,
        safe_open(world / "language_model" / "model.safetensors", "pt") as before,
    ):
        for name in before.keys():  # noqa: SIM118 - a safetensors file is no mapping
            rows = len(before.get_tensor(name))
            assert torch.equal(final.get_tensor(f"language_model.{name}")[:rows], before.get_tensor(name)), name


def test_finetuning_continues_from_the_pretrained_model(pretrained: Path, train: Callable[..., Path], tmp_path: Path):
    folder = train(
        "finetune-smol", tmp_path / "finetune", f"trainer.from_pretrained={pretrained / 'final'}",
        "trainer.max_steps=2", "trainer.learning_rate.language_model_learning_rate=1e-3",
    )  # fmt: skip
    before = load_file(pretrained / "final" / "model.safetensors")
    after = load_file(folder / "final" / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector", "language_model"}
    model = AutoModelForImageTextToText.from_pretrained(folder / "final")
    assert model.config.recipe["visual_encoder"]["hf_name"]


def test_a_stage_without_a_template_of_its_own_takes_the_language_models(
    pretrained: Path, train: Callable[..., Path], world: Path, tmp_path: Path
):
    """`plain` in the first stage does not replace it for the second."""
    assert compose_config("finetune-smol", ["dataset.path=x"]).dataset.template == "tokenizer"
    start = f"trainer.from_pretrained={pretrained / 'final'}"
    rates = "trainer.learning_rate.language_model_learning_rate=1e-3"
    folder = train("finetune-smol", tmp_path / "finetune", start, rates, "trainer.max_steps=1")
    own = AutoTokenizer.from_pretrained(world / "language_model").chat_template
    assert (pretrained / "final" / "chat_template.jinja").read_text() != own
    assert (folder / "final" / "chat_template.jinja").read_text() == own


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model/connector=linear", "model.connector.type"),
        ("model.visual_encoder.hf_name=openai/other", "model.visual_encoder.hf_name"),
        ("model.connector.options.num_layers=3", "model.connector.options.num_layers"),
    ],
)
def test_a_checkpoints_architecture_is_not_contradicted(
    pretrained: Path, common: list[str], tmp_path: Path, override: str, named: str
):
    words = [*common, f"trainer.from_pretrained={pretrained / 'final'}", f"trainer.output_dir={tmp_path}", override]
    config = compose_config("finetune-smol", words)
    with pytest.raises(ValueError, match=named) as refused:
        run(config, "finetune-smol", [word.split("=")[0].replace("/", ".") for word in words])
    assert "checkpoint has" in str(refused.value)


def test_a_run_without_a_usable_record_is_refused(train: Callable[..., Path], tmp_path: Path):
    (tmp_path / "records.json").write_text('[{"id": "a", "image": "no.png", "conversations": []}]')
    with pytest.raises(ValueError, match="conversations"):
        train("pretrain-smol", tmp_path / "run", f"dataset.path={tmp_path / 'records.json'}")
    refused = RunDirectory(tmp_path / "run")
    assert refused.state == "refused"
    assert "conversations" in refused.status["message"]
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("sampling", ["random", "group_by_modality_length", "group_by_modality_blocks"])
def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable[..., Path], tmp_path: Path, sampling: str):
    options = [
        "trainer.num_train_epochs=3", "trainer.save_strategy=steps", "trainer.save_steps=4",
        f"trainer.train_sampling_strategy={sampling}", "trainer.save_total_limit=5",
    ]  # fmt: skip
    whole = train("pretrain-smol", tmp_path / "run", *options)
    expected, weights = losses(whole), load_file(whole / "final" / "model.safetensors")
    (whole / "checkpoint-8" / "manifest.json").unlink()  # a torn checkpoint is not resumed from
    (whole / "checkpoint-9" / "manifest.json").unlink()
    shutil.rmtree(whole / "final")
    assert find_whole_checkpoint(whole) == whole / "checkpoint-4"
    resumed = train("pretrain-smol", tmp_path / "run", *options)
    assert losses(resumed) == pytest.approx(expected, abs=1e-6)
    again = load_file(resumed / "final" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.allclose(weight, again[name], atol=1e-6), name


@pytest.mark.parametrize(("workers", "async_save"), [(0, "true"), (1, "false")])
def test_a_run_that_is_asked_to_end_saves_and_can_go_on(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    workers: int, async_save: str,
):  # fmt: skip
    """SIGTERM in the middle of a step, to the process and to its data workers, as a cluster sends it to a group."""
    options = ["trainer.num_train_epochs=3", "trainer.save_strategy=no", f"trainer.dataloader_num_workers={workers}"]
    options.append(f"trainer.async_save={async_save}")
    expected = losses(train("pretrain-smol", tmp_path / "whole", *options))
    step = VLMTrainer.training_step
    others = {process.pid for process in multiprocessing.active_children()}  # data workers of earlier tests

    def asked(self: VLMTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            children = {process.pid for process in multiprocessing.active_children()} - others
            group = [os.getpid(), *children]
            assert len(children) == workers
            subprocess.run(["kill", "-TERM", *map(str, group)], check=True)  # by no parent of theirs
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: self.stop_on_signal.listener.received)
        return step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(VLMTrainer, "training_step", asked)
    with caplog.at_level("INFO", logger="vlm.train"), pytest.raises(SystemExit) as ended:
        train("pretrain-smol", tmp_path / "run", *options)
    assert ended.value.code == 75
    assert "saved checkpoint-4" in caplog.text
    assert find_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    assert not (tmp_path / "run" / "final").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(VLMTrainer, "training_step", step)
    resumed = train("pretrain-smol", tmp_path / "run", *options)
    assert losses(resumed) == pytest.approx(expected, abs=1e-6)


FAILING = """
import sys

from vlm.cli.train import main
from vlm.train.trainer import VLMTrainer


def fails(*args, **kwargs):
    raise RuntimeError("no memory left")


VLMTrainer.training_step = fails
main(sys.argv[1:])
"""


def test_a_run_that_fails_ends_with_its_data_workers(common: list[str], tmp_path: Path):
    """They hear no SIGTERM, by which Python would end them."""
    words = ["-cn", "pretrain-smol", *common, "trainer.dataloader_num_workers=2", f"trainer.output_dir={tmp_path}"]
    (done,) = run_forked(["-c", FAILING, *words])
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: no memory left" in done.stderr, done.stdout + done.stderr


def test_a_run_that_fails_listens_to_signals_no_more(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no memory left")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(VLMTrainer, "training_step", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        train("pretrain-smol", tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpoint_that_is_torn_costs_no_older_one(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Older checkpoints go when the new one is complete, not before."""
    options = ["trainer.num_train_epochs=3", "trainer.save_strategy=steps", "trainer.save_steps=4",
               "trainer.save_total_limit=1"]  # fmt: skip
    saved = VLMTrainer._save_rng_state

    def dies(self: VLMTrainer, folder: str) -> None:
        if folder.endswith("checkpoint-8"):
            raise KeyboardInterrupt
        saved(self, folder)

    monkeypatch.setattr(VLMTrainer, "_save_rng_state", dies)
    with pytest.raises(KeyboardInterrupt):
        train("pretrain-smol", tmp_path / "run", *options)
    assert find_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    monkeypatch.undo()
    train("pretrain-smol", tmp_path / "run", *options)
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-9"]
    assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 2


def test_batch_statistics_of_an_encoder_that_trains_are_kept(train: Callable[..., Path], parts: Parts, tmp_path: Path):
    """They are buffers, which no optimiser knows of."""
    options = [
        f"model.visual_encoder.hf_name={parts.encoder('timm_convnet')}", "trainer.unfreeze.train_vision_model=true",
        "trainer.learning_rate.visual_encoder_learning_rate=1e-3", "trainer.num_train_epochs=2",
        "trainer.save_strategy=steps", "trainer.save_steps=3",
    ]  # fmt: skip
    whole = train("pretrain-smol", tmp_path / "run", *options)
    expected = load_file(whole / "final" / "model.safetensors")
    for checkpoint in whole.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-3":
            (checkpoint / "manifest.json").unlink()
    shutil.rmtree(whole / "final")
    resumed = train("pretrain-smol", tmp_path / "run", *options)
    again = load_file(resumed / "final" / "model.safetensors")
    statistics = [name for name in expected if name.endswith("running_mean")]
    assert statistics
    for name in statistics:
        assert torch.allclose(expected[name], again[name], atol=1e-5), name


def test_resuming_with_other_parts_is_refused(pretrained: Path, train: Callable[..., Path], tmp_path: Path):
    checkpoint = find_whole_checkpoint(pretrained)
    with pytest.raises(ValueError, match=r"trainer\.unfreeze"):
        train(
            "finetune-smol", tmp_path / "other", f"trainer.resume_from_checkpoint={checkpoint}",
            "trainer.max_steps=9", "trainer.learning_rate.language_model_learning_rate=1e-3",
        )  # fmt: skip


def test_records_of_another_form_are_read_by_a_function_of_the_users_own(
    train: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "captions_reader.py").write_text(
        "from vlm.data.sample import ImageRef, Sample, Turn\n"
        "def read(record, image_folder):\n"
        "    picture = ImageRef(image_folder / record['file'])\n"
        "    return Sample(record['file'], (Turn('user', (picture,)), Turn('assistant', (record['text'],))))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "records.json").write_text(json.dumps([{"file": "0.png", "text": "red"}, {"file": "1.png"}]))
    options = ["dataset.format=captions_reader:read", f"dataset.path={tmp_path / 'records.json'}"]
    with pytest.raises(ValueError, match=r"records.json, record 1: .*KeyError: 'text' \(captions_reader.py, line 4\)"):
        train("pretrain-smol", tmp_path / "bad", *options, "trainer.max_steps=1")
    (tmp_path / "records.json").write_text(json.dumps([{"file": "0.png", "text": "red"}] * 8))
    folder = train("pretrain-smol", tmp_path / "run", *options, "trainer.max_steps=1")
    assert json.loads((folder / "data.json").read_text())["train"]["samples"] == 8


def test_bad_records_are_listed_when_skipped(train: Callable[..., Path], world: Path, tmp_path: Path):
    records = json.loads((world / "records.json").read_text())
    records[0]["image"] = "missing.png"
    records[1]["conversations"][1]["value"] = "long " * 400
    (tmp_path / "records.json").write_text(json.dumps(records))
    folder = train(
        "pretrain-smol", tmp_path / "run", f"dataset.path={tmp_path / 'records.json'}", "trainer.max_steps=1",
        "dataset.on_bad_sample=skip",
    )  # fmt: skip
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [one["id"] for one in skipped] == ["0", "1"]
    assert "does not exist" in skipped[0]["reason"]
    assert "max_length" in skipped[1]["reason"]


def test_samples_of_which_the_template_leaves_no_prompt_are_passed_over(
    train: Callable[..., Path], world: Path, tmp_path: Path
):
    records = json.loads((world / "records.json").read_text())
    text_only = [record for record in records if "image" not in record]
    (tmp_path / "records.json").write_text(json.dumps(text_only))
    folder = train(
        "pretrain-smol", tmp_path / "run", f"dataset.path={tmp_path / 'records.json'}", "trainer.max_steps=1"
    )
    assert (folder / "final" / "model.safetensors").is_file()


def test_an_interrupted_evaluation_is_made_when_the_run_is_resumed(
    train: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The weights and the metrics are those of the run that nothing interrupted."""
    options = [
        "trainer.num_train_epochs=2", "trainer.save_strategy=no", "trainer.eval_strategy=steps", "trainer.eval_steps=2",
        f"dataset.eval_path={world / 'records.json'}",
    ]  # fmt: skip
    whole = train("pretrain-smol", tmp_path / "whole", *options)
    batches = VLMTrainer._prepare_inputs

    def asked(self: VLMTrainer, inputs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: self.stop_on_signal.listener.received)
        return batches(self, inputs)

    monkeypatch.setattr(VLMTrainer, "_prepare_inputs", asked)
    with pytest.raises(SystemExit) as ended:
        train("pretrain-smol", tmp_path / "run", *options)
    assert ended.value.code == 75
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-4"
    monkeypatch.setattr(VLMTrainer, "_prepare_inputs", batches)
    resumed = train("pretrain-smol", tmp_path / "run", *options, "trainer.resume_from_checkpoint=true")
    assert evaluation_losses(resumed) == pytest.approx(evaluation_losses(whole), abs=1e-6)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


def evaluation_losses(run_directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


ASKED_ON_ONE_RANK = """
import os, signal, sys, time
from vlm.cli.train import main
from vlm.train.trainer import VLMTrainer

step = VLMTrainer.training_step


def asked(self, *args, **kwargs):
    if self.args.process_index == 1 and self.state.global_step == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
        while self.stop_on_signal.listener.received is None:
            time.sleep(0.01)
    return step(self, *args, **kwargs)


def end(code):
    print("the interpreter's own end is left out", flush=True)
    leave(code)


leave, os._exit = os._exit, end
VLMTrainer.training_step = asked
main(sys.argv[1:])
"""


def test_ranks_agree_on_a_signal_to_one_of_them_and_end_cleanly(common: list[str], tmp_path: Path):
    """Under ZeRO-3 threads of gloo are left, which could make a rank abort while the interpreter ends."""
    words = ["-cn", "pretrain-smol", *common, f"trainer.output_dir={tmp_path}", "trainer.deepspeed=zero3"]
    port = find_free_port()
    environments = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in ("0", "1")
    ]
    command = ["-c", ASKED_ON_ONE_RANK, *words, "trainer.per_device_train_batch_size=4"]
    ended = run_forked(command, command, environments=environments)
    assert {one.returncode for one in ended} <= {75, -signal.SIGKILL}, ended[0].stderr + ended[1].stderr
    assert 75 in {one.returncode for one in ended}
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert all("own end is left out" in one.stdout for one in ended if one.returncode == 75)


def test_git_is_asked_once_for_the_revision_of_a_process(monkeypatch: pytest.MonkeyPatch):
    """Its source was imported when it began: what is committed meanwhile does not run."""
    first = versions()
    monkeypatch.setattr("vlm.train.run_directory.subprocess", None)
    assert versions() == first
