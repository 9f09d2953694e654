"""The mean of checkpoints: its arithmetic, which checkpoints have none, and the greedy one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.cli.average import main
from vlm.hub.averaging import average, average_greedily
from vlm.inference.generate import VisionLanguageModel

WEIGHTS = "model.safetensors"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(name, **tensors)` writes a checkpoint of a kind that only this file knows."""

    def write_folder(name: str, kind: str = "plain", **tensors: torch.Tensor) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        (folder / "run.json").write_text("{}")
        save_file(tensors, folder / WEIGHTS)
        return str(folder)

    return write_folder


def test_the_mean_is_weighted_in_float32_and_kept_in_the_first_precision(write: Callable[..., str], tmp_path: Path):
    ids = torch.arange(3)
    one = write("one", matrix=torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), ids=ids)
    two = write("two", matrix=torch.tensor([[4.0, 8.0]]), ids=ids)
    out = average([one, two], tmp_path / "out", [2, 1])
    tensors = load_file(out / WEIGHTS)
    assert torch.equal(tensors["matrix"], torch.tensor([[2.0, 4.0]], dtype=torch.bfloat16))
    assert torch.equal(tensors["ids"], ids)
    assert {file.name for file in out.iterdir()} == {"config.json", WEIGHTS}


def test_checkpoints_without_a_mean_are_refused_and_leave_nothing(write: Callable[..., str], tmp_path: Path):
    one, matrix = write("one", a=torch.zeros(2)), torch.zeros(2)
    others = {
        "of model_type=other": write("kind", "other", a=matrix),
        "b is in only one of": write("names", a=matrix, b=torch.ones(2)),
        r"a is \(2,\) in": write("shapes", a=torch.zeros(3)),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            average([one, other], tmp_path / "out")
    integers = [write(f"ids{index}", a=torch.tensor([index])) for index in (0, 1)]
    with pytest.raises(ValueError, match=r"a is of torch\.int64 and differs"):
        average(integers, tmp_path / "out")
    adapter = Path(write("adapter", a=matrix))
    (adapter / "base.json").write_text("{}")
    with pytest.raises(ValueError, match="vlm merge-lora"):
        average([one, str(adapter)], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two"):
        average([one], tmp_path / "out")
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="2 numbers of at least 0 are required"):
            average([one, one], tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(ValueError, match="is not empty"):
        average([one, one], tmp_path / "out")


def test_a_greedy_mean_takes_what_makes_it_better(write: Callable[..., str], tmp_path: Path):
    """The score is the distance from 1: 0.8 and 1.4 have a mean nearer to it than either, and 5 has not."""
    names = [write(name, a=torch.tensor([value])) for name, value in (("far", 5.0), ("high", 1.4), ("low", 0.8))]

    def distance(folder: Path) -> float:
        return abs(float(load_file(folder / WEIGHTS)["a"]) - 1)

    result = average_greedily(names, tmp_path / "out", distance, lower_is_better=True)
    assert [Path(name).name for name in result.members] == ["low", "high"]
    assert float(load_file(tmp_path / "out" / WEIGHTS)["a"]) == pytest.approx(1.1)
    assert result.score == pytest.approx(0.1)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", WEIGHTS}
    alone = average_greedily([names[2], names[0]], tmp_path / "alone", distance, lower_is_better=True)
    assert [Path(name).name for name in alone.members] == ["low"]
    assert float(load_file(tmp_path / "alone" / WEIGHTS)["a"]) == pytest.approx(0.8)


def test_the_command_averages_runs_and_measures_them(
    run_folder: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first, other = run_folder / "final", tmp_path / "other"
    shutil.copytree(first, other)
    tensors = load_file(first / WEIGHTS)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / WEIGHTS, {"format": "pt"})
    main([str(first), str(other), "--out", str(tmp_path / "mean")])
    mean = load_file(tmp_path / "mean" / WEIGHTS)
    for name, tensor in tensors.items():
        torch.testing.assert_close(mean[name], tensor + 0.005)
    assert VisionLanguageModel.load(tmp_path / "mean").model.num_parameters() > 0
    records = ["--data", str(world / "records.json"), "--image-folder", str(world / "images")]
    main([str(first), str(other), "--out", str(tmp_path / "greedy"), *records, "--num-workers", "0"])
    *_, one, two, result = (line.split() for line in capsys.readouterr().out.splitlines())
    assert {one[0], two[0]} == {str(first), str(other)}
    assert float(result[1]) <= min(float(one[1]), float(two[1]))
    with pytest.raises(ValueError, match="--weights and --data"):
        main([str(first), str(other), "--out", str(tmp_path / "x"), "--weights", "1,2", *records])
    with pytest.raises(ValueError, match="separated by commas"):
        main([str(first), str(other), "--out", str(tmp_path / "x"), "--weights", "one"])
