"""Weights go from file to file without ever being in memory together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.hub.shards import ShardWriter, read_shard, weight_files

MEASURED = """
import sys
from pathlib import Path
from vlm.hub.shards import ShardWriter, read_shard, weight_files

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

def copy(source, target):
    writer = ShardWriter(Path(target), int(sys.argv[1]))
    for file in weight_files(Path(source)):
        for name, tensor in read_shard(file):
            writer.add(name, tensor)
    writer.finish()

for source in sys.argv[2:]:
    Path(source, "out").mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    copy(source, source + "/out")
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_at_most_two_copies_of_a_shard_are_in_memory(tmp_path: Path):
    """160 MB in shards of 20: one is read, one waits to be written.

    The first copy of each format, of 8 kB, brings into memory the code that copies; it does not count.
    """
    sizes = {"warm-up": 100, "copy": 2_000_000}  # bytes of a tensor
    folders = [tmp_path / f"{form}-{name}" for name in sizes for form in ("safetensors", "bin")]
    for folder in folders:
        form, name = folder.name.split("-", 1)
        save, stem = (save_file, "model") if form == "safetensors" else (torch.save, "pytorch_model")
        folder.mkdir()
        weight_map = {}
        for shard in range(8):
            tensors = {f"{shard}.{number}": torch.full((sizes[name] // 4,), float(number)) for number in range(10)}
            weight_map |= dict.fromkeys(tensors, f"{stem}-{shard}.{form}")
            save(tensors, folder / f"{stem}-{shard}.{form}")
        (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shard_size = 10 * sizes["copy"]
    words = [sys.executable, "-c", MEASURED, str(shard_size), *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert max(map(int, done.stdout.split()[2:])) < 2.5 * shard_size
    for form in ("safetensors-copy", "bin-copy"):
        written = sorted((tmp_path / form / "out").glob("*.safetensors"))
        assert [file.name for file in written] == [f"model-{n:05}-of-00008.safetensors" for n in range(1, 9)]


def test_a_written_index_says_where_everything_is(tmp_path: Path):
    writer = ShardWriter(tmp_path, 100)
    given = {f"weight.{number}": torch.randn(4, 4) for number in range(3)}  # 64 bytes each
    given["large"] = torch.randn(100)
    for name, tensor in given.items():
        writer.add(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 64 + 400
    assert set(index["weight_map"]) == set(given)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], given[name])
    assert len(weight_files(tmp_path)) == 4
    assert {name for file in weight_files(tmp_path) for name, _ in read_shard(file)} == set(given)


def test_one_file_needs_no_index(tmp_path: Path):
    writer = ShardWriter(tmp_path)
    shared = torch.randn(4, 4)
    writer.add("a", shared)
    writer.add("b", shared.T)  # views and shared memory are no matter
    writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], shared.T)


def test_safetensors_come_before_pickles(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert [file.name for file in weight_files(tmp_path)] == ["pytorch_model.bin"]
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../model.safetensors", "gone.safetensors"])
def test_an_index_that_names_no_file_of_the_folder(tmp_path: Path, name: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="which is not in the folder"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"torn" * 10])
def test_torn_files_are_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        list(read_shard(tmp_path / name))


def test_a_pickle_of_something_else(tmp_path: Path):
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not contain named tensors"):
        list(read_shard(tmp_path / "pytorch_model.bin"))
