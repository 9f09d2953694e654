"""`vlm merge-lora CHECKPOINT OUT`: makes a complete checkpoint from an adapter and its base."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from vlm.checks.checkpoint import checkpoint_problem
from vlm.config.derived import BASE_FILE

NOT_COPIED = (BASE_FILE, "adapter_*", "non_lora_trainables.*", "config.json", "*.bin", ".*", "README.md")
"""Files of an adapter's folder that the complete checkpoint does not need, or replaces."""


def merge(checkpoint: str, out: Path, base_paths: Sequence[str] = (), *, trust_remote_code: bool = False) -> str:
    """Write the complete checkpoint in the precision of the base, and return the name of that precision.

    The folder appears only once it is complete.

    Args:
        checkpoint: a folder that `vlm.assembly.adapter_folder.save` wrote, or a name on the Hub.
        out: a folder that does not exist yet, or is empty.
        base_paths: the present location of the base, see `read_base`.
        trust_remote_code: whether code from repositories may run.

    Raises:
        ValueError: there is no adapter, its base is not found, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name a new folder")
    from transformers.utils.logging import disable_progress_bar

    if problem := checkpoint_problem(checkpoint):
        raise ValueError(problem)
    from vlm.assembly.adapter_folder import local_folder  # torch comes with it
    from vlm.assembly.checkpoint import CheckpointKind, open_checkpoint
    from vlm.assembly.saving import save_complete, set_reply_ends

    disable_progress_bar()
    opened = open_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    if opened.kind is not CheckpointKind.ADAPTER:
        raise ValueError(f"{checkpoint}: it has no {BASE_FILE}, so it is not an adapter on a base")
    model = opened.load_model(base_paths=base_paths)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(local_folder(checkpoint), unfinished, ignore=shutil.ignore_patterns(*NOT_COPIED))
        set_reply_ends(model, opened.load_processor())
        save_complete(model, unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(model.dtype).removeprefix("torch.")
