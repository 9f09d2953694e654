"""Connections: slow, half open, too many, or without a reader; each is closed, and others are answered meanwhile."""

import http.client
import json
import socket
from contextlib import closing
from threading import Event
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tests.inference.serving.running import listen
from tests.waiting import HANG
from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.server import OTHER_FILES, allow_connections, bind

QUICK = ServingConfig(header_seconds=0.2, body_seconds=0.2, idle_seconds=1, max_connections=4)
SIZE = 64 * 2**20
flooded = Event()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers `/flood` with more than a connection holds, and everything else with a word."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(SIZE // 2**16 if scope["path"] == "/flood" else 0):
        await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": b"word"})
    if scope["path"] == "/flood":
        flooded.set()


@pytest.fixture(scope="module")
def port() -> Any:
    with listen(app, QUICK) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=120)


def read_all(connection: socket.socket) -> bytes:
    content = b""
    while piece := connection.recv(2**16):
        content += piece
    return content


def get(port: int) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("GET", "/")
        return connection.getresponse().read()


def error_of(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nA: "])
def test_headers_that_do_not_arrive_are_not_waited_for(port: int, sent: bytes):
    with connect(port) as connection:
        connection.sendall(sent)
        assert get(port) == b"word"
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert error_of(answer)["code"] == "request_timeout"


def test_headers_of_a_second_request_are_not_waited_for_either(port: int):
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(request)
        answer = b""
        while b"word" not in answer:
            answer += connection.recv(2**16)
        connection.sendall(request[:10])
        assert b"408" in read_all(connection)
    with connect(port) as connection:  # an idle connection ends without a word
        connection.sendall(request)
        assert read_all(connection).count(b"HTTP/1.1") == 1


def test_connections_have_a_limit(port: int):
    first = [connect(port) for _ in range(QUICK.max_connections)]
    try:
        answer = read_all(first[-1])  # whether refused or timed out, each is closed with its reason
        assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 "))
        with connect(port) as beyond:
            assert b"HTTP/1.1" in read_all(beyond)
    finally:
        for connection in first:
            connection.close()
    assert get(port) == b"word"


def test_what_is_no_http_is_refused_in_form(port: int):
    with connect(port) as connection:
        connection.sendall(b"hello\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert error_of(answer)["code"] == "invalid_http"


def test_a_client_that_does_not_read_is_cut_off(port: int):
    """The application's last `send` returns only once the connection is gone: it holds far less than was sent."""
    flooded.clear()
    with connect(port) as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
        assert flooded.wait(HANG)
    assert get(port) == b"word"


def test_an_address_that_is_taken_is_refused_before_the_model_loads():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ValueError, match="cannot listen there"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="cannot listen there"):
        bind("no.such.host.invalid", 8000)


def test_a_body_in_tiny_pieces_is_refused(port: int):
    """Each chunk takes time on the event loop, for however few bytes."""
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(head + b"1\r\n \r\n" * 5000)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 400 ") == 1
    assert get(port) == b"word"


@pytest.mark.parametrize(("limit", "allowed"), [((400, 500), (4, 500)), ((100, 130), (2, 130)), ((400, 400), (4, 400))])
def test_connections_are_as_many_as_files_may_be_open(
    monkeypatch: pytest.MonkeyPatch, limit: tuple[int, int], allowed: tuple[int, int]
):
    found = [limit]
    monkeypatch.setattr("resource.getrlimit", lambda _: found[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, value: found.append(value))
    assert allow_connections(4) == allowed[0]
    assert found[-1][0] >= min(allowed[0] + OTHER_FILES, allowed[1])
