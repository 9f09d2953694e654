"""The subcommand `vlm chat`: a conversation, in which each question comes with the earlier turns.

Modules that import torch are imported once the command line has been understood. To add a command, write a method of
`Chat` and add it to `COMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.model_options import add_generation_options, add_loading_options, load_model, read_inference_settings
from vlm.cli.record_options import add_max_frames_option
from vlm.config.schema import InferenceConfig

if TYPE_CHECKING:
    from vlm.inference.conversation import Conversation


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm chat`."""
    parser = argparse.ArgumentParser("vlm chat", description="Talk with a trained model about images and videos.")
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image for the first question; may be repeated"
    )
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, likewise")
    parser.add_argument("--system-prompt", metavar="TEXT", help="the system turn, as dataset.system_prompt in training")
    add_max_frames_option(parser)
    add_generation_options(parser)
    add_loading_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """`vlm chat CHECKPOINT`."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        _run_chat(args, read_inference_settings(args))
    except (ValueError, OSError) as error:
        sys.exit(f"vlm chat: {error}")
    except KeyboardInterrupt:
        sys.exit("\nvlm chat: stopped")


def _run_chat(args: argparse.Namespace, settings: InferenceConfig) -> None:
    from vlm.inference.generate import check_videos, load_images

    load_images(args.image)  # refuse bad input before the model loads
    check_videos(args.video, args.max_frames)
    model = load_model(args)
    from transformers import set_seed

    from vlm.inference.conversation import Conversation

    if args.seed is not None:
        set_seed(args.seed)
    conversation = Conversation(model, settings, system_prompt=args.system_prompt, max_frames=args.max_frames)
    chat = Chat(conversation, args.image, args.video)
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
    print(text, file=sys.stderr, flush=True)


class Chat:
    """Handles the lines that the user types.

    Args:
        conversation: the conversation with the model.
        images: paths of images for the next question.
        videos: paths of videos for the next question.
    """

    def __init__(self, conversation: "Conversation", images: Sequence[str] = (), videos: Sequence[str] = ()):
        self.conversation = conversation
        self.images, self.videos = list(images), list(videos)

    def handle_line(self, line: str) -> bool:
        """Ask a question or run a command, and print errors; return whether the chat continues."""
        try:
            if not line.startswith("/"):
                if line.strip():
                    self.ask(line.strip())
                return True
            name, _, argument = line[1:].partition(" ")
            if name not in COMMANDS:
                raise ValueError(f"/{name}: there is no such command; /help lists them")
            metavar, _, run = COMMANDS[name]
            if argument.strip() and not metavar:
                raise ValueError(f"/{name} takes nothing, got {argument.strip()}")
            return run(self, argument.strip()) is not False
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
                    print(piece, end="", flush=True)
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

    def image(self, path: str) -> None:
        """Show an image with the next question."""
        from vlm.inference.generate import load_images

        load_images([file := expand_path(path)])
        self.images.append(file)
        self._print_pending_media()

    def video(self, path: str) -> None:
        """Show a video with the next question."""
        from vlm.inference.generate import check_videos

        check_videos([file := expand_path(path)], self.conversation.max_frames)
        self.videos.append(file)
        self._print_pending_media()

    def _print_pending_media(self) -> None:
        print_status(f"the next question comes with {', '.join([*self.images, *self.videos])}")

    def history(self, _: str) -> None:
        """Print the conversation."""
        for turn in self.conversation.turns:
            print(f"{turn.role}: {turn.as_message('<image>', '<video>')['content']}")
        if self.images or self.videos:
            self._print_pending_media()

    def undo(self, _: str) -> None:
        """Forget the last question and its answer."""
        if not self.conversation.exchanges:
            raise ValueError("nothing was asked yet")
        self.conversation.undo()
        print_status("the last question and its answer are forgotten")

    def reset(self, _: str) -> None:
        """Forget the conversation, and images and videos for the next question."""
        self.conversation.reset()
        self.images, self.videos = [], []
        print_status("everything is forgotten")

    def help(self, _: str) -> None:
        """Print all commands."""
        for name, (metavar, purpose, _command) in COMMANDS.items():
            print(f"{f'/{name} {metavar}':<14}{purpose}")
        print("Anything else is a question; type a blank before one that begins with /. Ctrl-C stops an answer.")
        print("<image> and <video> in a question say where an image or a video stands; else they come first.")

    def exit(self, _: str) -> bool:
        """End the chat."""
        return False


def expand_path(path: str) -> str:
    """Return a typed path without quotes, with `~` expanded.

    Raises:
        ValueError: the path is empty.
    """
    if not path:
        raise ValueError("a file is needed")
    bare = path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path
    return str(Path(bare).expanduser())


COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], object]]] = {
    "image": ("FILE", "show an image with the next question; may be repeated", Chat.image),
    "video": ("FILE", "show a video with the next question; may be repeated", Chat.video),
    "undo": ("", "forget the last question and its answer", Chat.undo),
    "reset": ("", "forget everything, and images that wait for a question", Chat.reset),
    "history": ("", "print the conversation", Chat.history),
    "help": ("", "print this", Chat.help),
    "exit": ("", "leave, as Ctrl-D does", Chat.exit),
}
"""Command after `/` -> the name of its argument, its purpose, and its method."""
