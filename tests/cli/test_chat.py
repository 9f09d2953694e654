"""`vlm chat`: what is typed, what is said to it, and that it goes on after what is wrong."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import refusal
from tests.data.vision.test_video import write_video
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts, picture
from tests.waiting import HANG
from vlm.cli.chat import COMMANDS
from vlm.cli.main import main
from vlm.config.schema import InferenceConfig
from vlm.config.shown import printable
from vlm.inference.conversation import Conversation
from vlm.inference.generate import VisionLanguageModel

GREEDY = InferenceConfig(max_new_tokens=6)
Output = tuple[list[str], str]
"""The lines of answers, and what the program says of itself."""


@pytest.fixture(scope="module")
def ours(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


@pytest.fixture(scope="module")
def checkpoint(ours: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "final"
    ours.model.save_pretrained(folder)
    ours.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images, one with a blank in its name."""
    found = [tmp_path / name for name in ("a.png", "b.png", "with blank.png")]
    for number, path in enumerate(found):
        picture(number).save(path)
    return found


@pytest.fixture
def chat(
    ours: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """`chat(line, line, …, options=[…])`: what comes of typing these lines through a pipe."""
    monkeypatch.setattr(VisionLanguageModel, "load", lambda *given, **named: ours)

    def typed(*lines: object, options: Any = ()) -> Output:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", "the/checkpoint", "--max-new-tokens", "6", *map(str, options)])
        found = capsys.readouterr()
        return found.out.split("\n")[:-1], found.err

    return typed


def get_expected_answers(ours: VisionLanguageModel, *asked: tuple[str, list[Path]], **options: Any) -> list[str]:
    """What the model answers to questions of one conversation, as it is printed."""
    talk = Conversation(ours, GREEDY, **options)
    return printable("".join("".join(talk.ask(text, images)) + "\n" for text, images in asked)).split("\n")[:-1]


# Talking


def test_a_pipe_gets_the_answers_of_one_conversation(ours: Any, chat: Any, images: list[Path]):
    said, notes = chat("what?", "", f"/image {images[1]}", "and this?", "well?", options=["--image", images[0]])
    assert said == get_expected_answers(ours, ("what?", images[:1]), ("and this?", images[1:2]), ("well?", []))
    assert notes == f"attached to the next question: {images[1]}\n"


def test_images_gather_for_a_question(ours: Any, chat: Any, images: list[Path]):
    """Their paths may have blanks, quoted or not; where they stand may be said."""
    said, _ = chat(f"/image {images[2]}", f"/image '{images[0]}'", "this <image> or that <image>?")
    assert said == get_expected_answers(ours, ("this <image> or that <image>?", [images[2], images[0]]))


def test_videos_are_shown_too(ours: Any, chat: Any, tmp_path: Path):
    video = write_video(tmp_path / "a.mp4", 20)
    said, _ = chat(f"/video {video}", "what?", options=["--max-frames", 2])
    assert "\n".join(said).strip() == printable(ours.generate("what?", videos=[video], max_frames=2, max_new_tokens=6))


def test_a_system_prompt(ours: Any, chat: Any):
    said, _ = chat("what?", options=["--system-prompt", "Be brief."])
    assert said == get_expected_answers(ours, ("what?", []), system_prompt="Be brief.")


def test_reset_and_undo_forget(ours: Any, chat: Any, images: list[Path]):
    first, second = get_expected_answers(ours, ("what?", [])), get_expected_answers(ours, ("and this?", images[:1]))
    said, notes = chat("what?", "/undo", f"/image {images[0]}", "/reset", "what?", "/reset", f"/image {images[0]}",
                       "and this?", "/undo", "/undo")  # fmt: skip
    assert said == [*first, *first, *second]
    assert notes.count("removed the last question and its answer") == notes.count("cleared the conversation") == 2
    assert notes.endswith("there is no question to undo yet\n")


def test_the_history(ours: Any, chat: Any, images: list[Path]):
    lines = [f"/image {images[0]}", "what?", f"/image {images[1]}", "/history"]
    said, notes = chat(*lines, options=["--system-prompt", "S"])
    talk = Conversation(ours, GREEDY, system_prompt="S")
    answer = printable("".join(talk.ask("what?", images[:1])).strip())
    assert "\n".join(said).endswith(f"system: S\nuser: <image>\nwhat?\nassistant: {answer}")
    assert notes.endswith(f"attached to the next question: {images[1]}\n")


def test_help_lists_what_can_be_typed(chat: Any):
    said, _ = chat("/help")
    assert [line.split()[0] for line in said[: len(COMMANDS)]] == [f"/{name}" for name in COMMANDS]


@pytest.mark.parametrize("lines", [["/exit", "what?"], ["/quit", "what?"], []])
def test_it_ends(chat: Any, lines: list[str]):
    assert chat(*lines) == ([], "")


def test_a_question_may_begin_with_a_slash(ours: Any, chat: Any):
    assert chat(" /usr is what?")[0] == get_expected_answers(ours, ("/usr is what?", []))


# What is wrong


def test_it_goes_on_after_what_is_wrong(ours: Any, chat: Any, images: list[Path], tmp_path: Path):
    (tmp_path / "c.png").write_text("no image")
    lines = ["/image", "/image no.png", f"/image {tmp_path / 'c.png'}", "/video no.mp4", "/foo", "/reset now",
             "<image>", "word " * 600, f"/image {images[0]}", "what?"]  # fmt: skip
    said, notes = chat(*lines)
    assert said == get_expected_answers(ours, ("what?", images[:1]))
    for expected in ("/image: name a file, as in /image FILE", "no.png does not open", "c.png does not open",
                     "video no.mp4 does not open", "/foo: no such command; /help lists them",
                     "/reset now: /reset takes no argument", "the prompt has 1 <image>, but 0 images were given",
                     "the model reads at most 512"):  # fmt: skip
        assert expected in notes


def test_images_wait_on_where_a_question_is_refused(ours: Any, chat: Any, images: list[Path]):
    said, _ = chat(f"/image {images[0]}", "<image><image>?", "what?")
    assert said == get_expected_answers(ours, ("what?", images[:1]))


def test_no_answer_reaches_the_terminal_as_it_is(ours: Any, chat: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ours, "stream_batch", lambda *given: iter(["\x1b[2Jred\r", "\u202ebc", "\n\x9b1mé"]))
    said, notes = chat("what?", "/history", "/image no\x1b[31m.png")
    assert said[:2] == [r"\x1b[2Jred\r\u202ebc", r"\x9b1mé"]
    assert r"assistant: \x1b[2Jred\r\u202ebc" in said
    assert r"no\x1b[31m.png" in notes


def test_half_of_a_pair_spoils_its_question_only(ours: Any, chat: Any):
    said, notes = chat("a \ud83d b", "what?")
    assert said == get_expected_answers(ours, ("what?", []))
    assert "the prompt has half of a surrogate pair" in notes


def test_an_interrupt_stops_the_answer_and_not_the_chat(
    ours: Any, chat: Any, images: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """Nothing of it is kept, and its images wait for the next question."""
    expected = get_expected_answers(ours, ("really?", images[:1]))
    streamed, asked = ours.stream_batch, []

    def interrupted(inputs: Any, settings: Any) -> Iterator[str]:
        asked.append(1)
        if len(asked) == 1:
            yield "half an "
            raise KeyboardInterrupt
        yield from streamed(inputs, settings)

    monkeypatch.setattr(ours, "stream_batch", interrupted)
    said, notes = chat(f"/image {images[0]}", "what?", "really?")
    assert said == ["half an ", *expected]
    assert "stopped; the question and the partial answer were removed; its images stay attached" in notes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["owner/name", "--image", "no.png"], "no.png does not open"),
        (["owner/name", "--video", "no.mp4"], "video no.mp4 does not open"),
        (["./no/such", "--temperature", "-1"], "temperature=-1.0: 0 (greedy) or more is needed"),
        (["./no/such", "inference.temperature=1"], "inference.temperature=1: add -cn RUN, the run that it changes"),
        (["./no/such"], "./no/such: no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_loads(words: list[str], said: str):
    found = refusal("chat", *words)
    assert found.startswith("vlm chat: ")
    assert said in found


# A terminal


@pytest.mark.slow
def test_a_terminal(checkpoint: Path, images: list[Path]):
    """It prompts, an interrupt leaves nothing but what was typed behind, and Ctrl-D leaves."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "vlm", "chat", str(checkpoint), "--device", "cpu", "--max-new-tokens", "3"]
    plain = {**os.environ, "TERM": "dumb"}
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever shell began the tests
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=plain, preexec_fn=heeded
    ) as ended:
        os.close(theirs)
        try:
            assert b"/help lists" in read_until(ours, b"/exit leaves.\r\n> ")
            while not select.select([ours], [], [], 3)[0]:  # readline hears none between its prompt and its waiting
                ended.send_signal(signal.SIGINT)
            read_until(ours, b"type /exit to leave\r\n> ")
            os.write(ours, f"/image {images[0]}\n".encode())
            read_until(ours, b".png\r\n> ")
            os.write(ours, b"what?\n")
            read_until(ours, b"\r\n> ")
            os.write(ours, b"/history\n")
            assert b"user: <image>" in read_until(ours, b"\r\n> ")
            os.write(ours, b"\x04")
            assert ended.wait(HANG) == 0
        finally:
            ended.kill()
            os.close(ours)


def read_until(terminal: int, ending: bytes) -> bytes:
    """Return what a terminal shows, up to what it shows last."""
    shown = b""
    while not shown.endswith(ending):
        assert select.select([terminal], [], [], HANG)[0], shown
        try:
            shown += os.read(terminal, 1024)
        except OSError as closed:  # the program has ended
            raise AssertionError(shown) from closed
    return shown
