"""Malformed requests: each value of a whole request replaced, bodies that are no request, and headers that lie."""

import copy
import functools
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.inference.serving.running import NAME, to_part
from tests.tiny_parts import picture

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Malformed:
    """A request that may be refused, and must not fail.

    Attributes:
        label: what is wrong with it.
        body: its bytes.
        headers: its headers, besides those that every request has.
        method: its method.
        path: its path.
    """

    label: str
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    method: str = "POST"
    path: str = "/v1/chat/completions"


def make_whole_request(image: dict[str, Any]) -> dict[str, Any]:
    """A request in which every field that an answer of text has stands somewhere."""
    return {
        "model": NAME, "max_completion_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 1,
        "stream": False, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": True, "top_logprobs": 1,
        "logit_bias": {"5": 1}, "user": "me", "metadata": {"a": "b"}, "store": False,
        "response_format": {"type": "text"}, "modalities": ["text"],
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a thing", "refusal": None},
            {"role": "user", "content": [{"type": "text", "text": "and?"}]},
        ],
    }  # fmt: skip


WRONG_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e-300, 1e300, 2**31, 2**63, 2**70, 10**90, "", "a", "\x00", "a" * 5000, "ſ\u202e🙂",
    [], [None], [[]], {}, {"type": None}, {"a": {"b": {"c": []}}}, ["a"] * 50,
)  # fmt: skip
NESTED = functools.reduce(lambda inner, _: [inner], range(40), None)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of a request, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def replaced_values() -> Iterator[Malformed]:
    """Each value of the whole request, left out, replaced, or beside a field that is not known."""
    whole = make_whole_request(to_part(picture(0)))
    for path in places(whole):
        for number, wrong in enumerate(("left out", "unknown", NESTED, *WRONG_VALUES)):
            body = copy.deepcopy(whole)
            owner = functools.reduce(operator.getitem, path[:-1], body)
            if number == 0:
                del owner[path[-1]]
            elif number == 1 and isinstance(owner, dict):
                owner["unknown"] = 1
            else:
                owner[path[-1]] = wrong
            yield Malformed(f"{path}: {wrong!r:.60}", json.dumps(body).encode())


def wrong_images() -> Iterator[Malformed]:
    """Images that are none, or of a strange form."""
    png = to_part(picture(0))["image_url"]["url"]
    head, _, content = png.partition(",")
    urls = {
        "cut": png[: len(png) // 2], "no base64": f"{head},@@", "no data": f"{head},", "one letter": f"{head},A",
        "blank": f"{head}, {content}", "twice": f"{png},{content}", "no head": content, "web": "https://127.0.0.1/a.png",
        "file": "file:///etc/passwd", "path": "../../etc/passwd", "text": "data:text/html;base64,PGI+",
        "unicode": png + "ä", "svg": "data:image/svg+xml;base64,PHN2Zz4=", "zeros": f"{head},{'A' * 4000}",
        "upper": png.upper(),
        "wide": to_part(picture(0, (9000, 1)))["image_url"]["url"],
        "high": to_part(picture(0, (1, 9000)))["image_url"]["url"],
    }  # fmt: skip
    for label, url in urls.items():
        body = make_whole_request({"type": "image_url", "image_url": {"url": url}})
        yield Malformed(f"image: {label}", json.dumps(body).encode())


def wrong_bodies() -> Iterator[Malformed]:
    """Bodies that are no JSON, or JSON that is no request."""
    whole = json.dumps(make_whole_request(to_part(picture(0)))).encode()
    bodies = {
        "empty": b"", "blank": b" ", "zero": b"\x00", "list": b"[]", "number": b"1", "null": b"null", "text": b'"a"',
        "cut": whole[: len(whole) // 2], "twice": whole * 2, "nan": b'{"temperature": NaN}',
        "infinite": b'{"n": Infinity}',
        "huge number": b'{"seed": ' + b"9" * 100_000 + b"}", "huge float": b'{"temperature": 1e99999}',
        "duplicate": b'{"model": "a", "model": "b"}', "surrogate": b'{"model": "\\ud800"}',
        "surrogate key": b'{"\\udfff": 1}', "utf-8": b'{"model": "\xff\xfe"}',
        "utf-16": '{"model": "a"}'.encode("utf-16"),
        "utf-32": '{"model": "a"}'.encode("utf-32"), "bom": b"\xef\xbb\xbf{}", "lists": b"[" * 200_000,
        "objects": b'{"a":' * 100_000, "closed": b"[" * 100_000 + b"]" * 100_000, "comma": b'{"model": "a",}',
        "quotes": b"{'model': 'a'}", "comment": b'{"model": "a"} // a', "yaml": b"model: a", "form": b"model=a&n=1",
        "many values": b'{"messages": [' + b"{}," * 300_000 + b"{}]}",
        "many keys": b"{" + b",".join(b'"%d":1' % number for number in range(50_000)) + b"}",
        "many messages": json.dumps({"model": NAME, "messages": [{"role": "user", "content": "a"}] * 4001}).encode(),
        "deep schema": json.dumps({"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"$ref": "#"}}}},
        }).encode(),
    }  # fmt: skip
    for label, body in bodies.items():
        yield Malformed(f"body: {label}", body)


def wrong_headers() -> Iterator[Malformed]:
    """Headers, methods and paths that are not taken."""
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    for name, values in {
        "content-type": ("", "text/plain", "application/xml", "multipart/form-data", "application/json" * 50,
                         "application/json; charset=latin-1", "application/x-www-form-urlencoded"),
        "content-encoding": ("gzip", "br", "deflate, gzip", "nonsense"),
        "host": ("rebound.example", "[::1", "127.0.0.1:99999999", "a b"),
        "origin": ("http://other.example", "http://[", "null"),
        "sec-fetch-site": ("cross-site",),
        "accept": ("text/html", "nonsense"),
        "authorization": ("Bearer", "Basic YQ==", "x" * 1000),
        "x-request-id": ("a" * 3000,),
    }.items():  # fmt: skip
        for value in values:
            yield Malformed(f"{name}: {value[:40]}", body, {**JSON, name: value})
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW"):
        yield Malformed(f"method {method}", body, method=method)
    for path in ("/", "/v1", "/v1/", "/v1/chat/completions/", "/v1/completions", "/v1/models/", "/v1/models/%ff",
                 "/%2e%2e", "/v1//chat", "/v1/responses", "/docs", "/openapi.json", "/" + "a" * 3000, "/v1/classify",
                 "/?a=%00"):  # fmt: skip
        yield Malformed(f"path {path[:40]}", body, path=path)
    path = "/v1/embeddings"
    for wrong in ({}, {"input": []}, {"input": ""}, {"input": [1, 2]}, {"input": ["a"] * 1000}, {"input": None},
                  {"input": "a", "dimensions": 5}, {"input": "a", "messages": []}, {"input": "a" * 3000},
                  {"input": "a", "encoding_format": "hex"}, {"messages": "a"}):  # fmt: skip
        yield Malformed(f"{path} {wrong!r:.60}", json.dumps({"model": NAME, **wrong}).encode(), path=path)


def malformed_requests() -> list[Malformed]:
    """All of them, the quick ones first."""
    return [*wrong_headers(), *wrong_bodies(), *wrong_images(), *replaced_values()]
