"""The subcommand `vlm chat`: several questions, each with all that was said before.

Modules that import torch are imported once the command line has been understood. To add a command, write a method of
`Chat` and add it to `COMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.cli.model_options import add_generation_options, add_loading_options, load_model, read_inference_settings
from vlm.config.schema import DatasetConfig, InferenceConfig


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm chat`."""
    parser = argparse.ArgumentParser("vlm chat", description="Talk with a trained model about images and videos.")
    parser.add_argument("checkpoint", help="a run's folder `final`, or a name on the Hub")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image for the first question; may be repeated"
    )
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, likewise")
    parser.add_argument(
        "--system-prompt", metavar="TEXT", help="said first, as dataset.system_prompt was in training"
    )  # fmt: skip
    parser.add_argument(
        "--max-frames", "--max_frames", type=int, default=DatasetConfig.max_frames, metavar="N",
        help="most frames of a video that are seen, evenly spread (%(default)s)",
    )  # fmt: skip
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

    load_images(args.image)  # what is wrong is said before a model loads
    check_videos(args.video, args.max_frames)
    model = load_model(args)
    from transformers import set_seed

    from vlm.inference.conversation import Conversation

    if args.seed is not None:
        set_seed(args.seed)
    chat = Chat(Conversation(model, settings, system_prompt=args.system_prompt, max_frames=args.max_frames))
    chat.images, chat.videos = list(args.image), list(args.video)
    if sys.stdin.isatty():
        print_status(
            f"{args.checkpoint}: ask it. /image FILE shows an image, /help says what else there is, /exit leaves."
        )
    for line in read_lines():
        if not chat.handle_line(line):
            break


def read_lines() -> Iterator[str]:
    """The lines that are typed, or come through a pipe, until there are no more."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):  # it lets lines be edited and called back; Windows has none
            import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print_status("\n/exit leaves")


def print_status(text: str) -> None:
    """Tell the user something that the model did not say: a pipe gets answers only."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """What is typed, and what comes of it.

    Args:
        conversation: the conversation.

    Attributes:
        images: images for the next question.
        videos: videos for it.
    """

    def __init__(self, conversation: Any):
        self.conversation = conversation
        self.images: list[str] = []
        self.videos: list[str] = []

    def handle_line(self, line: str) -> bool:
        """Do what a line says; whether the chat goes on. What is wrong with it is said."""
        try:
            if not line.startswith("/"):
                if line.strip():
                    self.ask(line.strip())
                return True
            name, _, rest = line[1:].partition(" ")
            if name not in COMMANDS:
                raise ValueError(f"/{name}: there is no such command; /help lists them")
            takes, _, act = COMMANDS[name]
            if rest.strip() and not takes:
                raise ValueError(f"/{name} takes nothing, got {rest.strip()}")
            return act(self, rest.strip()) is not False
        except (ValueError, OSError) as error:
            print_status(str(error))
            return True

    def ask(self, text: str) -> None:
        """Print the answer as it comes. Stopped or failed, the question is forgotten, and its images wait on.

        Raises:
            ValueError: it cannot be asked, or memory does not suffice.
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
            kept = "; its images wait for the next one" if self.images or self.videos else ""
            print_status(f"stopped: the question and what there was of an answer are forgotten{kept}")
        except OutOfMemoryError as error:
            raise ValueError(f"{error} /undo or /reset makes the conversation shorter.") from error
        else:
            self.images, self.videos = [], []

    def image(self, path: str) -> None:
        """Show an image with the next question."""
        from vlm.inference.generate import load_images

        load_images([place := expand_path(path)])
        self.images.append(place)
        self._print_pending_media()

    def video(self, path: str) -> None:
        """Show a video with the next question."""
        from vlm.inference.generate import check_videos

        check_videos([place := expand_path(path)], self.conversation.max_frames)
        self.videos.append(place)
        self._print_pending_media()

    def _print_pending_media(self) -> None:
        print_status(f"the next question comes with {', '.join([*self.images, *self.videos])}")

    def history(self, _: str) -> None:
        """Print what was said."""
        for turn in self.conversation.turns:
            print(f"{turn.role}: {turn.as_message('<image>', '<video>')['content']}")
        if self.images or self.videos:
            self._print_pending_media()

    def undo(self, _: str) -> None:
        """Forget the last question."""
        if not self.conversation.exchanges:
            raise ValueError("nothing was asked yet")
        self.conversation.undo()
        print_status("the last question and its answer are forgotten")

    def reset(self, _: str) -> None:
        """Begin anew."""
        self.conversation.reset()
        self.images, self.videos = [], []
        print_status("all is forgotten")

    def help(self, _: str) -> None:
        """Print what can be typed."""
        for name, (takes, purpose, _act) in COMMANDS.items():
            print(f"{f'/{name} {takes}':<14}{purpose}")
        print("Anything else is a question; type a blank before one that begins with /. Ctrl-C stops an answer.")
        print("<image> and <video> in a question say where an image or a video stands; else they come first.")

    def exit(self, _: str) -> bool:
        """Leave."""
        return False


def expand_path(path: str) -> str:
    """A path as it was typed: perhaps in quotes, perhaps from the home folder.

    Raises:
        ValueError: there is none.
    """
    if not path:
        raise ValueError("a file is needed")
    bare = path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path
    return str(Path(bare).expanduser())


COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], Any]]] = {
    "image": ("FILE", "show an image with the next question; may be repeated", Chat.image),
    "video": ("FILE", "show a video with the next question; may be repeated", Chat.video),
    "undo": ("", "forget the last question and its answer", Chat.undo),
    "reset": ("", "forget everything, and images that wait for a question", Chat.reset),
    "history": ("", "print what was said", Chat.history),
    "help": ("", "print this", Chat.help),
    "exit": ("", "leave, as Ctrl-D does", Chat.exit),
}
"""What can be typed after `/` -> what it takes, what it is for, and what does it."""
