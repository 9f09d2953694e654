"""The subcommand `vlm chat`: a conversation, in which each question comes with the earlier turns.

Modules that import torch are imported once the command line has been understood. To add a command, add it to `COMMANDS`
and to `Chat.run_command`.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.model_options import add_generation_options, open_conversation, read_inference_settings
from vlm.cli.record_options import add_max_frames_option
from vlm.config.schema import InferenceConfig
from vlm.config.shown import PresentableParser, presentable, printable

if TYPE_CHECKING:
    from vlm.inference.conversation import Conversation

COMMANDS = {
    "image": ("FILE", "show an image with the next question; may be repeated"),
    "video": ("FILE", "show a video with the next question; may be repeated"),
    "undo": ("", "forget the last question and its answer"),
    "reset": ("", "forget everything, and images that wait for a question"),
    "history": ("", "print the conversation"),
    "help": ("", "print this"),
    "exit": ("", "leave, as Ctrl-D does"),
}
"""Command after `/` -> the name of its argument, and its purpose."""

HINTS = """\
Anything else is a question; type a blank before one that begins with /. Ctrl-C stops an answer.
<image> and <video> in a question say where an image or a video stands; else they come first."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm chat`."""
    parser = PresentableParser("vlm chat", description="Talk with a trained model about images and videos.")
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    image = "an image for the first question; may be repeated"
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help=image)
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, likewise")
    parser.add_argument("--system-prompt", metavar="TEXT", help="the system turn, as dataset.system_prompt in training")
    add_max_frames_option(parser)
    add_generation_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm chat CHECKPOINT`."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        _run_chat(args, read_inference_settings(args))
    except KeyboardInterrupt:
        sys.exit("\nvlm chat: stopped")


def _run_chat(args: argparse.Namespace, settings: InferenceConfig) -> None:
    from vlm.inference.prompts import check_videos, load_images

    load_images(args.image)  # refuse bad input before the model loads
    check_videos(args.video, args.max_frames)
    chat = Chat(open_conversation(args, settings), args.image, args.video)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 spoils its question, not the chat
    if sys.stdin.isatty():
        print_status(f"{args.checkpoint}: ask it. /image FILE shows an image, /help lists all commands, /exit leaves.")
    for line in read_lines():
        if not chat.handle_line(line):
            break


def read_lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):  # for editing and history; Windows has none
            import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print_status("\n/exit leaves")


def print_status(text: str) -> None:
    """Print a message to stderr: stdout gets the model's answers only."""
    print(presentable(text), file=sys.stderr, flush=True)


class Chat:
    """Handles the lines that the user types; `images` and `videos` are paths for the next question."""

    def __init__(self, conversation: "Conversation", images: Sequence[str], videos: Sequence[str]):
        self.conversation = conversation
        self.images, self.videos = list(images), list(videos)

    def handle_line(self, line: str) -> bool:
        """Ask a question or run a command, and print errors; return whether the chat continues."""
        name, _, argument = line[1:].partition(" ")
        try:
            if not line.startswith("/"):
                if line.strip():
                    self.ask(line.strip())
            elif name not in COMMANDS:
                raise ValueError(f"/{name}: there is no such command; /help lists them")
            elif argument.strip() and not COMMANDS[name][0]:
                raise ValueError(f"/{name} takes nothing, got {argument.strip()}")
            elif name == "exit":
                return False
            else:
                self.run_command(name, argument.strip())
        except (ValueError, OSError) as error:
            print_status(str(error))
        return True

    def ask(self, text: str) -> None:
        """Print the answer as it comes; a stopped or failed question is forgotten, and its images are kept.

        Raises:
            ValueError: the question is refused, or memory does not suffice.
        """
        from torch import OutOfMemoryError

        try:
            pieces = self.conversation.ask(text, self.images, self.videos)
            try:
                for piece in pieces:
                    print(printable(piece), end="", flush=True)
            finally:
                pieces.close()
                print(flush=True)
        except KeyboardInterrupt:
            note = "; its images wait for the next one" if self.images or self.videos else ""
            print_status(f"stopped: the question and what there was of an answer are forgotten{note}")
        except OutOfMemoryError as error:
            raise ValueError(f"{error} /undo or /reset makes the conversation shorter.") from error
        else:
            self.images, self.videos = [], []

    def run_command(self, name: str, argument: str) -> None:
        """Run a command of `COMMANDS`, and print what became of it."""
        match name:
            case "image" | "video":
                self._add_medium(name, argument)
            case "undo":
                if not self.conversation.exchanges:
                    raise ValueError("nothing was asked yet")
                self.conversation.undo()
                print_status("the last question and its answer are forgotten")
            case "reset":
                self.conversation.reset()
                self.images, self.videos = [], []
                print_status("everything is forgotten")
            case "history":
                for turn in self.conversation.turns:
                    print(printable(f"{turn.role}: {turn.as_message('<image>', '<video>')['content']}"))
                if self.images or self.videos:
                    self._print_pending_media()
            case "help":
                for command, (metavar, purpose) in COMMANDS.items():
                    print(f"{f'/{command} {metavar}':<14}{purpose}")
                print(HINTS)

    def _add_medium(self, kind: str, path: str) -> None:
        """Show a file with the next question; its path may be in quotes and begin with `~`."""
        from vlm.inference.prompts import check_videos, load_images

        if not path:
            raise ValueError("a file is needed")
        is_quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
        file = str(Path(path[1:-1] if is_quoted else path).expanduser())
        if kind == "image":
            load_images([file])
            self.images.append(file)
        else:
            check_videos([file], self.conversation.max_frames)
            self.videos.append(file)
        self._print_pending_media()

    def _print_pending_media(self) -> None:
        print_status(f"the next question comes with {', '.join([*self.images, *self.videos])}")
