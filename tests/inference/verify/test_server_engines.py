"""vLLM and SGLang: a server at an address, a server of an installed engine, or a check on paper."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.inference.verify.conftest import Served
from vlm.hub.certificates import Certificate
from vlm.inference.verify.cases import make_cases
from vlm.inference.verify.endpoint import Endpoint, as_data, messages_with_data
from vlm.inference.verify.engines import load_engine
from vlm.inference.verify.reference import Reference
from vlm.inference.verify.verify import Settings, verify

FAKE_VLLM = """
import http.server, json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert words["--model"] and words["--dtype"] == "float32" and words["--host"] == "127.0.0.1"
if "refuse" in words["--model"]:
    sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    def send(self, values):
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.send({"data": [{"id": words["--model"]}]})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send({"choices": [{"message": {"content": "?"}}], "usage": {"prompt_tokens": 1}})
    def log_message(self, *given):
        pass
http.server.HTTPServer(("127.0.0.1", int(words["--port"])), Handler).serve_forever()
"""


@contextmanager
def serving(answer: Callable[[dict[str, Any]], tuple[int, object]], models: object = None) -> Iterator[str]:
    """A server that gives a status and a JSON value for each chat; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def send(self, status: int, values: object) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": "tiny"}]} if models is None else models)

        def do_POST(self) -> None:
            self.send(*answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def log_message(self, *given: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(served: Served, engine: str, url: str) -> Certificate:
    return verify(served.final, served.model, load_engine(engine), make_cases(3), Settings(3, url=url))


def right_answer(served: Served, *, shift: int = 0, word: str = "") -> Callable[[dict[str, Any]], tuple[int, object]]:
    """What a server gives that serves what was trained; `shift` more prompt tokens, and `word` behind each answer."""
    reference = Reference(served.model)
    known = {json.dumps(messages_with_data(case)): case for case in make_cases(3)}

    def answer(body: dict[str, Any]) -> tuple[int, object]:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 3)
        case = known[json.dumps(body["messages"])]
        text = reference.answer(case, 3) + word
        number = reference.inputs(case)["input_ids"].shape[1] + shift
        return 200, {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": number}}

    return answer


def test_a_server_that_answers_as_training_does(served: Served):
    with serving(right_answer(served)) as url:
        certificate = ask(served, "vllm", f"{url}/v1/")
    assert certificate.difference is None
    assert [(stage.stage, stage.cases) for stage in certificate.stages] == [("number of prompt tokens", 3)]
    assert (certificate.equal_answers, certificate.answers, certificate.is_run) == (3, 3, True)
    assert "pixels, ids, logits and layers were not compared" in certificate.notes[0]


def test_a_server_with_other_prompts_or_answers(served: Served):
    with serving(right_answer(served, shift=1)) as url:
        assert "tokens instead of" in str(ask(served, "sglang", url).difference)
    with serving(right_answer(served, word=" and more")) as url:
        assert "3 of 3 answers differ: the answer is" in str(ask(served, "sglang", url).difference)


def test_servers_that_refuse_redirect_or_talk_nonsense():
    cases = make_cases(1)
    for status, values, said in (
        (400, {"error": "too long"}, "was refused with status 400: .*too long"),
        (307, {}, "was refused with status 307"),
        (200, {"choices": []}, "did not return a chat completion"),
        (200, [], "did not return a JSON object"),
    ):
        with (
            serving(lambda body, status=status, values=values: (status, values)) as url,
            pytest.raises(ValueError, match=said),
        ):
            Endpoint(url).observe(cases, 3)
    with serving(lambda body: (200, {}), models={"data": []}) as url, pytest.raises(ValueError, match="lists no model"):
        Endpoint(url)
    with pytest.raises(ValueError, match="does not answer"):
        Endpoint("http://127.0.0.1:9")
    for url in ("file:///etc/passwd", "127.0.0.1:8000", "ftp://a"):
        with pytest.raises(ValueError, match="must be an address such as http"):
            Endpoint(url)


def test_images_travel_in_the_request():
    case = make_cases(1)[0]
    (message,) = messages_with_data(case)
    assert [item["type"] for item in message["content"]] == ["image_url", "text"]
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert as_data(b"\xff\xd8\xff\xe0").startswith("data:image/jpeg;")
    text_only = make_cases(4)[3]
    assert isinstance(messages_with_data(text_only)[0]["content"], str)


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `vllm` whose server answers every chat with `?`."""
    folder = tmp_path / "site"
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for place in (folder / "vllm", folder / "vllm" / "entrypoints", package):
        (place / "__init__.py").write_text("")
    (package / "api_server.py").write_text(FAKE_VLLM)
    (folder / "vllm-9.8.dist-info").mkdir()
    (folder / "vllm-9.8.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.8\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_an_installed_engine_is_started_and_ended(served: Served, fake_vllm: Path):
    settings = Settings(3, export=served.export)
    certificate = verify(served.final, served.model, load_engine("vllm"), make_cases(2), settings)
    assert certificate.engine == "vLLM 9.8"
    assert str(certificate.difference).startswith("the prompt has 1 tokens instead of")
    assert (certificate.answers, certificate.equal_answers) == (2, 0)


def test_an_engine_that_does_not_start_says_why(served: Served, fake_vllm: Path, tmp_path: Path):
    (tmp_path / "refuse").symlink_to(served.export)
    settings = Settings(3, export=tmp_path / "refuse")
    with pytest.raises(ValueError, match="ended with code 1 before it answered: no such model"):
        verify(served.final, served.model, load_engine("vllm"), make_cases(1), settings)
