"""Malformed requests to the endpoint: refused in OpenAI's form, never with a plain 500, and it goes on answering."""

import http.client
import json
import socket
from typing import Any

import pytest

from tests.attack.malformed import Malformed, malformed_requests
from tests.inference.serving.fake_engine import FakeEngine
from tests.inference.serving.running import CHAT, listen, make_body, make_client, make_endpoint
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts
from vlm.config.serving_schema import ServingConfig
from vlm.inference.engine.engine import Engine
from vlm.inference.generate import VisionLanguageModel

EVERY = 40
"""Of the many replaced values, the short form takes each so many."""


@pytest.fixture(scope="module")
def model(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


def check_answer(request: Malformed, status: int, content: bytes) -> None:
    """An answer is a success, or a refusal in OpenAI's form."""
    assert status < 500, (request.label, status, content)
    if status >= 400 and request.method != "HEAD":
        error: dict[str, Any] = json.loads(content)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, request.label
        assert error["message"], request.label
        assert len(error["message"]) < 600, request.label
        assert error["type"] == "invalid_request_error", request.label


def test_malformed_requests_are_refused_in_form(model: VisionLanguageModel):
    requests = malformed_requests()
    plain = [request for request in requests if not request.label.startswith("(")]
    chosen = [*plain, *[request for request in requests if request.label.startswith("(")][::EVERY]]
    refused = 0
    with make_client(make_endpoint(FakeEngine(model))) as client:
        for request in chosen:
            answer = client.request(request.method, request.path, content=request.body, headers=request.headers)
            check_answer(request, answer.status_code, answer.content)
            refused += answer.status_code >= 400
        assert client.post(CHAT, json=make_body()).status_code == 200
    assert refused > 100


@pytest.mark.attack
def test_no_malformed_request_ends_a_connection_or_the_server(model: VisionLanguageModel):
    """Over one connection after the other, each of which is used as long as the server keeps it open."""
    config = ServingConfig()
    requests = malformed_requests()
    assert len(requests) > 1000
    refused = 0
    with listen(make_endpoint(Engine(model)), config) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for request in requests:
            connection.request(request.method, request.path, request.body, {"Host": "127.0.0.1", **request.headers})
            answer = connection.getresponse()
            check_answer(request, answer.status, answer.read())
            refused += answer.status >= 400
        for path in ("/health", "/v1/models", "/metrics"):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200
            answer.read()
        connection.request("POST", CHAT, json.dumps(make_body()), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["choices"]
    assert refused > 300


RAW: dict[str, bytes] = {
    "no HTTP": b"hello\r\n\r\n",
    "binary": bytes(range(256)) * 4,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "no version": b"GET /health\r\n\r\n",
    "old": b"GET /health HTTP/0.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: b\r\n\r\n",
    "long header": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: a\r\n" * 20_000 + b"\r\n",
    "folded": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nA: a\r\n b\r\n\r\n",
    "negative length": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    b"Content-Length: 6\r\n\r\n",
    "length in words": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: five\r\n\r\n",
    "huge length": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 99999999999999\r\n\r\n",
    "bad chunk": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "unknown coding": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    "smuggled": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n",
    "upgrade": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
}
"""Bytes that are no request, or two."""


@pytest.mark.attack
def test_bytes_that_are_no_request_are_answered_and_the_connection_is_closed(model: VisionLanguageModel):
    config = ServingConfig(header_seconds=1, body_seconds=1, idle_seconds=1)
    with listen(make_endpoint(FakeEngine(model), body_seconds=1), config) as port:
        for label, content in RAW.items():
            with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
                client.sendall(content)
                answer = b""
                while piece := client.recv(65536):
                    answer += piece
            assert answer.startswith(b"HTTP/1.1 "), label
            assert int(answer.split()[1]) < 500, (label, answer)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
