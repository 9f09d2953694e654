"""The entry: every way of starting reaches it, and what it refuses it refuses before torch is imported."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore

from tests import waiting
from tests.checks import test_messages as test_explain
from tests.checks import test_run as test_check
from tests.command_line import refusal
from vlm.checks.compose import composed_once, is_user_error, store_schema, strip_launcher_arguments
from vlm.cli.collection import RARE, USUAL, collect_as_usual, rare_collection
from vlm.cli.main import main
from vlm.cli.train import DYNAMO_SWITCH, train, uncompiled_bitsandbytes, without_deepspeed, without_libraries
from vlm.config.schema import RunConfig
from vlm.models.connectors import connector_class
from vlm.train.distributed import Rank0Failed
from vlm.train.guards.errors import GuardStop

ASK_ALL = """
import json, sys
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from vlm.cli.main import main

Hydra.get_mode = lambda *given, **named: RunMode.RUN  # Hydra composes everything twice to find it
for words in json.load(sys.stdin):
    try:
        main(words)
    except SystemExit as stop:
        said = str(stop.code or "")
        assert said.startswith("vlm: ") or "--help" in words or "--cfg" in words, words
print([name for name in ("torch", "transformers", "deepspeed") if name in sys.modules])
"""


def start(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python to its end."""
    return waiting.run([sys.executable, *words], stdin=given)


@pytest.fixture
def records(tmp_path: Path) -> str:
    (tmp_path / "records.json").write_text("[]")
    return f"dataset.path={tmp_path / 'records.json'}"


