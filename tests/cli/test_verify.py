"""The command line of `vlm verify`: what it refuses before it loads anything, what it prints, writes and returns."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.command_line import refusal
from tests.inference.verify.conftest import Served, make_served, read_here
from tests.tiny_parts import Parts
from vlm.assembly.encoders import image_size
from vlm.cli import verify as command
from vlm.cli.main import main
from vlm.cli.verify import ENGINES
from vlm.hub.certificates import CERTIFICATE_FILE, read_certificates
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.verify.engines import ENGINE_MODULES

__all__ = ["read_here"]

PAGE = (Path(__file__).parents[2] / "docs" / "verifying.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def served(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(parts, tmp_path_factory.mktemp("served"))


def words(served: Served, *more: str) -> list[str]:
    return ["verify", str(served.final), "--with", "transformers", "--answers", "4", "--max-new-tokens", "2", *more]


def test_every_engine_is_named():
    assert list(ENGINES) == list(ENGINE_MODULES)
    assert all(f"`{name}`" in PAGE for name in ENGINES)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("vlm verify")])
def test_the_pages_commands_are_understood(line: str):
    command.make_parser().parse_args(shlex.split(line)[2:])


def test_help_needs_no_torch():
    code = (
        "import sys, vlm.cli.main\n"
        "try: vlm.cli.main.main(['verify', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_llama_cpp_is_asked_about_images_of_the_encoders_size(served: Served):
    model = VisionLanguageModel.load(served.final, device="cpu")
    height, width = image_size(model.processor.image_processor)
    sizes = {}
    for engine in ("gguf", "onnx"):
        args = command.make_parser().parse_args([str(served.final), "--with", engine, "--answers", "4"])
        images = [image for case in command._questions(args, model) for image in case.images]
        sizes[engine] = {Image.open(BytesIO(image)).size for image in images}
    assert sizes["gguf"] == {(width, height)}
    assert len(sizes["onnx"]) > 1


@pytest.mark.usefixtures("read_here")
def test_what_is_served_as_trained(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "records.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}])
    )
    main(words(served, "--export", str(served.export), "--data", str(tmp_path / "records.json")))
    said = capsys.readouterr().out
    assert "5 of 5 greedy answers are equal" in said  # a record, and made questions beside it
    assert "serves what was trained" in said
    (certificate,) = read_certificates(served.final)
    assert certificate.difference is None
    assert str(tmp_path) not in (served.final / CERTIFICATE_FILE).read_text()


@pytest.mark.usefixtures("read_here")
def test_what_is_not(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(served.export, tmp_path / "broken")
    file = tmp_path / "broken" / "chat_template.jinja"
    file.write_text(file.read_text() + "!")
    output = tmp_path / "certificate.json"
    assert refusal(*words(served, "--export", str(tmp_path / "broken"), "--output", str(output))) == "1"
    assert "differs: ids differ from token" in capsys.readouterr().out
    assert json.loads(output.read_text())["transformers"]["difference"].startswith("ids differ")


def test_what_is_refused(served: Served, tmp_path: Path):
    for more, said in (
        (["--answers", "0"], "--answers 0: at least 1 is needed"),
        (["--url", "http://127.0.0.1:1"], "only vllm, sglang and gguf are asked over HTTP"),
        (["--export", "nowhere"], "--export nowhere: no such folder"),
        (["--format", "llava"], "need --data"),
        (["--data", "nowhere.json"], "--data nowhere.json: no such file"),
        (["--with", "vllm", "--url", "http://127.0.0.1:1", "--export", "x"], "give one of them"),
    ):
        assert said in refusal(*words(served, *more))
    (tmp_path / "base.json").write_text("{}")
    (tmp_path / "config.json").write_text((served.final / "config.json").read_text())
    assert "is an adapter on a base, which engines load merged" in refusal(
        "verify", str(tmp_path), "--with", "transformers"
    )
