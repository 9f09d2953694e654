"""From the page's fields to a checked command."""

import shlex
import socket
import sys
from pathlib import Path

import pytest

from tests.command_line import refusal
from vlm.checks.fields import ConfigError
from vlm.cli.main import main
from vlm.web.guard import RequestGuard, is_loopback
from vlm.web.plan import Plan, choices, choose_run_folder, format_for_shell, make_command

FOLDER = Path("outputs/run")


@pytest.fixture
def records(tmp_path: Path) -> str:
    (tmp_path / "records.json").write_text("[]")
    return str(tmp_path / "records.json")


def test_fields_become_words(records: str):
    parts = {"connector": "resampler", "language_model": "owner/name", "visual_encoder": "", "head": None}
    plan = Plan("pretrain-smol", parts, {"dataset.path": records}, "# a note\n\n trainer.num_train_epochs=1 \n")
    assert plan.words() == [
        "model/connector=resampler", "model.language_model.hf_name=owner/name", f"dataset.path={records}",
        "trainer.num_train_epochs=1",
    ]  # fmt: skip
    config = plan.compose_config()
    assert (config.model.connector.type, config.model.language_model.hf_name) == ("resampler", "owner/name")
    assert config.trainer.num_train_epochs == 1
    assert plan.overridden_keys()[:2] == ["model.connector", "model.language_model.hf_name"]


@pytest.mark.parametrize(
    "lines",
    ["trainer.num_train_epochs=many", "trainer.num_train_epoch=1", "model/connector=none", "learn",
     "dataset.template=latin", "model.connector.options.depth=x", "dataset.path=/nowhere.json"],
)  # fmt: skip
def test_what_the_command_line_refuses_is_refused_in_its_words(records: str, lines: str):
    with pytest.raises(ConfigError) as refused:
        Plan("pretrain-smol", {}, {"dataset.path": records}, lines).compose_config()
    assert f"vlm: {refused.value}" == refusal("-cn", "pretrain-smol", f"dataset.path={records}", lines)


@pytest.mark.parametrize(
    "line",
    ["--multirun", "-cd=/tmp", "hydra.run.dir=/tmp", "hydra/launcher=x", "+hydra.callbacks={}",
     "dataset.allow_pipe=true", "+_target_=os.system", "dataset.path=${oc.env:HOME}",
     "dataset.image_folder='${oc.env:HOME}'"],
)  # fmt: skip
def test_the_page_does_not_reach_past_the_run(records: str, line: str):
    with pytest.raises(ConfigError, match=r"on the command line only|options are not taken|is not filled in"):
        Plan("pretrain-smol", {}, {"dataset.path": records}, line).compose_config()


def test_an_unknown_run_and_part_are_refused(records: str):
    with pytest.raises(ConfigError, match="choose a run"):
        Plan("../base").compose_config()
    with pytest.raises(ConfigError, match="Allowed are"):
        Plan("pretrain-smol", {"connector": "/etc/passwd"}).compose_config()
    assert "mlp" in choices("connector")


@pytest.mark.parametrize(
    "name", ["a folder", "it's", 'a "b"', "$(touch x)", "a,b", "[a]", "{a: b}", "a;b", "back\\slash", "end\\"]
)
def test_a_path_stays_a_path(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "records.json").write_text("[]")
    path = str(folder / "records.json")
    plan = Plan("pretrain-smol", {}, {"dataset.path": path, "dataset.image_folder": str(folder)})
    config = plan.compose_config()
    assert (config.dataset.path, config.dataset.image_folder) == (path, str(folder))
    command = make_command(plan, FOLDER)
    assert shlex.split(format_for_shell(command).replace("\\\n", "")) == command


def test_the_command_is_this_python_and_a_process_for_each_gpu(records: str):
    plan = Plan("pretrain-smol", {}, {"dataset.path": records})
    ending = ["-cn", "pretrain-smol", f"dataset.path={records}", f"trainer.output_dir={FOLDER}"]
    assert make_command(plan, FOLDER) == [sys.executable, "-m", "vlm", *ending]
    launcher = ["-m", "vlm", "launch", "--nproc", "2", "--"]
    assert make_command(plan, FOLDER, 2) == [sys.executable, *launcher, *ending]
    with pytest.raises(ConfigError, match="at least 1"):
        make_command(plan, FOLDER, 0)


def test_the_folder_that_was_shown_is_the_one_that_is_used(tmp_path: Path):
    first = choose_run_folder("pretrain-smol", tmp_path)
    assert first.parent == tmp_path
    shown = tmp_path / "pretrain-smol-20260101-000000"
    assert choose_run_folder("pretrain-smol", tmp_path, str(shown)) == shown
    for run, outputs in (("finetune-smol", tmp_path), ("pretrain-smol", tmp_path / "other")):
        assert choose_run_folder(run, outputs, str(shown)) != shown
    shown.mkdir()
    assert choose_run_folder("pretrain-smol", tmp_path, str(shown)) != shown
    own = Plan("pretrain-smol", lines=f"trainer.output_dir={tmp_path / 'own'}")
    assert [word for word in make_command(own) if "output_dir" in word] == [f"trainer.output_dir={tmp_path / 'own'}"]


# Who may ask


def test_only_loopback_is_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.2", "example.org", "")))


@pytest.mark.parametrize(
    ("host", "origin", "site", "method", "answered"),
    [
        ("127.0.0.1:7860", None, None, "GET", True),
        ("localhost:7860", "http://localhost:7860", "same-origin", "POST", True),
        ("127.0.0.1:7860", None, "cross-site", "GET", True),  # a link that was followed
        ("127.0.0.1:7860", None, "cross-site", "POST", False),
        ("127.0.0.1:7860", "http://evil.example", None, "POST", False),
        ("127.0.0.1:7860", "http://127.0.0.1:8000", None, "POST", False),
        ("127.0.0.1:7860", "null", None, "POST", False),
        ("evil.example:7860", None, None, "GET", False),
        ("192.168.0.2:7860", None, None, "GET", False),
        ("", None, None, "GET", False),
    ],
)
def test_other_sites_and_other_names_are_refused(host: str, origin, site, method: str, answered: bool):
    assert (RequestGuard(None, "127.0.0.1").refusal_reason(host, origin, site, method) is None) is answered


def test_a_page_for_others_answers_to_addresses_and_its_own_names_only():
    guard = RequestGuard(None, "0.0.0.0")
    assert guard.refusal_reason("192.168.0.2:7860", None, None, "GET") is None
    assert guard.refusal_reason("evil.example", None, None, "GET") is not None


# The command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "a number from 1 to 65535"),
        (["--max-upload", "much"], "a size such as 20mb"),
        (["./nowhere"], "no checkpoint there"),
    ],
)
def test_options_are_checked_before_anything_loads(words: list[str], said: str):
    with pytest.raises(SystemExit, match=said):
        main(["web", *words])


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"--port {port}: cannot listen there"):
            main(["web", "--port", str(port)])


def test_without_gradio_it_says_what_to_install(monkeypatch):
    from vlm.cli import web as command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'small-vlm\[web\]'"):
        command.main([])
