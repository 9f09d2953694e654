"""`push-to-hub`, which is `vlm push-to-hub`: a checkpoint as a repository on the Hub.

Missing options are asked for; without a terminal they are an error that names the option.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vlm.checks.checkpoint import check_final_folder, is_adapter_folder
from vlm.cli.model_options import add_base_options
from vlm.config.shown import PresentableParser, present_what_is_printed, presentable, printable

if TYPE_CHECKING:
    from vlm.hub.publishing import PreparedFolder


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `push-to-hub`."""
    purpose = "Publish a checkpoint on the Hugging Face Hub, with a model card and the code that transformers needs."
    examples = (
        "vlm push-to-hub outputs/smol-finetune/final --repo me/smol-vlm",
        "vlm push-to-hub outputs/smol-finetune/final --dry-run",
    )
    usage = "vlm push-to-hub CHECKPOINT --repo OWNER/NAME [options]"
    parser = PresentableParser("vlm push-to-hub", usage, purpose, examples=examples)
    parser.add_argument("folder", nargs="?", type=Path, metavar="CHECKPOINT", help="a run's folder `final`")
    parser.add_argument("--checkpoint", type=Path, metavar="CHECKPOINT", help="same as CHECKPOINT")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the repository (default owner: you)")
    parser.add_argument("--force", action="store_true", help="upload even if the repository has files already")
    parser.add_argument("--yes", action="store_true", help="upload without asking for confirmation")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--private", action="store_true", help="make a new repository private (the default)")
    shown.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch, created if it does not exist (default: main)")
    parser.add_argument("--license", metavar="ID", help="the model's license, such as apache-2.0")
    parser.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its base first")
    add_base_options(parser, "with --merge: allow code that comes with the base to run")
    parser.add_argument("--dry-run", action="store_true", help="prepare and list the files without uploading")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="with --dry-run: keep the files in a new folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`push-to-hub CHECKPOINT --repo OWNER/NAME`."""
    present_what_is_printed()
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.folder and args.checkpoint:
        parser.error("CHECKPOINT was given twice")
    if args.output and not args.dry_run:
        parser.error("--output needs --dry-run")
    args.checkpoint = args.checkpoint or args.folder
    try:
        _check_prompts_possible(args)
        args.checkpoint = args.checkpoint or Path(_ask("Checkpoint (a run's folder final)")).expanduser()
        _check_publishable(args)
        _prepare_only(args) if args.dry_run else _push(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm push-to-hub: {presentable(error)}")
    except (KeyboardInterrupt, EOFError):
        sys.exit("vlm push-to-hub: stopped; the same command does not upload again what has arrived")


def _push(args: argparse.Namespace) -> None:
    from vlm.hub.upload import HubClient, full_name  # imports no torch, and says at once that there is no token

    repo = args.repo or _ask("Repository on the Hub (OWNER/NAME)")
    full_name(repo)
    hub = HubClient()
    target = hub.get_target(repo, args.revision)
    if target.files and not args.force:
        situation = f"{target.name} exists and holds {len(target.files)} files"
        if not sys.stdin.isatty():
            raise ValueError(f"{situation}: add --force to upload anyway; earlier commits stay in its history")
        _require_consent(f"{situation}. Upload anyway? Earlier commits stay in its history.")
    from vlm.hub.publishing import obsolete

    with _prepare_folder(args, target.name) as prepared:
        gone = obsolete(target.files, prepared)
        _print_files(prepared)
        if gone:
            print(printable(f"Deleted from the repository: {', '.join(gone)}", single_line=True))
        private = target.private if target.exists else not args.public
        visibility = "private" if private else "public"
        if target.exists and (args.public or args.private) and private == args.public:
            print(f"{target.name} stays {visibility}; change that in its settings on the Hub")
        if not args.yes:
            upload = f"{len(prepared.files)} files, {format_bytes(prepared.size)}, to {hub.endpoint}/{target.name}"
            _require_consent(f"Upload {upload} ({visibility})?")
        address = hub.upload_folder(prepared.folder, target, private=private, revision=args.revision, obsolete=gone)
    print(f"Uploaded: {address}")


def _prepare_only(args: argparse.Namespace) -> None:
    if args.repo:
        from vlm.hub.upload import full_name

        full_name(args.repo)
    with _prepare_folder(args, args.repo) as prepared:
        _print_files(prepared)
    print(f"Nothing was uploaded.{f' The files are in {args.output}' if args.output else ''}")


@contextmanager
def _prepare_folder(args: argparse.Namespace, repo: str | None) -> Iterator["PreparedFolder"]:
    """Yield the folder to upload: a temporary one, or `--output`, which appears once it is complete."""
    from transformers.utils.logging import disable_progress_bar

    from vlm.hub.folders import create_folder
    from vlm.hub.publishing import prepare_upload
    from vlm.hub.run_facts import read_run

    disable_progress_bar()
    checkpoint = args.checkpoint
    run = read_run(checkpoint)
    with TemporaryDirectory(prefix="push-to-hub-") as space:
        if is_adapter_folder(checkpoint):
            from vlm.assembly.adapter_merge import merge  # imports torch

            merge(str(checkpoint), Path(space, "merged"), args.base, trust_remote_code=args.trust_remote_code)
            checkpoint = Path(space, "merged")
        if args.output:
            with create_folder(args.output) as out:
                yield prepare_upload(checkpoint, out, run, repo=repo, licence=args.license)
        else:
            out = Path(space, "upload")
            out.mkdir()
            yield prepare_upload(checkpoint, out, run, repo=repo, licence=args.license, allow_links=True)


# Refusals


def _check_prompts_possible(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is missing and there is no terminal to ask for it."""
    if sys.stdin.isatty():
        return
    if args.checkpoint is None:
        raise ValueError("CHECKPOINT is missing: a run's folder `final`")
    if args.repo is None and not args.dry_run:
        raise ValueError("--repo OWNER/NAME is missing")
    if not args.yes and not args.dry_run:
        raise ValueError("there is no terminal to confirm the upload on: add --yes, or look first with --dry-run")


def _check_publishable(args: argparse.Namespace) -> None:
    """Raise ValueError for a folder that is no checkpoint, or an adapter without `--merge`."""
    check_final_folder(args.checkpoint)
    if is_adapter_folder(args.checkpoint):
        if not args.merge:
            raise ValueError(f"{args.checkpoint} is an adapter without its base; add --merge to merge them first")
    elif args.merge or args.base:
        raise ValueError(
            f"{'--merge' if args.merge else '--base'}: {args.checkpoint} is a complete model, without a base"
        )


# Prompts and output


def _ask(question: str) -> str:
    """Ask until the answer is not empty, and return it."""
    while not (answer := input(f"{question}: ").strip()):
        pass
    return answer


def _require_consent(question: str) -> None:
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was uploaded")


def _print_files(prepared: "PreparedFolder") -> None:
    """Print which files are uploaded and which are left out."""
    width = max(map(len, prepared.files))
    for name, size in (*prepared.files.items(), ("total", prepared.size)):
        print(f"  {printable(name, single_line=True):<{width}}  {format_bytes(size):>9}")
    if prepared.skipped_files:
        print(printable(f"Left out: {', '.join(prepared.skipped_files)}", single_line=True))


def format_bytes(size: float) -> str:
    """Format a number of bytes with its unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
