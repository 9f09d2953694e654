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

from vlm.checks.checkpoint import check_checkpoint
from vlm.cli.model_options import add_generation_options, open_conversation, read_inference_settings
from vlm.cli.record_options import add_max_frames_option
from vlm.config.schema import InferenceConfig
from vlm.config.shown import PresentableParser, presentable, printable

if TYPE_CHECKING:
    from vlm.inference.conversation import Conversation

COMMANDS = {
    "image": ("FILE", "attach an image to the next question; repeat for several"),
    "video": ("FILE", "attach a video to the next question; repeat for several"),
    "undo": ("", "remove the last question and its answer"),
    "reset": ("", "clear the conversation and the attached images"),
    "history": ("", "print the conversation"),
    "help": ("", "print this help"),
    "exit": ("", "leave the chat (or press Ctrl-D, or type /quit)"),
}
"""Command after `/` -> the name of its argument, and its purpose."""

ALIASES = {"quit": "exit"}
"""Another name of a command -> its name."""

HINTS = """\
Everything else is a question; put a space before one that starts with /. Ctrl-C stops an answer.
<image> and <video> in a question mark where they go; otherwise they come first."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm chat`."""
    examples = ("vlm chat outputs/smol-finetune/final", "vlm chat outputs/smol-finetune/final --image cat.png")
    purpose = "Chat with a model about images and videos. Type /help in the chat for its commands."
    parser = PresentableParser("vlm chat", "vlm chat CHECKPOINT [options]", purpose, examples=examples)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder `final`, or a model on the Hub")
    image = "an image for the first question; repeat for several"
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help=image)
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a video for the first question; repeat for several",
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="system prompt, as dataset.system_prompt in training")
    add_max_frames_option(parser)
    add_generation_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm chat CHECKPOINT`."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        settings = read_inference_settings(args)
        check_checkpoint(args.checkpoint, heads=False)
        _run_chat(args, settings)
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
        print_status(
            f"Chatting with {args.checkpoint}. /image FILE attaches an image, /help lists the commands, /exit leaves."
        )
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
            print_status("\ntype /exit to leave")


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
        name = ALIASES.get(name, name)
        try:
            if not line.startswith("/"):
                if line.strip():
                    self.ask(line.strip())
            elif name not in COMMANDS:
                raise ValueError(f"/{name}: no such command; /help lists them")
            elif argument.strip() and not COMMANDS[name][0]:
                raise ValueError(f"/{name} {argument.strip()}: /{name} takes no argument")
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
            note = "; its images stay attached to the next one" if self.images or self.videos else ""
            print_status(f"stopped; the question and the partial answer were removed{note}")
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
                    raise ValueError("there is no question to undo yet")
                self.conversation.undo()
                print_status("removed the last question and its answer")
            case "reset":
                self.conversation.reset()
                self.images, self.videos = [], []
                print_status("cleared the conversation")
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
            raise ValueError(f"/{kind}: name a file, as in /{kind} FILE")
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
        print_status(f"attached to the next question: {', '.join([*self.images, *self.videos])}")
