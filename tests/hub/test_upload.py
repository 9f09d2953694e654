"""`push-to-hub` against a Hub on this machine, through the real client: uploads, breaks, refusals, questions."""

import io
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from tests.command_line import refusal
from tests.hub.conftest import READER, TOKEN
from tests.hub.server import LocalHub, Repository
from tests.waiting import HANG, wait_until
from vlm.cli.main import main

SCRIPT = "import sys; from vlm.cli.main import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def final(run_folder: Path) -> Path:
    return run_folder / "final"


def push(final: Path, repo: str, *words: str) -> None:
    main(["push-to-hub", str(final), "--repo", repo, "--yes", *words])


def list_write_requests(hub: LocalHub) -> list[str]:
    """Requests that changed something, or tried to."""
    marks = ("POST /api/repos", "DELETE", "PUT", "/commit/", "/preupload/", "/branch/")
    return [line for line in hub.asked if any(mark in line for mark in marks)]


# Uploads


def test_a_checkpoint_is_uploaded_in_one_commit(
    online: LocalHub, final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    push(final, "ann/one")
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"Uploaded: {online.address}/ann/one"
    assert TOKEN not in said.out + said.err
    assert "model.safetensors: 100%" in said.err
    assert online.repositories["models/ann/one"].private
    assert online.commits("ann/one") == 1
    files = online.files("ann/one")
    assert files["model.safetensors"] == (final / "model.safetensors").read_bytes()
    assert not [name for name, data in files.items() if TOKEN.encode() in data or str(final.parent).encode() in data]
    downloaded = Path(snapshot_download("ann/one", cache_dir=tmp_path, endpoint=online.address))
    assert {file.name: file.read_bytes() for file in downloaded.iterdir()} == files


def test_an_organisations_public_repository_on_a_branch(online: LocalHub, final: Path):
    push(final, "lab/open", "--public", "--revision", "v1.0")
    assert not online.repositories["models/lab/open"].private
    assert "config.json" in online.files("lab/open", "v1.0")
    assert online.files("lab/open") == {}


def test_a_bare_name_is_ones_own(online: LocalHub, final: Path):
    push(final, "bare")
    assert "config.json" in online.files("ann/bare")
    assert b'from_pretrained("ann/bare"' in online.files("ann/bare")["README.md"]


def test_with_force_earlier_weights_and_code_go(online: LocalHub, final: Path, capsys: pytest.CaptureFixture[str]):
    old = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "user_connector.py": b"",
           "modeling_vlm.py": b"old", "figure.png": b"mine", ".gitattributes": b""}  # fmt: skip
    online.repositories["models/ann/old"] = Repository(branches={"main": [old]})
    push(final, "ann/old", "--force", "--private")
    said = capsys.readouterr().out
    files = online.files("ann/old")
    assert {"figure.png", ".gitattributes"} <= set(files)
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "user_connector.py"} & set(files)
    assert files["modeling_vlm.py"] != b"old"
    assert "model-00001-of-00002.safetensors, model.safetensors.index.json, user_connector.py" in said
    assert "ann/old stays public" in said
    assert online.commits("ann/old") == 1


def test_a_repository_that_holds_nothing_needs_no_force(online: LocalHub, final: Path):
    online.repositories["models/ann/made"] = Repository(branches={"main": [{".gitattributes": b""}]})
    push(final, "ann/made")
    assert "config.json" in online.files("ann/made")


def test_an_adapter_is_merged_first_where_that_is_asked(online: LocalHub, train: Callable[..., Path], tmp_path: Path):
    words = ["trainer.lora.language_model.r=4", "trainer.learning_rate.language_model_learning_rate=1e-2"]
    run = train("pretrain-smol", tmp_path / "lora", *words, "trainer.max_steps=1", "trainer.num_samples=0")
    before = sorted(file.name for file in (run / "final").iterdir())
    said = refusal("push-to-hub", str(run / "final"), "--repo", "ann/lora", "--yes")
    assert said.endswith("is an adapter without its base; add --merge to merge them first")
    assert online.asked == []
    push(run / "final", "ann/lora", "--merge")
    files = online.files("ann/lora")
    assert "model.safetensors" in files
    assert not [name for name in files if "adapter" in name or "lora" in name or name == "base.json"]
    assert b"| learning rate of language_model | 0.01, LoRA of rank 4 |" in files["README.md"]
    assert sorted(file.name for file in (run / "final").iterdir()) == before


