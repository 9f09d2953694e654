"""`vlm average`: a checkpoint whose weights are the mean of several others' of the same shape.

Uniform and greedy means are the model soups of Wortsman et al. 2022, arXiv:2203.05482.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.checks.checkpoint_files import TensorHeader, read_header
from vlm.config.derived import BASE_FILE
from vlm.hub.folders import create_folder, read_json, resolve_folder

NOT_COPIED = ("*.safetensors", "*.bin", "*.pt", ".*", "README.md", "training.json", "run.json", "best.json")
"""Files of the first checkpoint that the mean has of its own, or that tell how that one was trained."""


class CheckpointFolder:
    """A checkpoint whose tensors are read one by one.

    Args:
        name: a local folder, or a name on the Hub.

    Raises:
        ValueError: there is no checkpoint with safetensors, or it is an adapter on a base.
    """

    def __init__(self, name: str):
        self.name, self.folder = name, resolve_folder(name)
        if (self.folder / BASE_FILE).is_file() or (self.folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} is an adapter; the mean of adapters is not the mean of what they do. Merge each first: vlm "
                f"merge-lora {name} MERGED"
            )
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{name} has no safetensors files, the only format that is averaged")
        self.headers: dict[str, TensorHeader] = {}
        self.file_of: dict[str, Path] = {}
        for file in self.files:
            headers = read_header(file)
            self.headers |= headers
            self.file_of |= dict.fromkeys(headers, file)

    def check_same_shape(self, other: "CheckpointFolder") -> None:
        """Raise ValueError where another checkpoint's model is not of the same architecture and shapes."""
        own, theirs = (read_json(checkpoint.folder / "config.json").get("model_type") for checkpoint in (self, other))
        if own != theirs:
            raise ValueError(
                f"{other.name} is of model_type={theirs}, {self.name} of {own}; only checkpoints of "
                "the same kind can be averaged"
            )
        if names := sorted(self.headers.keys() ^ other.headers.keys()):
            raise ValueError(f"{names[0]} is in only one of {self.name} and {other.name}, so they cannot be averaged")
        for name, header in self.headers.items():
            if header.shape != (shape := other.headers[name].shape):
                raise ValueError(f"{name} is {header.shape} in {self.name}, {shape} in {other.name}")


def average(names: Sequence[str], out: Path, weights: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of checkpoints; everything but the weights is the first one's.

    The mean is computed in float32 (float64 of float64) and stored in the precision of the first checkpoint.

    Args:
        names: at least two checkpoints, folders or names on the Hub.
        out: a folder that is not there yet, or is empty.
        weights: a weight for each checkpoint, of any sum above 0; None: all the same.

    Returns:
        `out`.

    Raises:
        ValueError: the checkpoints have no mean, or `out` holds something.
    """
    shares = _shares(len(names), weights)
    checkpoints = [CheckpointFolder(name) for name in names]
    first = checkpoints[0]
    for other in checkpoints[1:]:
        first.check_same_shape(other)
    with create_folder(out) as folder:
        shutil.copytree(first.folder, folder, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
        for file in first.files:
            names_in_file = [name for name in first.headers if first.file_of[name] == file]
            tensors = {name: _mean(name, checkpoints, shares) for name in names_in_file}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return out


def _shares(number: int, weights: Sequence[float] | None) -> list[float]:
    if number < 2:
        raise ValueError(f"{number} checkpoint(s) given; averaging needs at least two")
    weights = [1.0] * number if weights is None else weights
    if len(weights) != number or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"weights {list(weights)}: {number} numbers of at least 0 are required, with a sum above 0")
    return [weight / sum(weights) for weight in weights]


def _mean(name: str, checkpoints: Sequence[CheckpointFolder], shares: Sequence[float]) -> Tensor:
    """Return the mean of a tensor; one that holds no floating-point numbers has to be the same everywhere."""
    mean: Tensor | None = None
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(c.file_of[name], "pt")) for c in checkpoints]
        first = opened[0].get_tensor(name)
        if not checkpoints[0].headers[name].is_floating:
            if any(not torch.equal(first, file.get_tensor(name)) for file in opened[1:]):
                raise ValueError(
                    f"{name} is of {first.dtype} and differs between the checkpoints, so it cannot "
                    "be averaged; are the weights quantised?"
                )
            return first
        precision = torch.promote_types(first.dtype, torch.float32)
        for file, share in zip(opened, shares, strict=True):
            part = file.get_tensor(name).to(precision) * share
            mean = part if mean is None else mean + part
    assert mean is not None
    return mean.to(first.dtype)


@dataclass(frozen=True)
class GreedyAverage:
    """What a greedy mean came to.

    Attributes:
        scores: checkpoint -> its own score.
        members: the checkpoints whose mean it is, the best first.
        score: the mean's score.
    """

    scores: Mapping[str, float]
    members: tuple[str, ...]
    score: float


def average_greedily(
    names: Sequence[str], out: Path, measure: Callable[[Path], float], *, lower_is_better: bool
) -> GreedyAverage:
    """Write the mean of those checkpoints that make it better, taken in the order of their own scores.

    Args:
        names: at least two checkpoints, folders or names on the Hub.
        out: a folder that is not there yet, or is empty.
        measure: returns the score of a checkpoint's folder.
        lower_is_better: whether lower scores are better.

    Returns:
        Which checkpoints were taken, and the scores.

    Raises:
        ValueError: the checkpoints have no mean, or `out` holds something.
    """
    _shares(len(names), None)
    checkpoints = [CheckpointFolder(name) for name in names]
    for other in checkpoints[1:]:
        checkpoints[0].check_same_shape(other)
    sign = -1 if lower_is_better else 1
    with create_folder(out) as folder:
        scores = {checkpoint.name: measure(checkpoint.folder) for checkpoint in checkpoints}
        ordered = sorted(scores, key=lambda name: sign * scores[name], reverse=True)
        members, best = ordered[:1], scores[ordered[0]]
        trial = folder / "trial"
        for name in ordered[1:]:
            average([*members, name], trial)
            score = measure(trial)
            if sign * score >= sign * best:
                members, best = [*members, name], score
            shutil.rmtree(trial)
        if len(members) == 1:
            shutil.copytree(resolve_folder(members[0]), folder, dirs_exist_ok=True)
        else:
            average(members, trial)
            for file in trial.iterdir():
                file.rename(folder / file.name)
            trial.rmdir()
    return GreedyAverage(scores, tuple(members), best)
