"""Reading a request: its body while it streams in, and JSON without what parsers disagree about."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from starlette.types import Receive

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.errors import RequestError, show

MAX_DEPTH = 64
"""The deepest nesting of a request; a JSON schema within a tool takes a few dozen levels."""
MAX_INTEGER_DIGITS = 100
"""Digits of an integer; more would take quadratic time to read, and no field takes them."""
MAX_VALUES = 100_000
"""Values of a request besides the characters of its texts: a few bytes of JSON take dozens of bytes in memory."""
DRAIN_SECONDS = 5.0
"""How long the rest of a body that is too large is read and dropped, so that the client reads why."""


class BodyReader:
    """Reads bodies of requests, and counts the bytes of all that are in memory.

    Args:
        config: the limits.
    """

    def __init__(self, config: ServingConfig):
        self.config = config
        self.pending_bytes = 0

    async def read(self, headers: Mapping[str, str], receive: Receive) -> "Body":
        """Return the body of a request; release it when it has been parsed.

        Raises:
            RequestError: it is too large (413), of another type (415), late (408), or there is no memory for it (503).
            ClientLeft: the client closed the connection.
        """
        check_content_headers(headers)
        limit = self.config.max_body_bytes
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            await drain(receive, limit)
            raise too_large(limit)
        body = Body(self)
        try:
            async with asyncio.timeout(self.config.body_seconds):
                await self._read_into(body, receive)
        except TimeoutError:
            body.release()
            seconds = f"{self.config.body_seconds:g} seconds"
            raise RequestError(
                f"the body did not arrive within {seconds} (serving.body_seconds)", status=408, code="request_timeout"
            ) from None
        except BaseException:
            body.release()
            raise
        return body

    async def _read_into(self, body: "Body", receive: Receive) -> None:
        limit = self.config.max_body_bytes
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if len(body.content) + len(chunk) > limit:
                body.release()
                await drain(receive, limit, more=more)
                raise too_large(limit)
            if self.pending_bytes + len(chunk) > self.config.max_pending_bytes:
                body.release()
                await drain(receive, limit, more=more)
                reason = "other requests use all the memory that is set aside for request bodies"
                raise RequestError(f"{reason} (serving.max_pending_bytes)", status=503, code="overloaded")
            body.content += chunk
            self.pending_bytes += len(chunk)


class Body:
    """The bytes of a request.

    Attributes:
        content: the bytes.
    """

    def __init__(self, reader: BodyReader):
        self.content = bytearray()
        self._reader = reader

    def release(self) -> None:
        """Forget the bytes; may be called again."""
        self._reader.pending_bytes -= len(self.content)
        self.content = bytearray()


class ClientLeft(Exception):
    """The client closed the connection: there is nobody to answer."""


def too_large(limit: int) -> RequestError:
    """Return the refusal of a body above the limit."""
    message = f"the body has more than {limit:,} bytes (serving.max_body_bytes); send smaller images, or fewer"
    return RequestError(message, status=413, code="request_too_large")


async def drain(receive: Receive, limit: int, *, more: bool = True) -> None:
    """Read and drop the rest of a body: a client that is cut off while it sends never reads the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            dropped = 0
            while more and dropped < 2 * limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                dropped += len(message.get("body", b""))
                more = message.get("more_body", False)


async def wait_until_client_leaves(receive: Receive) -> None:
    """Return when the client closes the connection; what it sends until then is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


def check_content_headers(headers: Mapping[str, str]) -> None:
    """Refuse a body that is not plain JSON, by its headers."""
    kind, _, options = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        given = show(kind.strip()) if kind else "none"
        raise RequestError(
            f"Content-Type: application/json is needed, got {given}", status=415, code="unsupported_media_type"
        )
    charset = options.lower().replace(" ", "").replace('"', "")
    if "charset=" in charset and "charset=utf-8" not in charset:
        raise RequestError("the body must be UTF-8", status=415, code="unsupported_media_type")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {show(encoding)}: compressed bodies are not supported"
        raise RequestError(message, status=415, code="unsupported_media_type")


def parse_json(content: bytes | bytearray, max_characters: int) -> dict[str, object]:
    """Return the JSON object of a body. CPU work: call it in a worker thread.

    Args:
        content: the body.
        max_characters: the most characters of texts, beside which there are at most `MAX_VALUES` values.

    Raises:
        RequestError: it is no JSON object in UTF-8, a key stands twice, or it has NaN, integers of hundreds of digits,
            halves of surrogate pairs, or deep nesting.
    """
    if sum(map(content.count, (b",", b"[", b"{", b":"))) > max_characters + MAX_VALUES:
        raise _malformed(f"it has more values than a request of {max_characters:,} characters needs")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _malformed(f"it is nested more than {MAX_DEPTH} deep") from None
    _check_nesting_and_texts(value)
    if not isinstance(value, dict):
        raise _malformed(f"a JSON object is needed, got {show(value)}")
    return value


def _malformed(reason: str) -> RequestError:
    return RequestError(f"the body is not a valid JSON request: {reason}", code="invalid_json")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _malformed(f"the key {show(twice)} stands twice in an object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not a JSON number")


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise _malformed(f"a number of {len(digits):,} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _malformed(f"the number {digits[:40]} is too large")
    return number


def _check_nesting_and_texts(value: object) -> None:
    """Refuse deep nesting, and texts that are no Unicode; level by level, so that no depth is too deep to look at."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                _check_unicode(item)
        if not below:
            return
        level = below
    raise _malformed(f"it is nested more than {MAX_DEPTH} deep")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise _malformed(f"{half} is half of a surrogate pair, which is no character") from None
