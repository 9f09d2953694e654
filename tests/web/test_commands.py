"""Commands of evaluations and exports: exact words, nothing outside the outputs, no options smuggled in."""

import json
import sys
from pathlib import Path

import pytest

from vlm.checks.fields import ConfigError
from vlm.cli.evaluate import make_parser as make_evaluation_parser
from vlm.cli.export_checkpoint import make_parser as make_export_parser
from vlm.config.derived import BASE_FILE
from vlm.data.records.formats import FORMATS
from vlm.web.commands import (
    EXPORT_DESCRIPTIONS,
    MERGED,
    METRICS,
    RECORD_FORMATS,
    Evaluation,
    Export,
    Place,
    format_command,
)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`outputs` in the working directory, with a finished run."""
    monkeypatch.chdir(tmp_path)
    final = tmp_path / "outputs" / "run" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    return Path("outputs")


def test_an_evaluation_is_the_command_of_the_command_line(outputs: Path):
    fields = Evaluation("outputs/run/final", "val.json", "images", ["exact_match", "loss"], "", 32, 4)
    task, command = fields.make(Place(outputs))
    assert command[:4] == [sys.executable, "-m", "vlm", "eval"]
    args = make_evaluation_parser().parse_intermixed_args(command[4:])
    assert (args.checkpoint, args.input, args.image_folder) == ("outputs/run/final", "val.json", "images")
    assert (args.metrics, args.batch_size, args.max_new_tokens) == ("exact_match,loss", 4, 32)
    assert str(args.output) == task.result == "outputs/run/eval/val"
    assert not args.trust_remote_code
    assert format_command(command).startswith("vlm eval outputs/run/final \\\n  --data=val.json")


def test_results_are_not_overwritten_and_an_evaluation_that_was_stopped_goes_on(outputs: Path):
    fields, place = Evaluation("outputs/run/final", "data/val.json", metrics=["loss"]), Place(outputs)
    Path("outputs/run/eval/val").mkdir(parents=True)
    assert fields.make(place)[0].result == "outputs/run/eval/val"
    Path("outputs/run/eval/val/results.json").write_text("{}")
    assert fields.make(place)[0].result == "outputs/run/eval/val-2"


@pytest.mark.parametrize("checkpoint", ["elsewhere/model", "owner/name", "/", ".."])
def test_results_of_other_checkpoints_stay_below_the_outputs(outputs: Path, checkpoint: str):
    task, _ = Evaluation(checkpoint, "val.json", metrics=["loss"]).make(Place(outputs))
    assert Path(task.result).resolve().is_relative_to((outputs / "eval").resolve())


def test_a_link_out_of_the_outputs_is_not_followed(outputs: Path, tmp_path: Path):
    (tmp_path / "secret").mkdir()
    (outputs / "run" / "eval").symlink_to(tmp_path / "secret")
    (outputs / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="writes below outputs/ only"):
        Evaluation("outputs/run/final", "val.json", metrics=["loss"]).make(Place(outputs))
    with pytest.raises(ConfigError, match="writes below outputs/ only"):
        Export("outputs/run/final", "gguf", "out/model").make(Place(outputs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": " "}, "Choose a checkpoint"),
        ({"checkpoint": "--trust-remote-code"}, "options are not taken here"),
        ({"data": None}, "Name the records"),
        ({"data": "-x"}, "options are not taken here"),
        ({"data": "pipe:touch mark"}, "on the command line only"),
        ({"data": "http://host/a.json"}, "on the command line only"),
        ({"metrics": []}, "at least one metric"),
        ({"metrics": ["package.module:function"]}, "vlm eval for your own"),
        ({"format": "package.module:function"}, "vlm eval for others"),
        ({"batch_size": 0}, "Batch size: got 0"),
        ({"max_new_tokens": None}, "Longest answer: got None"),
    ],
)
def test_an_evaluation_is_refused_with_what_to_do(outputs: Path, changed: dict[str, object], message: str):
    values: dict[str, object] = {"checkpoint": "outputs/run/final", "data": "val.json", "metrics": ["loss"]}
    with pytest.raises(ConfigError, match=message):
        Evaluation(**{**values, **changed}).make(Place(outputs))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", EXPORT_DESCRIPTIONS)
def test_an_export_is_the_command_of_the_command_line(outputs: Path, form: str):
    task, command = Export("outputs/run/final", form, dtype="float16", vision_tower="a/b").make(Place(outputs))
    assert task.result == f"outputs/run-{form}"
    if form == MERGED:
        assert command[3:] == ["merge-lora", "outputs/run/final", task.result]
        return
    args = make_export_parser().parse_args(command[4:])
    assert (args.checkpoint, str(args.out), args.format) == ("outputs/run/final", task.result, form)
    assert args.dtype == ("float16" if form == "gguf" else None)
    assert args.vision_tower == ("a/b" if form == "llava-original" else None)


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../..", ".", "run/final/inside", "run"])
def test_an_export_writes_a_new_folder_below_the_outputs(outputs: Path, name: str):
    with pytest.raises(ConfigError, match=r"writes below outputs/ only|exists already|inside the checkpoint"):
        Export("outputs/run/final", "llava", name).make(Place(outputs))


@pytest.mark.parametrize("changed", [{"format": "--help"}, {"format": None}, {"dtype": "x"}, {"checkpoint": "-x"}])
def test_an_export_takes_no_other_words(outputs: Path, changed: dict[str, str]):
    with pytest.raises(ConfigError):
        Export(**{"checkpoint": "outputs/run/final", "format": "gguf", **changed}).make(Place(outputs))


def test_code_and_bases_are_those_of_the_command_that_started_the_page(outputs: Path):
    place = Place(outputs, ["moved/base"], frozenset(["owner/trusted"]))
    evaluation = Evaluation("owner/trusted", "val.json", metrics=["loss"])
    assert evaluation.make(place)[1][-1] == "--trust-remote-code"
    (outputs / "run" / "final" / BASE_FILE).write_text(json.dumps({}))
    words = Export("outputs/run/final", MERGED).make(place)[1]
    assert words[-1] == "--base=moved/base"
    assert "--base=moved/base" in Export("outputs/run/final", "vllm-lora").make(place)[1]
    assert "--base=moved/base" not in Export("outputs/run/final", "llava").make(place)[1]


def test_what_is_offered_exists():
    assert set(RECORD_FORMATS) <= set(FORMATS)
    known = next(action for action in make_evaluation_parser()._actions if action.dest == "metrics").help or ""
    assert all(metric in known for metric in METRICS)
