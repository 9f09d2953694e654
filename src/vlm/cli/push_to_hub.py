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

from vlm.assembly.adapter_merge import merge
from vlm.cli.model_options import add_base_options
from vlm.config.shown import PresentableParser, present_what_is_printed, presentable, printable

if TYPE_CHECKING:
    from vlm.hub.publishing import PreparedFolder


def push_parser() -> argparse.ArgumentParser:
    """Return the parser of `push-to-hub`."""
    purpose = "Upload a checkpoint, with its code and a model card, so that plain transformers loads it by its name."
    parser = PresentableParser("push-to-hub", description=purpose)
    parser.add_argument("folder", nargs="?", type=Path, metavar="CHECKPOINT", help="a run's folder `final`")
    parser.add_argument("--checkpoint", type=Path, metavar="CHECKPOINT", help="the same, as an option")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the repository; without OWNER, your own")
    parser.add_argument("--force", action="store_true", help="go on if the repository holds something already")
    parser.add_argument("--yes", action="store_true", help="upload without asking once more")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--private", action="store_true", help="a new repository is for you alone (the default)")
    shown.add_argument("--public", action="store_true", help="a new repository is for everybody")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch; one that is not there is made (main)")
    parser.add_argument("--license", metavar="ID", help="the licence's identifier on the Hub, such as apache-2.0")
    parser.add_argument("--merge", action="store_true", help="merge an adapter into its base first")
    add_base_options(parser, "with --merge: code of the base may run")
    parser.add_argument("--dry-run", action="store_true", help="prepare and list the files, upload nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="with --dry-run: a new folder for them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`push-to-hub CHECKPOINT --repo OWNER/NAME`."""
    present_what_is_printed()
    parser = push_parser()
    args = parser.parse_args(argv)
    if args.folder and args.checkpoint:
        parser.error("give CHECKPOINT once")
    if args.output and not args.dry_run:
        parser.error("--output is where --dry-run leaves the files; give both")
    args.checkpoint = args.checkpoint or args.folder
    try:
        _check_prompts_possible(args)
        args.checkpoint = args.checkpoint or Path(_ask("Checkpoint (a run's folder final)")).expanduser()
        _check_publishable(args)
        _prepare_only(args) if args.dry_run else _push(args)
    except (ValueError, OSError) as error:
        sys.exit(f"push-to-hub: {presentable(error)}")
    except (KeyboardInterrupt, EOFError):
        sys.exit("push-to-hub: stopped; what has arrived on the Hub is not sent again by the same command")


def _push(args: argparse.Namespace) -> None:
    from vlm.hub.publishing import obsolete
    from vlm.hub.upload import HubClient, full_name

    repo = args.repo or _ask("Repository on the Hub (OWNER/NAME)")
    full_name(repo)
    hub = HubClient()
    target = hub.get_target(repo, args.revision)
    if target.files and not args.force:
        situation = f"{target.name} exists and holds {len(target.files)} files"
        if not sys.stdin.isatty():
            raise ValueError(f"{situation}: go on with --force; the commits before this one stay in its history")
        _require_consent(f"{situation}. Go on? The commits before this one stay in its history.")
    with _prepare_folder(args, target.name) as prepared:
        gone = obsolete(target.files, prepared)
        _print_files(prepared)
        if gone:
            print(printable(f"Of the repository's files these go: {', '.join(gone)}", single_line=True))
        private = target.private if target.exists else not args.public
        visibility = "private" if private else "public"
        if target.exists and (args.public or args.private) and private == args.public:
            print(f"{target.name} stays {visibility}: only its settings on the Hub change that")
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
    from vlm.hub.publishing import is_adapter, prepare_upload
    from vlm.hub.run_facts import read_run

    disable_progress_bar()
    checkpoint = args.checkpoint
    run = read_run(checkpoint)
    with TemporaryDirectory(prefix="push-to-hub-") as space:
        if is_adapter(checkpoint):
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
    """Raise ValueError where an option is missing and there is no terminal to ask for it."""
    if sys.stdin.isatty():
        return
    if args.checkpoint is None:
        raise ValueError("no terminal to ask at: say which folder with --checkpoint")
    if args.repo is None and not args.dry_run:
        raise ValueError("no terminal to ask at: say where to with --repo OWNER/NAME")
    if not args.yes and not args.dry_run:
        raise ValueError("no terminal to ask at: agree to the upload with --yes, or look first with --dry-run")


def _check_publishable(args: argparse.Namespace) -> None:
    """Raise ValueError for a folder that is no checkpoint, or an adapter without `--merge`."""
    from vlm.hub.publishing import is_adapter, require_checkpoint

    require_checkpoint(args.checkpoint)
    if is_adapter(args.checkpoint):
        if not args.merge:
            raise ValueError(f"{args.checkpoint} is an adapter, nothing without its base: --merge merges it first")
    elif args.merge or args.base:
        raise ValueError(f"{'--merge' if args.merge else '--base'}: {args.checkpoint} is complete, it has no base")


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