# Breaks


def test_a_connection_that_is_cut_is_tried_again(online: LocalHub, final: Path):
    """By the client itself: the weights arrive at the second try."""
    cut = []

    def once(request: Any) -> bool:
        if request.command == "PUT" and not cut:
            cut.append(request.rfile.read(1 << 16))
            request.connection.shutdown(2)
            request.close_connection = True
            return True
        return False

    online.trouble = once
    online.objects.clear()
    push(final, "ann/cut")
    assert len(cut) == 1
    assert online.files("ann/cut")["model.safetensors"] == (final / "model.safetensors").read_bytes()
    assert online.commits("ann/cut") == 1


def test_a_killed_upload_goes_on_with_what_is_missing(online: LocalHub, final: Path, tmp_path: Path):
    """Of two files with weights one has arrived: the next try sends the other alone, without `--force`."""
    two = split_into_two_files(final, tmp_path / "final")
    online.objects.clear()
    first: list[str] = []

    def stop_at_the_second(request: Any) -> bool:
        if request.command != "PUT":
            return False
        with online.lock:
            first.append(request.path)
        if request.path == first[0]:
            return False
        wait_until(lambda: online.objects)
        request.rfile.read(1 << 10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        request.close_connection = True
        return True

    online.trouble = stop_at_the_second
    environment = os.environ | {
        "HF_ENDPOINT": online.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    words = ["push-to-hub", str(two), "--repo", "ann/killed", "--yes"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert process.wait(HANG) == -signal.SIGKILL
    assert online.files("ann/killed") == {}
    assert len(online.objects) == 1
    online.trouble = None
    there = dict(online.arrived)
    main(words)
    sizes = {digest: len(data) for digest, data in online.objects.items()}
    again = {digest: count - there.get(digest, 0) for digest, count in online.arrived.items()}
    done = next(digest for digest in sizes if there.get(digest, 0) == sizes[digest])
    assert again[done] == 0
    assert all(again[digest] == size for digest, size in sizes.items() if digest != done and digest in again)
    assert online.commits("ann/killed") == 1
    assert sum(name.endswith(".safetensors") for name in online.files("ann/killed")) == 2


def split_into_two_files(final: Path, folder: Path) -> Path:
    """The same checkpoint, its weights in two files with an index."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(final, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForImageTextToText.from_pretrained(final)
    size = (final / "model.safetensors").stat().st_size
    model.save_pretrained(folder, max_shard_size=size * 2 // 3)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


# Refusals: one line that says what to do, and nothing is left behind


def test_without_a_token(online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    said = refusal("push-to-hub", str(final), "--repo", "ann/none", "--yes")
    assert said.startswith("vlm push-to-hub: no token found: log in (hf auth login) or set HF_TOKEN")
    assert list_write_requests(online) == []


def test_a_refused_token(online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = "hf_" + "x" * 30
    monkeypatch.setenv("HF_TOKEN", wrong)
    said = refusal("push-to-hub", str(final), "--repo", "ann/none", "--yes")
    assert said.startswith(
        f"vlm push-to-hub: {online.address} rejected the token (HF_TOKEN, or the one from hf auth login)"
    )
    assert wrong not in said
    assert list_write_requests(online) == []


def test_a_token_that_may_only_read(online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "the token is read-only" in refusal("push-to-hub", str(final), "--repo", "ann/none", "--yes")
    assert list_write_requests(online) == []


def test_somebody_elses_namespace(online: LocalHub, final: Path):
    said = refusal("push-to-hub", str(final), "--repo", "bob/model", "--yes")
    assert said == "vlm push-to-hub: bob/model: ann cannot write to bob, only to ann, lab"
    assert list_write_requests(online) == []


def test_a_repository_that_holds_something(online: LocalHub, final: Path):
    files = {"config.json": b"{}"}
    online.repositories["models/ann/there"] = Repository(branches={"main": [files]})
    said = refusal("push-to-hub", str(final), "--repo", "ann/there", "--yes")
    assert "ann/there exists and holds 1 files: add --force to upload anyway" in said
    assert list_write_requests(online) == []
    assert online.files("ann/there") == files


@pytest.mark.parametrize("name", ["a/b/c", "ann/-x", "ann/" + "x" * 100, "ann/x y"])
def test_no_name_of_a_repository(online: LocalHub, final: Path, name: str):
    assert "is not a repository name" in refusal("push-to-hub", str(final), "--repo", name, "--yes")
    assert online.asked == []


def test_an_upload_that_may_not_be_leaves_no_empty_repository(online: LocalHub, final: Path):
    def forbid(request: Any) -> bool:
        if "/preupload/" not in request.path:
            return False
        request.rfile.read(int(request.headers["Content-Length"]))
        request.refuse(403, "", "Forbidden: the token's rights end here")
        return True

    online.trouble = forbid
    said = refusal("push-to-hub", str(final), "--repo", "ann/forbidden", "--yes")
    assert said.startswith("vlm push-to-hub: ann/forbidden: no write access: ")
    assert "the token's rights end here" in said
    assert "models/ann/forbidden" not in online.repositories


def test_a_server_that_is_away(online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refusal("push-to-hub", str(final), "--repo", "ann/away", "--yes")
    assert said.startswith("vlm push-to-hub: no connection to http://127.0.0.1:9")


@pytest.mark.parametrize("is_disabled", [False, True])
def test_a_mirror_may_not_support_xet(
    online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch, *, is_disabled: bool
):
    from huggingface_hub import HfApi, constants

    def fail(*_: object, **__: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", is_disabled)
    monkeypatch.setattr(HfApi, "whoami", fail)
    said = refusal("push-to-hub", str(final), "--repo", "ann/mirror", "--yes")
    assert "ann/mirror" in said
    assert (f"If {online.address} does not support Xet, set HF_HUB_DISABLE_XET=1." in said) is not is_disabled


def test_offline_mode_is_named(online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("push-to-hub", str(final), "--repo", "ann/away", "--yes")


@pytest.mark.parametrize(
    ("words", "option"),
    [([], "CHECKPOINT"), (["FINAL"], "--repo OWNER/NAME"), (["FINAL", "--repo", "ann/x"], "--yes")],
)
def test_without_a_terminal_the_missing_option_is_named(
    online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], option: str
):  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    said = refusal("push-to-hub", *(str(final) if word == "FINAL" else word for word in words))
    assert said.startswith("vlm push-to-hub: ")
    assert option in said
    assert online.asked == []


# Questions


class Terminal:
    """A terminal at which lines are typed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str):
        ours, theirs = pty.openpty()
        os.write(ours, "".join(f"{line}\n" for line in lines).encode())
        monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, "r"))


def test_what_is_not_given_is_asked(
    online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Terminal(monkeypatch, str(final), "ann/asked", "y")
    main(["push-to-hub"])
    said = capsys.readouterr().out
    for question in ("Checkpoint (a run's folder final): ", "Repository on the Hub (OWNER/NAME): ", "Upload "):
        assert question in said
    assert "config.json" in online.files("ann/asked")


def test_existing_repositories_and_uploads_need_a_yes(
    online: LocalHub, final: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    files = {"config.json": b"{}"}
    online.repositories["models/ann/kept"] = Repository(branches={"main": [files]})
    Terminal(monkeypatch, "ann/kept", "n")
    assert refusal("push-to-hub", str(final)) == "vlm push-to-hub: nothing was uploaded"
    Terminal(monkeypatch, "ann/kept", "y", "")
    assert refusal("push-to-hub", str(final)) == "vlm push-to-hub: nothing was uploaded"
    assert online.files("ann/kept") == files
    assert list_write_requests(online) == []
    Terminal(monkeypatch, "ann/kept", "y", "yes")
    main(["push-to-hub", str(final)])
    assert "README.md" in online.files("ann/kept")
