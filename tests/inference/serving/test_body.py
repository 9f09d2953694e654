"""Bodies: bytes, headers and JSON that are refused, each with its reason."""

import asyncio
import json
from typing import Any

import pytest

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.body import BodyReader, ClientLeft, parse_json
from vlm.inference.serving.errors import RequestError

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(("body", "words"), [
    (b"", "Expecting value"),
    (b"no JSON", "Expecting value"),
    (b"[1]", "a JSON object is needed"),
    (b'"text"', "a JSON object is needed"),
    (b"null", "got null"),
    (b'{"a": 1', "delimiter"),
    (b'{"a": 1}x', "Extra data"),
    (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    (b'{"a": 1e999}', "too large"),
    (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"),
    (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
    (b'{"\\udc00": 1}', "half of a surrogate pair"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    (b"\xef\xbb\xbf{}", "BOM"),
    ("{}".encode("utf-16"), "not UTF-8"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
    (b'{"a": ' + b'{"a":' * 500 + b"1" + b"}" * 501, "nested"),
    (b'{"a": [' + b"[]," * 200_000 + b"1]}", "more values"),
    (b'{"a": "line\nbreak"}', "control character"),
])  # fmt: skip
def test_what_is_no_json_request_is_refused_with_its_reason(body: bytes, words: str):
    with pytest.raises(RequestError) as refused:
        parse_json(body, 1000)
    assert words in refused.value.message
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_json_is_read_as_it_stands():
    value = {"a": [1, -2.5, None, True, "ö\u2028🙂"], "b": {"c": {}}, "d": 10**30}
    assert parse_json(json.dumps(value).encode(), 1000) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), 1000) == value


def read(headers: dict[str, str], messages: list[dict[str, Any]], **limits: Any) -> tuple[bytes, BodyReader]:
    """The body that a reader makes of messages; behind them nothing comes."""
    reader = BodyReader(ServingConfig(**limits))

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def play() -> bytes:
        body = await reader.read(headers, receive)  # pyright: ignore[reportArgumentType]
        content = bytes(body.content)
        body.release()
        return content

    try:
        return asyncio.run(play()), reader
    finally:
        assert reader.pending_bytes == 0


def chunk(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_body_is_counted_while_it_arrives():
    assert read(JSON, [chunk(b"{"), chunk(b"}", False)])[0] == b"{}"
    messages = [chunk(b"x" * 800), chunk(b"x" * 800), chunk(b"x" * 800, False), chunk(b"never read")]
    with pytest.raises(RequestError) as refused:
        read(JSON, messages, max_body_bytes=1024)
    assert refused.value.status == 413
    assert messages == [chunk(b"never read")]  # the rest was taken, so that the client reads the answer
    declared = {**JSON, "content-length": "5000"}
    with pytest.raises(RequestError, match="max_body_bytes"):
        read(declared, [chunk(b"x" * 5000, False)], max_body_bytes=1024)


def test_all_bodies_together_have_a_limit():
    with pytest.raises(RequestError) as refused:
        read(JSON, [chunk(b"x" * 1500), chunk(b"", False)], max_pending_bytes=1024)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert "Retry-After" in refused.value.headers


def test_a_body_that_does_not_arrive_is_not_waited_for():
    with pytest.raises(RequestError) as refused:
        read(JSON, [chunk(b"{")], body_seconds=0.01)
    assert refused.value.status == 408
    with pytest.raises(ClientLeft):
        read(JSON, [chunk(b"{"), {"type": "http.disconnect"}])


@pytest.mark.parametrize("headers", [
    {}, {"content-type": "text/plain"}, {"content-type": "application/jsonp"}, {"content-type": ""},
    {"content-type": "application/json; charset=utf-16"}, {**JSON, "content-encoding": "gzip"},
    {"content-type": "multipart/form-data; boundary=x"},
])  # fmt: skip
def test_other_bodies_are_refused_by_their_headers(headers: dict[str, str]):
    with pytest.raises(RequestError) as refused:
        read(headers, [chunk(b"{}", False)])
    assert refused.value.status == 415


def test_headers_of_json_are_taken_in_all_spellings():
    for kind in ("application/json", "Application/JSON", 'application/json; charset="UTF-8"'):
        assert read({"content-type": kind, "content-encoding": "identity"}, [chunk(b"{}", False)])[0] == b"{}"
