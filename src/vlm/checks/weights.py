"""Tells the weights of a checkpoint apart from others, and evaluations of them from those of earlier ones.

Imports no torch.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from vlm.checks.checkpoint_files import check_regular

WEIGHT_FILE_PATTERNS = (
    ("model*.safetensors",),
    ("pytorch_model*.bin",),
    ("adapter_model.safetensors", "non_lora_trainables.safetensors"),
)
"""Patterns of files with weights; the first line that matches a file counts."""

NUM_FINGERPRINT_PIECES = 16
FINGERPRINT_PIECE_BYTES = 1 << 18


def fingerprint(folder: Path) -> str:
    """Return a hash of the sizes of the files with weights, and of pieces of each.

    The hash is fast to compute, and differs between training runs. Pieces are spread evenly; the first is at the
    beginning, where composed models have their connector.
    """
    files: list[Path] = []
    for patterns in WEIGHT_FILE_PATTERNS:
        files = files or sorted(file for pattern in patterns for file in folder.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        size = check_regular(file)
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for step in range(NUM_FINGERPRINT_PIECES):
                opened.seek(step * size // NUM_FINGERPRINT_PIECES)
                digest.update(opened.read(FINGERPRINT_PIECE_BYTES))
    return digest.hexdigest()[:32]


def identify_weights(checkpoint: str, folder: Path) -> dict[str, str]:
    """Return the entry `weights` of an evaluation's `results.json`.

    Args:
        checkpoint: the checkpoint as the user named it.
        folder: where its files are.
    """
    return {"folder": Path(checkpoint).absolute().name, "fingerprint": fingerprint(folder)}


def is_of_other_weights(results: Mapping[str, object], run: Path) -> bool:
    """Return whether an evaluation is of weights that a checkpoint of a run had earlier, and has no more.

    False if that is unknown: results of earlier versions have no entry `weights`, and the checkpoint may be gone.
    """
    weights = results.get("weights")
    if not isinstance(weights, Mapping) or not isinstance(folder := weights.get("folder"), str):
        return False
    if folder != Path(folder).name or not (run / folder).is_dir():
        return False
    try:
        return fingerprint(run / folder) != weights.get("fingerprint")
    except (OSError, ValueError):
        return False
