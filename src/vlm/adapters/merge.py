"""`vlm merge-lora CHECKPOINT OUT`: a complete checkpoint out of an adapter and its base."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.config.lora_problems import BASE_FILE

NOT_COPIED = (BASE_FILE, "adapter_*", "non_lora_trainables.*", "config.json", "*.bin", ".*", "README.md")
"""Files of an adapter's folder that the complete checkpoint does not need, or writes itself."""


def main(words: Sequence[str]) -> None:
    """`vlm merge-lora CHECKPOINT OUT`, or with the options that LLaVA's users know."""
    parser = argparse.ArgumentParser(
        "vlm merge-lora", description="Merge a run's adapter into its base: a checkpoint that is complete by itself."
    )
    parser.add_argument("checkpoint", nargs="?", help="a LoRA run's folder `final`, or a name on the Hub")
    parser.add_argument("out", nargs="?", type=Path, help="a new folder")
    add_base_option(parser)
    parser.add_argument("--lora-path", "--lora_path", metavar="CHECKPOINT", help="in place of CHECKPOINT")
    parser.add_argument("--output-path", "--output_path", metavar="OUT", type=Path, help="in place of OUT")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code out of the repositories run")
    args = parser.parse_args(words)
    if args.lora_path and args.checkpoint and args.output_path is None and args.out is None:
        args.out, args.checkpoint = Path(args.checkpoint), None  # `--lora-path CHECKPOINT OUT`
    if bool(args.checkpoint) == bool(args.lora_path) or bool(args.out) == bool(args.output_path):
        parser.error("give CHECKPOINT and OUT, each once")
    out: Any = args.out or args.output_path
    try:
        dtype = merge(args.checkpoint or args.lora_path, out, args.base, trust_remote_code=args.trust_remote_code)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm merge-lora: {error}")
    print(f"{out}: complete, in {dtype}; it needs its base no longer")
    print(f"Ask it:  vlm generate {out} --image FILE --prompt 'What is in this picture?'")


def add_base_option(parser: argparse.ArgumentParser) -> None:
    """The option that says where an adapter's base lies now."""
    parser.add_argument(
        "--base", "--base-model", "--base_model", "--model-base", action="append", default=[], metavar="PATH",
        help="where an adapter's base lies now, if it was moved; for a base of parts PART=PATH, once for each",
    )  # fmt: skip


def merge(checkpoint: str, out: Path, moved: Sequence[str] = (), *, trust_remote_code: bool = False) -> str:
    """Write the complete checkpoint, in the precision of the base, which is returned by its name.

    A folder appears only once it is whole.

    Args:
        checkpoint: a folder that `vlm.adapters.folder.save` wrote, or a name on the Hub.
        out: a folder that is not there yet, or is empty.
        moved: where the base lies now, see `read_base`.
        trust_remote_code: whether code out of repositories may run.

    Raises:
        ValueError: there is no adapter, its base is not found, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; name a new folder")
    from transformers.utils.logging import disable_progress_bar

    if not Path(checkpoint).is_dir() and (checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~"))):
        raise ValueError(f"{checkpoint}: no such folder (seen from {Path.cwd()}), nor a name on the Hub")
    from vlm.adapters.folder import is_on_base, load, local_folder  # torch comes with it

    disable_progress_bar()
    if not is_on_base(checkpoint):
        hint = "; a run's result is its folder final" if Path(checkpoint, "final", BASE_FILE).is_file() else ""
        raise ValueError(f"{checkpoint}: no {BASE_FILE} there, so it is no adapter on a base{hint}")
    model = load(checkpoint, moved=moved, trust_remote_code=trust_remote_code)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(local_folder(checkpoint), unfinished, ignore=shutil.ignore_patterns(*NOT_COPIED))
        model.save_pretrained(unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(model.dtype).removeprefix("torch.")
