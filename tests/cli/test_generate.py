"""`vlm generate`: asking a model about images and videos."""

import sys
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

import vlm
from tests.data.vision.test_video import write_video
from tests.tiny_parts import Parts, picture
from vlm.cli.main import main
from vlm.config.shown import printable
from vlm.inference.generate import VisionLanguageModel
from vlm.models.connectors import CONNECTORS

OWN_CONNECTOR = """
from torch import nn


class Mine(nn.Linear):
    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__(vision_dim, text_dim)
"""


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model, as a run leaves it in `final`."""
    folder = tmp_path_factory.mktemp("model") / "final"
    model, processor = parts.model("clip", "llama", template="chatml")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture().save(tmp_path / "image.png")
    return tmp_path / "image.png"


def ask(*words: object) -> None:
    main(["generate", *map(str, words)])


def test_generate_answers_as_three_lines_of_python_do(
    checkpoint: Path, image: Path, capsys: pytest.CaptureFixture[str]
):
    ask(checkpoint, "--image", image, "--prompt", "What is this?", "--max-new-tokens", 5, "--device", "cpu")
    model = vlm.load(checkpoint, device="cpu")
    assert capsys.readouterr().out.strip() == printable(model.generate("What is this?", [image], max_new_tokens=5))


@pytest.mark.parametrize(
    "options",
    [
        ["--num-beams", "2"],
        ["--temperature", "0.8", "--top-p", "0.95", "--seed", "3"],
        ["--temperature", "0.8", "--top_p", "0.95", "--num_beams", "1", "--max_new_tokens", "4", "--dtype", "float32"],
    ],
    ids=str,
)
def test_generate_takes_options(checkpoint: Path, image: Path, options: list[str], capsys: pytest.CaptureFixture[str]):
    said = []
    for _ in range(2 if "--seed" in options else 1):
        ask(checkpoint, "--image", image, "--prompt", "What?", "--device", "cpu", "--max-new-tokens", 5, *options)
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert said[0].endswith("\n")


def test_generate_takes_no_image_and_several(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture[str]):
    short = ["--max-new-tokens", 2, "--device", "cpu"]
    ask(checkpoint, "--prompt", "Hello", *short)
    ask(checkpoint, "--image", image, "--image", image, "--prompt", "<image> or <image>?", *short)
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_generate_takes_videos(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture[str]):
    video = write_video(image.with_name("a.mp4"), 20)
    asked = "<video> or <image>?"
    ask(checkpoint, "--video", video, "--image", image, "--max-frames", 2, "--prompt", asked, "--max-new-tokens", 5)
    model = vlm.load(checkpoint)
    said = model.generate(asked, [image], [video], max_frames=2, max_new_tokens=5)
    assert capsys.readouterr().out.strip() == printable(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "no.png", "--prompt", "What?"], "no.png does not open: "),
        (["--image", "IMAGE", "--prompt", "<image><image>?"], "the prompt has 2 <image>, but 1 images were given"),
        (["--video", "no.mp4", "--prompt", "What?"], "video no.mp4 does not open: "),
        (["--video", "VIDEO", "--prompt", "<video><video>?"], "the prompt has 2 <video>, but 1 videos were given"),
        (["--video", "VIDEO", "--prompt", "What?", "--max-frames", "0"], "--max-frames 0: at least 1 is needed"),
        (["--prompt", "What?", "--temperature", "-1"], "temperature=-1.0: 0 (greedy) or more is needed"),
        (["--prompt", "What?", "--max-new-tokens", "0"], "max_new_tokens=0: at least 1 is needed"),
    ],
)
def test_generate_refuses_clearly(checkpoint: Path, image: Path, words: list[str], message: str):
    video = write_video(image.with_name("a.mp4"), 3)
    with pytest.raises(SystemExit) as stopped:
        ask(checkpoint, *[{"IMAGE": str(image), "VIDEO": str(video)}.get(word, word) for word in words])
    assert str(stopped.value.code).startswith("vlm generate: ")
    assert message in str(stopped.value.code)


def test_generate_hints_at_the_complete_model_of_a_run(tmp_path: Path, image: Path):
    with pytest.raises(SystemExit) as stopped:
        ask(tmp_path, "--prompt", "What?", "--image", image)
    assert str(stopped.value.code) == (
        f"vlm generate: {tmp_path} has no config.json; the complete model of a run is in its folder `final`"
    )


def test_generate_refuses_what_is_no_checkpoint_of_ours(parts: Parts):
    other = parts.language_model("llama")
    for name, message in (("./no", "./no: no such folder"), (other, f"{other}: model_type=llama")):
        with pytest.raises(SystemExit) as stopped:
            ask(name, "--prompt", "What?")
        assert str(stopped.value.code).startswith(f"vlm generate: {message}")


def test_a_connector_class_that_travels_is_used_where_it_is_trusted(
    parts: Parts, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "travels.py").write_text(OWN_CONNECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "cache")])
    model, processor = parts.model("clip", "llama", template="chatml", connector="travels:Mine")
    model.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    del CONNECTORS["travels:Mine"]  # as in a process that has not built it
    words = [tmp_path / "final", "--image", image, "--prompt", "What?", "--max-new-tokens", 3, "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        ask(*words)
    assert "model.connector.type=travels:Mine: allowed are identity, linear, mlp" in str(stopped.value.code)
    ask(*words, "--trust-remote-code")
    expected = VisionLanguageModel(model, processor).generate("What?", [image], max_new_tokens=3)
    assert capsys.readouterr().out.strip() == printable(expected)
    del CONNECTORS["travels:Mine"]