def test_all_that_is_refused_and_shown_needs_no_torch(records: str):
    run = ["-cn", "pretrain-smol"]
    refusals = [[*run, records, *overrides] for overrides, _ in test_check.REFUSALS.values()]
    refusals += [[*run, records, override] for override in test_explain.REFUSALS]
    shown = [["--help"], ["--version"], [*run, "--help"], [*run, records, "--cfg", "job"]]
    done = start("-c", ASK_ALL, given=json.dumps([*refusals, *shown, run, []]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stdout + done.stderr


def test_what_every_rank_finds_one_says():
    done = start("-m", "vlm", "--local_rank=1", "-cn", "pretrain-smol")
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("rank", [[], ["--local_rank=0"], ["--local-rank", "0"]], ids=str)
def test_python_m_reaches_the_entry(rank: list[str]):
    done = start("-m", "vlm", *rank, "-cn", "pretrain-smol")
    assert (done.returncode, done.stderr) == (
        1,
        "vlm: dataset.path: a value is needed: the file of your records, such as train.json (docs/data.md)\n",
    )


def test_the_console_script_reaches_the_entry():
    done = start(str(Path(sys.executable).parent / "vlm"), "-cn", "pretrain-smol")
    assert done.stderr.startswith("vlm: dataset.path")


def test_cfg_shows_the_composed_run():
    done = start("-m", "vlm", "-cn", "finetune-llava", "--cfg", "job")
    assert done.returncode == 0
    assert "hf_name: lmsys/vicuna-7b-v1.5" in done.stdout
    assert "run:" not in done.stdout.splitlines()


def test_importing_the_package_is_fast_and_imports_nothing_heavy():
    """Fast: few modules, whose number no machine changes."""
    code = (
        "import sys; before = {*sys.modules}; import vlm; imported = sys.modules.keys() - before\n"
        "print(len(imported), [name for name in ('torch', 'transformers', 'hydra', 'numpy') if name in sys.modules])"
    )
    number, heavy = start("-c", code).stdout.split(maxsplit=1)
    assert heavy == "[]\n"
    assert int(number) < 50


def test_launchers_words_are_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "")  # so that what the launcher's word sets is taken back afterwards
    monkeypatch.delenv("LOCAL_RANK")
    assert strip_launcher_arguments(["--local_rank=3", "-cn", "x"]) == ["-cn", "x"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert strip_launcher_arguments(["--local-rank", "1", "a=b"]) == ["a=b"]
    assert os.environ["LOCAL_RANK"] == "3"


def test_what_a_model_refuses_later_ends_without_a_traceback(
    records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    parts = [f"model.{part}.hf_name={tmp_path}" for part in ("visual_encoder", "language_model")]
    said = refusal("-cn", "pretrain-smol", records, *parts)
    assert said.startswith(f"vlm: model.visual_encoder.hf_name={tmp_path}: no model configuration there")


def test_a_connector_class_is_found_beside_the_run(records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    parts = [f"model.{part}.hf_name={tmp_path}" for part in ("visual_encoder", "language_model")]
    words = ["-cn", "pretrain-smol", records, *parts]
    missing = refusal(*words, "model.connector.type=connector_beside:Mine")
    assert missing == "vlm: model.connector.type=connector_beside:Mine: No module named 'connector_beside'"
    (tmp_path / "connector_beside.py").write_text("class Mine:\n    pass\n")
    said = refusal(*words, "model.connector.type=connector_beside:Mine")
    assert said.startswith("vlm: model.connector.options.input_norm: connector_beside:Mine does not take it")


def test_errors_of_ours_are_told_from_those_of_others():
    for ours, cause in ((True, lambda: connector_class("mpl")), (False, lambda: int("x"))):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - which one is what is asked
            cause()
        assert is_user_error(error.value) is ours


def test_bitsandbytes_is_compiled_for_runs_that_use_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(DYNAMO_SWITCH, raising=False)
    with uncompiled_bitsandbytes(RunConfig()):
        assert os.environ[DYNAMO_SWITCH] == "1"
    assert DYNAMO_SWITCH not in os.environ
    quantized, paged = RunConfig(), RunConfig()
    quantized.model.language_model.quantization = "4bit"
    paged.trainer.optim = "paged_adamw_8bit"
    for config in (quantized, paged):
        with uncompiled_bitsandbytes(config):
            assert DYNAMO_SWITCH not in os.environ


def test_garbage_is_collected_rarely_while_a_command_starts_and_as_usual_in_a_run():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with rare_collection():
        assert gc.get_threshold() == RARE
        collect_as_usual()
        assert gc.get_threshold() == USUAL
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    if not frozen:
        gc.unfreeze()


@pytest.mark.parametrize(("end", "waits"), [(SystemExit(75), True), (GuardStop("NaN"), True), (Rank0Failed(1), False)])
def test_ranks_wait_for_each_other_only_where_all_end(monkeypatch: pytest.MonkeyPatch, end: SystemExit, waits: bool):
    """Where rank 0 has failed, it does not come to a barrier, and the others would end with an error of their own."""
    closed: list[bool] = []

    def run(*_: object) -> None:
        raise end

    monkeypatch.setattr("vlm.train.run.run", run)
    monkeypatch.setattr("vlm.train.distributed.close_process_group", lambda: closed.append(True))
    with pytest.raises(SystemExit):
        train(RunConfig(), "name", [])
    assert bool(closed) is waits


HUSHED = """
import atexit, os, sys, types
atexit.register(os.write, 2, b"a report of what is alive")
from vlm.cli.collection import hush_leak_reports

hush_leak_reports()
atexit.register(os.write, 2, b"a library's last words")
sys.modules["triton"] = types.ModuleType("triton")
"""


def test_what_bindings_report_behind_the_last_message_is_not_shown():
    assert start("-c", HUSHED).stderr == "a library's last words"


ASK_IMPORTS = """
import sys
from vlm.cli.main import main

main(sys.argv[1:])
unused = ("deepspeed", "datasets", "scipy", "sklearn", "nltk", "rouge_score", "tensorboard", "fastapi")
print([name for name in unused if name in sys.modules])
"""


def test_a_run_imports_no_library_that_it_does_not_use(common: list[str], tmp_path: Path):
    """In a process of its own: here, other tests have imported them all."""
    words = ["-cn", "pretrain-smol", *common, "trainer.max_steps=1", "trainer.report_to=none"]
    done = start("-c", ASK_IMPORTS, *words, f"trainer.output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


OWN_PROCESS = """
import sys
from vlm.cli.main import main

main()
print("peft" in sys.modules)
"""


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_run_imports_peft_for_adapters(common: list[str], tmp_path: Path, has_adapter: bool):
    words = ["-cn", "pretrain-smol", *common, "trainer.max_steps=1", "trainer.report_to=none"]
    rate = "trainer.learning_rate.language_model_learning_rate=1e-4"
    words += ["trainer.lora.language_model.r=2", rate] if has_adapter else []
    done = start("-c", OWN_PROCESS, *words, f"trainer.output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(has_adapter)


def test_hidden_libraries_are_there_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    with without_libraries("scipy", "json"):
        assert importlib.util.find_spec("scipy") is None
        assert importlib.util.find_spec("json") is not None, "it is imported, so something uses it"
    assert importlib.util.find_spec("scipy") is not None


def test_accelerate_knows_deepspeed_again_after_a_run():
    from accelerate.utils import other

    before = other.is_deepspeed_available
    with without_deepspeed():
        assert not other.is_deepspeed_available()
    assert other.is_deepspeed_available is before


@pytest.mark.parametrize(
    ("words", "is_asked"),
    [
        (["-cn", "pretrain-smol", "dataset.path=hydra.json"], False),
        (["-cn", "pretrain-smol", "--multirun"], True),
        (["-cn", "pretrain-smol", "++hydra.mode=MULTIRUN"], True),
        (["-cn", "mine", "--config-dir", "."], True),
    ],
    ids=str,
)
def test_hydra_is_asked_for_its_mode_where_something_may_set_it(words: list[str], is_asked: bool):
    """It composes everything once more for that."""
    get_mode = Hydra.get_mode
    with composed_once(words):
        assert (Hydra.get_mode is get_mode) is is_asked
    assert Hydra.get_mode is get_mode


def test_the_schema_is_stored_once(monkeypatch: pytest.MonkeyPatch):
    """Else every command of a process that runs many would turn its classes into nodes again."""
    store = ConfigStore.instance()
    stored = []
    monkeypatch.setattr(ConfigStore, "store", lambda self, name, node: stored.append((name, node)))
    store_schema()
    assert not stored
    monkeypatch.delitem(store.repo, "schema.yaml")
    store_schema()
    assert stored == [("schema", RunConfig)]


def test_hydra_composes_a_run_once(records: str, monkeypatch: pytest.MonkeyPatch):
    composed: list[str | None] = []
    compose_config = Hydra.compose_config

    def count(self: Hydra, config_name: str | None, *given: Any, **named: Any) -> Any:
        composed.append(config_name)
        return compose_config(self, config_name, *given, **named)

    monkeypatch.setattr(Hydra, "compose_config", count)
    monkeypatch.setattr("vlm.cli.train.train", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["vlm"])
    main(["-cn", "pretrain-smol", records])
    assert composed == ["pretrain-smol"]
