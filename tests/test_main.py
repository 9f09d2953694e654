"""The command line: it says no quickly and clearly, and every way of starting reaches it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.__main__ import run_names, take_launcher_words
from vlm.config.check import packaged

REFUSALS = {
    "trainer.bf61=true": ("trainer.bf61", "trainer.bf16"),
    "trainer.learning_rate.connector_learning_rat=1": ("connector_learning_rate",),
    "trainer.max_steps=many": ("trainer.max_steps", "many", "Integer"),
    "model/language_model=qwen2.5-0.6b": ("model/language_model/qwen2.5-0.6b", "qwen2.5-0.5b"),
    "model.connector.type=mpl": ("model.connector.type=mpl", "identity, linear, mlp", "package.module:Class"),
    "model.connector.options.deep=3": ("model.connector.options.deep",),
    "model.visual_encoder.feature_strategy=pooled": ("feature_strategy=pooled", "cls+patch"),
    "model.visual_encoder.hf_name=/nowhere": ("model.visual_encoder.hf_name=/nowhere", "no such folder"),
    "dataset.path=/nowhere.json": ("dataset.path=/nowhere.json", "no such file"),
    "dataset.image_folder=/nowhere": ("dataset.image_folder=/nowhere", "no such folder"),
    "dataset.template=v7": ("dataset.template=v7", "chatml", "v1", ".jinja"),
    "dataset.image_mode=crop": ("dataset.image_mode=crop", "square, pad"),
    "dataset.format=csv": ("dataset.format=csv", "llava"),
    "dataset.eval_split=2": ("dataset.eval_split=2",),
    "trainer.loss_average=sum": ("trainer.loss_average=sum", "token, micro_batch"),
    "trainer.lr_scheduler_type=cosin": ("trainer.lr_scheduler_type=cosin", "cosine"),
    "trainer.deepspeed=zero9": ("trainer.deepspeed=zero9", "zero0, zero1, zero2, zero3"),
    "trainer.unfreeze.train_connector=false": ("nothing trains", "trainer.unfreeze.train_connector"),
    "trainer.unfreeze.train_vision_model=true": ("visual_encoder_learning_rate", "train_vision_model=true"),
    "trainer.from_pretrained=/nowhere/final": ("trainer.from_pretrained=/nowhere/final", "config.json"),
    "trainer.resume_from_checkpoint=true": ("trainer.output_dir",),
    "trainer.eval_strategy=epoch": ("trainer.eval_strategy=epoch", "dataset.eval_path"),
    "trainer.fsdp=full_shard": ("trainer.fsdp", "zero3"),
}
REPORT = """
import sys
from vlm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(stop.code or "")
print("torch imported:", "torch" in sys.modules)
"""


def answer(*words: str) -> str:
    """What a command line prints, and whether it imported torch."""
    done = subprocess.run([sys.executable, "-c", REPORT, *words], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "data.json").write_text("[]")
    return f"dataset.path={tmp_path / 'data.json'}"


@pytest.mark.parametrize(("override", "said"), REFUSALS.items(), ids=REFUSALS)
def test_a_refusal_names_the_key_the_value_and_what_is_allowed(override: str, said: tuple[str, ...], data: str):
    printed = answer("-cn", "pretrain-smol", data, override)
    for words in said:
        assert words in printed
    assert "torch imported: False" in printed
    assert "Traceback" not in printed


def test_what_is_missing_is_named():
    assert "dataset.path: a value is needed" in answer("-cn", "pretrain-smol")
    assert "choose a run: -cn" in answer()


def test_help_and_cfg_come_without_torch():
    printed = answer("--help")
    for name in run_names():
        assert name in printed
    assert "torch imported: False" in printed
    shown = answer("-cn", "finetune-llava", "--cfg", "job")
    assert "hf_name: lmsys/vicuna-7b-v1.5" in shown
    assert "torch imported: False" in shown


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vlm; print([name for name in ('torch', 'transformers', 'hydra') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_launchers_words_are_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert take_launcher_words(["--local_rank=3", "-cn", "x"]) == ["-cn", "x"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert take_launcher_words(["--local-rank", "1", "a=b"]) == ["a=b"]


@pytest.mark.parametrize("start", [["-m", "vlm"], ["-m", "vlm", "--local_rank=0"]])
def test_python_m_reaches_the_entry(start: list[str]):
    done = subprocess.run([sys.executable, *start, "-cn", "pretrain-smol"], capture_output=True, text=True)
    assert "dataset.path: a value is needed" in done.stderr
    assert done.returncode == 1


def test_the_console_script_reaches_the_entry():
    script = Path(sys.executable).parent / "vlm"
    done = subprocess.run([script, "-cn", "pretrain-smol"], capture_output=True, text=True)
    assert "dataset.path: a value is needed" in done.stderr


def test_packaged_files_are_found():
    assert "zero3" in packaged("vlm.config", "trainer/deepspeed", ".yaml")
