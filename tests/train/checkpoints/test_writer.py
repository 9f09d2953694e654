"""Folders that are there whole or not at all, also where the disk is full or nothing can be written."""

import errno
import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.forked import run_forked
from vlm.train.checkpoints import writer as writing
from vlm.train.checkpoints.files import UNFINISHED
from vlm.train.checkpoints.find import find_problems_together
from vlm.train.checkpoints.manifest import hash_file, read_manifest
from vlm.train.checkpoints.writer import FolderWriter, OutOfStepError, SaveError, save_hashed

STATE = {"weight": torch.arange(5000.0), "step": 3}


def make_writer(run: Path, name: str = "checkpoint-3") -> FolderWriter:
    return FolderWriter(run / name, is_leader=True, is_first_of_node=True)


def write_checkpoint(run: Path, state: object = STATE) -> FolderWriter:
    writer = make_writer(run)
    writer.begin(1000)
    writer.save(state, writer.folder / "optimizer.pt")
    with writer.recording():
        (writer.folder / "trainer_state.json").write_text("{}")
    return writer


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may become longer than `limit` bytes: writing fails as it does on a full disk, without an exception."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_hash_of_what_is_written_is_that_of_the_file(tmp_path: Path, zipped: bool):
    record = save_hashed(STATE, tmp_path / "state.pt", zipped=zipped)
    assert record == hash_file(tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt")["weight"], STATE["weight"])


def test_a_checkpoint_gets_its_name_when_it_is_whole(tmp_path: Path):
    writer = write_checkpoint(tmp_path)
    assert not (tmp_path / "checkpoint-3").exists()
    writer.finish(3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert find_problems_together(tmp_path / "checkpoint-3") == []
    manifest = read_manifest(tmp_path / "checkpoint-3")
    assert set(manifest.files) == {"optimizer.pt", "trainer_state.json"}


def test_one_of_the_same_name_is_replaced_as_a_whole(tmp_path: Path):
    write_checkpoint(tmp_path).finish(3)
    (tmp_path / "checkpoint-3" / "of the first").touch()
    write_checkpoint(tmp_path, {"another": 1}).finish(3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert not (tmp_path / "checkpoint-3" / "of the first").exists()
    assert torch.load(tmp_path / "checkpoint-3" / "optimizer.pt") == {"another": 1}


def test_what_a_killed_run_left_goes_with_the_next_save(tmp_path: Path):
    waste = tmp_path / UNFINISHED / "checkpoint-2"
    waste.mkdir(parents=True)
    (waste / "optimizer.pt").write_bytes(b"half")
    (tmp_path / UNFINISHED / "final").mkdir()
    write_checkpoint(tmp_path).finish(3)
    assert not waste.exists()
    writer = make_writer(tmp_path, "final")
    writer.begin(0)
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "final"]
    assert not any((tmp_path / "final").iterdir())  # a manifest is of checkpoints


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "free_bytes", lambda path: 2_500_000)
    with pytest.raises(SaveError, match=r"the disk / is full|the disk /\S+ is full") as refused:
        make_writer(tmp_path).begin(7_300_000_000)
    assert "7.3 GB are needed and 2.5 MB are free" in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path):
    write_checkpoint(tmp_path).finish(3)
    before = (tmp_path / "checkpoint-3" / "optimizer.pt").read_bytes()
    with small_files(10_000):
        writer = write_checkpoint(tmp_path, {"weight": torch.ones(5000)})
        writer.save(STATE, writer.folder / "scheduler.pt")  # does nothing now
        assert not (writer.folder / "optimizer.pt").exists()
        with pytest.raises(SaveError, match=r"checkpoint-3 could not be saved: .*File too large"):
            writer.finish(3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").read_bytes() == before


def test_a_full_disk_is_an_error_of_the_file_and_not_of_torch(tmp_path: Path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as full:
        save_hashed(STATE, tmp_path / "full")
    assert full.value.errno == errno.ENOSPC


def test_errors_of_libraries_that_write_are_recorded(tmp_path: Path):
    writer = make_writer(tmp_path)
    writer.begin(0)
    with small_files(10_000):
        with writer.recording():
            save_file({"weight": torch.ones(50_000)}, writer.folder / "trained.safetensors")
        first = writer.error
        with writer.recording():
            torch.save(torch.ones(50_000), writer.folder / "rng_state.pth")
    assert first is not None
    assert writer.error is first
    with pytest.raises(SaveError, match="os error 27"):
        writer.finish(3)


def test_other_errors_are_not(tmp_path: Path):
    writer = make_writer(tmp_path)
    writer.begin(0)
    for error in (KeyboardInterrupt(), RuntimeError("no memory left"), OutOfStepError("No space left on device")):
        with pytest.raises(type(error)), writer.recording():
            raise error
    assert writer.error is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SaveError, match=r"checkpoint-3 could not be saved: .*Permission denied"):
            make_writer(tmp_path).begin(0)
    finally:
        tmp_path.chmod(0o700)


RANK = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from tests.train.checkpoints.test_writer import small_files
from tests.forked import run_forked
from vlm.train.checkpoints import writer as writing
from vlm.train.checkpoints.find import find_whole_checkpoint

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
writing.VISIBLE_WITHIN = 0.5

def write(run, *, leads, fails=False):
    try:
        writer = writing.FolderWriter(run / "checkpoint-3", is_leader=leads, is_first_of_node=leads)
        writer.begin(100)
        with small_files(2000 if fails else 10**9):
            writer.save({"weight": torch.ones(1000) * rank}, writer.folder / f"states_{rank}.pt")
        (writer.folder / f"rng_state_{rank}.pth").write_bytes(bytes(10))
        writer.finish(3)
        manifest = json.loads((run / "checkpoint-3" / "manifest.json").read_text())["content"]
        return [manifest["world_size"], *manifest["files"]]
    except writing.SaveError as error:
        return str(error)

shared, own = folder / "shared", folder / f"node{rank}"
said = {
    "failed": write(shared, leads=rank == 0, fails=rank == 1),
    "nothing": sorted(path.name for path in shared.glob("*")),
    "shared": write(shared, leads=rank == 0),
    "unseen": write(own, leads=rank == 0),
    "own": write(own, leads=True),
    "own found": str(find_whole_checkpoint(own)),
}
dist.barrier()
if rank == 1:
    (own / "checkpoint-3" / "states_1.pt").write_bytes(b"")
    (shared / "checkpoint-3" / "states_0.pt").write_bytes(b"")
dist.barrier()
said |= {"own lost": find_whole_checkpoint(own), "shared lost": find_whole_checkpoint(shared)}
print(json.dumps(said))
dist.destroy_process_group()
"""


def test_two_ranks_write_and_find_the_same(tmp_path: Path):
    """In a folder that they share, and with a disk for each; where one cannot write or is damaged, both know."""
    first, second = run_forked(*(["-c", RANK, str(tmp_path), str(rank)] for rank in (0, 1)), environments=[{}, {}])
    assert first.returncode == second.returncode == 0, first.stderr[-3000:] + second.stderr[-3000:]
    said = [json.loads(done.stdout.splitlines()[-1]) for done in (first, second)]
    both = ["rng_state_0.pth", "rng_state_1.pth", "states_0.pt", "states_1.pt"]
    for rank, words in enumerate(said):
        assert "checkpoint-3 could not be saved: [Errno 27] File too large" in words["failed"]
        assert words["nothing"] == []
        assert words["shared"] == [2, *both]
        assert "trainer.save_on_each_node=true" in words["unseen"]
        assert words["own"] == [2, f"rng_state_{rank}.pth", f"states_{rank}.pt"]
        assert words["own found"] == str(tmp_path / f"node{rank}" / "checkpoint-3")
        assert words["own lost"] is words["shared lost"] is None
        assert [path.name for path in (tmp_path / f"node{rank}").iterdir()] == ["checkpoint-3.damaged"]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["checkpoint-3.damaged"]


def test_files_are_written_in_the_background_as_they_were_when_they_were_given(tmp_path: Path):
    writer = FolderWriter(tmp_path / "checkpoint-3", is_leader=True, is_first_of_node=True, in_background=True)
    writer.begin(1000)
    begin, state = threading.Event(), {"weight": torch.zeros(3)}
    writer.queue.add(lambda: begin.wait(300))
    writer.save(state, writer.folder / "optimizer.pt")
    state["weight"].fill_(7)
    held = writer.queue.hold(state)
    writer.write(lambda: save_file(held, writer.folder / "trained.safetensors"), "trained.safetensors")
    assert not writer.is_written()
    begin.set()
    writer.finish(3)
    assert writer.is_written()
    assert find_problems_together(tmp_path / "checkpoint-3") == []
    assert read_manifest(tmp_path / "checkpoint-3").files.keys() == {"optimizer.pt", "trained.safetensors"}
    assert torch.load(tmp_path / "checkpoint-3" / "optimizer.pt")["weight"].sum() == 0


def test_an_error_in_the_background_is_that_of_the_folder(tmp_path: Path):
    writer = FolderWriter(tmp_path / "checkpoint-3", is_leader=True, is_first_of_node=True, in_background=True)
    writer.begin(1000)
    with small_files(2000):
        writer.save(STATE, writer.folder / "optimizer.pt")
        with pytest.raises(SaveError, match="could not be saved"):
            writer.finish(3)
    assert list(tmp_path.iterdir()) == []
