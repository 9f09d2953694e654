"""Fifty mistakes that people make on the command line: what each is answered with, in three lines at most.

To add one: the command line as it is typed, and the words that the answer must have. `RUN` is a run whose records
exist. Mistakes that are found only while parts of a model are opened are in `tests/assembly/test_compose.py`.
"""

import json
import shlex
from pathlib import Path

import pytest

from vlm.cli.main import main

RUN = "-cn pretrain-smol dataset.path=records.json"
LONGEST = 360
"""Characters of three lines of a terminal."""

MISTAKES = {
    # commands
    "gen": ["`gen` is not a command", "did you mean `vlm generate`?"],
    "genrate x": ["did you mean `vlm generate`?"],
    "train dataset.path=a.json": ["`train` is not a command", "vlm -cn RUN dataset.path=a.json"],
    "finetune-smol dataset.path=a.json": ["is a run, not a command", "vlm -cn finetune-smol dataset.path=a.json"],
    "evaluate x": ["did you mean `vlm eval`?"],
    "frobnicate": ["is not a command", "vlm --help lists the commands"],
    "generate": ["CHECKPOINT is missing", "usage: vlm generate CHECKPOINT", "--help"],
    "generate nowhere/at/all --prompt hi": ["nowhere/at/all: no such folder (seen from ", "nor a name on the Hub"],
    "generate run --prompt hi": ["it is a run directory, and its model is run/final"],
    "generate o/x --prompt hi --image https://a.org/cat.png": ["web addresses are not downloaded", "save the image"],
    "generate x": ["give --prompt for one question, or --input and --output"],
    "generate x --input records.json": ["--output is missing"],
    "generate x --prompt hi --max-new-token 5 --imag a": ["--imag", "--image"],
    "chat x --temperature warm": ["--temperature warm: a number is needed"],
    "eval x --data records.json --metrics blue": ["blue", "bleu"],
    "eval x": ["give --data for a file of records, or --tasks"],
    "export x y": ["--format is missing"],
    "export x y --format ggml": ["--format ggml: allowed are llava, llava-original, gguf, onnx"],
    "web --port 80a": ["--port 80a: a whole number is needed"],
    "serve x --host 0.0.0.0": ["there is no API key", "--api-key-file"],
    "launch -- ": ["the run is missing", "-- -cn pretrain-smol"],
    "submit nodes=2": ["the run is missing: add -cn RUN"],
    "models nothing-of-this-name": ["no part and no model of that name"],
    # runs and options
    "-cn finetune-smoll": ["no such run", "finetune-smol?"],
    "-cn llava dataset.path=records.json": ["no such run", "finetune-llava", "A YAML of your own needs --config-dir"],
    "-cn pretrain-smol": ["dataset.path: a value is needed"],
    "-cn": ["-cn: expected one argument"],
    f"{RUN} --model_name_or_path lmsys/vicuna-7b-v1.5": ["without dashes", "model.language_model.hf_name"],
    f"{RUN} --learning_rate=2e-5": ["without dashes", "trainer.learning_rate.language_model_learning_rate"],
    f"{RUN} --bf16 True": ["without dashes", "trainer.bf16"],
    # keys of other frameworks
    f"{RUN} trainer.lr=1e-3": ["trainer.learning_rate.language_model_learning_rate", "Each part has its own rate"],
    f"{RUN} trainer.batch_size=8": ["trainer.per_device_train_batch_size"],
    f"{RUN} num_epochs=3": ["trainer.num_train_epochs"],
    f"{RUN} trainer.learning_rate=1e-3": ["it is a section", "connector_learning_rate"],
    f"{RUN} mm_projector_type=mlp2x_gelu": ["model/connector=mlp"],
    f"{RUN} freeze_backbone=true": ["trainer.unfreeze.train_language_model=false"],
    f"{RUN} lora_rank=8": ["trainer.lora.language_model.r"],
    f"{RUN} cutoff_len=2048": ["dataset.max_length"],
    f"{RUN} max_steps=5": ["Did you mean trainer.max_steps?"],
    f"{RUN} trainer.max_length=512": ["Did you mean dataset.max_length?"],
    # choices
    f"{RUN} model/language_model=vicuna": ["vicuna-13b-v1.5 or vicuna-7b-v1.5"],
    f"{RUN} model/connector=mlp2x_gelu": ["Did you mean mlp?"],
    f"{RUN} model/visual_encoder=siglip": ["siglip-base-patch16-224", "vlm models lists all"],
    f"{RUN} model/encoder=clip-vit-base-patch16": ["no such group", "model/visual_encoder"],
    f"{RUN} trainer/deepspeed=zero4": ["Did you mean zero3?"],
    f"{RUN} dataset.format=sharegpt": ["sharegpt", "Did you mean llava?"],
    f"{RUN} trainer.unfreeze=all": ["it is a section", "trainer/unfreeze=NAME: all, "],
    # values
    f"{RUN} trainer.num_train_epochs=two": ["a number is needed"],
    f"{RUN} trainer.packing=maybe": ["true or false is needed"],
    f"{RUN} trainer.optim=adamW": ["trainer.optim=adamW", "Did you mean adamw_torch"],
    f"{RUN} trainer.learning_rate.visual_encoder_learning_rate=1e-5": ["no effect", "train_vision_model=true"],
    "-cn pretrain-smol dataset.path=records.jsn": ["records.jsn: no such file", "seen from"],
    f"{RUN} dataset.image_folder=picures": ["no such folder"],
    f"{RUN} dataset.image_folder=~/images": ["~ is not expanded here", "$HOME/images"],
    f"{RUN} trainer.from_pretrained=run": ["it is a run directory, and its model is run/final"],
    f"{RUN} trainer.max_steps": ["key=value is needed"],
}  # fmt: skip
"""Command line -> words of the answer."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory: records, and a run whose model is in `final`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLM_API_KEY", raising=False)
    Path("records.json").write_text("[]")
    Path("run/final").mkdir(parents=True)
    Path("run/final/config.json").write_text(json.dumps({"model_type": "vlm"}))


def test_there_are_fifty():
    assert len(MISTAKES) >= 50


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_three_lines(line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line))
    code, printed = stopped.value.code, capsys.readouterr()
    assert code not in (None, 0)
    answer = (code if isinstance(code, str) else printed.err).strip()
    assert [word for word in MISTAKES[line] if word not in answer] == [], answer
    assert answer.startswith("vlm")
    assert "Traceback" not in answer + printed.out + printed.err
    assert len(answer.splitlines()) <= 3
    assert len(answer) <= LONGEST, answer
