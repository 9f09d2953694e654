"""Clients that put an endpoint under load: good ones, who time their answers, and hostile ones."""

import asyncio
import base64
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.inference.serving.running import CHAT, make_body, to_part
from tests.tiny_parts import picture

BACK_PRESSURE = (429, 503)
"""Statuses with which an endpoint asks a client to come later: documented, and no fault."""
PAUSE = 0.05
"""Seconds between two attacks of a client: the endpoint is to be tested, not the machine's network."""


@dataclass
class Load:
    """What clients met.

    Attributes:
        port: where the endpoint listens.
        end: when the clients stop, by the monotonic clock.
        seconds: of each answer that a good client got.
        health_seconds: of each answer of `/health`.
        statuses: kind of client and status -> how often.
        faults: what must not happen.
    """

    port: int
    end: float
    seconds: list[float] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Reply:
    """What came back: the status, 0 where the connection ended before it, and all that followed."""

    status: int
    content: bytes


def make_request(body: bytes, length: int | None = None, path: str = CHAT) -> bytes:
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def parse_reply(raw: bytes) -> Reply:
    head, _, content = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Reply(int(words[1]) if len(words) > 1 else 0, content)


async def exchange(port: int, request: bytes) -> Reply:
    """Send a request and read to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        with suppress(ConnectionError):  # refused before all of it was sent: the reply may be there
            await writer.drain()
        raw = b""
        with suppress(ConnectionError):
            raw = await reader.read(-1)
        return parse_reply(raw)
    finally:
        writer.close()


# Good clients


def make_good_requests() -> list[bytes]:
    """Questions with and without images, whole and streamed."""
    image = to_part(picture(0))
    contents: list[Any] = ["what?", [image, {"type": "text", "text": "what is this?"}], "a longer question, " * 5]
    bodies = [
        make_body(messages=[{"role": "user", "content": content}], max_tokens=tokens, stream=stream)
        for content in contents for tokens in (8, 16) for stream in (False, True)
    ]  # fmt: skip
    return [make_request(json.dumps(body).encode()) for body in bodies]


async def ask_on(load: Load, seed: int) -> None:
    """Ask one question after the other until the load is over; wait a little where the endpoint asks for it."""
    draw = random.Random(seed)
    requests = make_good_requests()
    while not load.is_over:
        begun = time.monotonic()
        reply = await exchange(load.port, draw.choice(requests))
        load.statuses["good", reply.status] += 1
        if reply.status == 200:
            load.seconds.append(time.monotonic() - begun)
            is_whole = b'"finish_reason": "' in reply.content or b"data: [DONE]" in reply.content
            if not is_whole or b'"error"' in reply.content:
                load.faults.append(f"an answer is not whole: {reply.content[-200:]!r}")
        elif reply.status in BACK_PRESSURE:
            await asyncio.sleep(0.2)
        else:
            load.faults.append(f"a good request got {reply.status}: {reply.content[:200]!r}")


async def watch_health(load: Load) -> None:
    """Ask for `/health` throughout."""
    while not load.is_over:
        begun = time.monotonic()
        reply = await exchange(load.port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        load.health_seconds.append(time.monotonic() - begun)
        if reply.status != 200:
            load.faults.append(f"/health got {reply.status}")
        await asyncio.sleep(0.1)


# Hostile clients


async def leave_within_stream(load: Load, draw: random.Random) -> int:
    """Leave at the first bytes of a long answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    writer.write(make_request(json.dumps(make_body(stream=True, max_tokens=400)).encode()))
    raw = await reader.read(200)
    writer.transport.abort()
    return parse_reply(raw).status


async def leave_before_answer(load: Load, draw: random.Random) -> int:
    """Leave without waiting for an answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", load.port)
    writer.write(make_request(json.dumps(make_body(max_tokens=400)).encode()))
    await writer.drain()
    await asyncio.sleep(draw.random() * PAUSE)
    writer.transport.abort()
    return 0


async def send_slowly(load: Load, draw: random.Random) -> int:
    """Send a body byte by byte until the endpoint has enough of it, or the load is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    reading = asyncio.create_task(reader.read(-1))
    request = make_request(json.dumps(make_body()).encode(), length=10_000)
    try:
        for byte in request:
            if reading.done() or load.is_over:
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(PAUSE)
        return parse_reply(reading.result()).status if reading.done() else 0
    finally:
        reading.cancel()
        writer.transport.abort()


async def say_nothing(load: Load, draw: random.Random) -> int:
    """Keep a connection without a request, or with half of its headers, for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    writer.write(draw.choice([b"", b"POST /v1/chat/comp", b"POST / HTTP/1.1\r\nHost: 127"]))
    try:
        async with asyncio.timeout(2.0):
            return parse_reply(await reader.read(-1)).status
    except TimeoutError:
        return 0
    finally:
        writer.transport.abort()


async def read_nothing(load: Load, draw: random.Random) -> int:
    """Ask for a stream and do not read it."""
    _, writer = await asyncio.open_connection("127.0.0.1", load.port, limit=1)
    writer.write(make_request(json.dumps(make_body(stream=True, max_tokens=400, logprobs=True)).encode()))
    await asyncio.sleep(1.0)
    writer.transport.abort()
    return 0


async def send_malformed(load: Load, draw: random.Random) -> int:
    """Send a request of which some bytes are others."""
    body = bytearray(json.dumps(make_body(max_tokens=4)).encode())
    for _ in range(draw.randint(1, 6)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return (await exchange(load.port, make_request(bytes(body)))).status


async def send_giant(load: Load, draw: random.Random) -> int:
    """Announce, or send, more than a request may have."""
    if draw.random() < 0.5:
        return (await exchange(load.port, make_request(b"{" * 1000, length=2**40))).status
    return (await exchange(load.port, make_request(json.dumps(make_body(x="a" * 3_000_000)).encode()))).status


def make_bomb() -> dict[str, Any]:
    """A PNG of a few kilobytes that says it has 400 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    side = (20_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    raw = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")
    part = to_part(picture(0))
    encoded = base64.b64encode(raw).decode()
    part["image_url"]["url"] = f"data:image/png;base64,{encoded}"
    return part


async def send_hostile_values(load: Load, draw: random.Random) -> int:
    """Send images that are bombs, and values without measure."""
    body = draw.choice([
        make_body(messages=[{"role": "user", "content": [make_bomb()]}]),
        make_body(max_tokens=2**20),
        make_body(messages=[{"role": "user", "content": "x"}] * 4001),
        make_body(messages=[{"role": "user", "content": "</think> " * 20_000}]),
        make_body(stop=["x" * 100_000]),
        make_body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "string", "pattern": "(a{1,1000}){1,1000}"}}}, max_tokens=2),
    ])  # fmt: skip
    return (await exchange(load.port, make_request(json.dumps(body).encode()))).status


HOSTILE: tuple[Callable[[Load, random.Random], Awaitable[int]], ...] = (
    leave_within_stream, leave_before_answer, send_slowly, say_nothing, read_nothing, send_malformed, send_giant,
    send_hostile_values,
)  # fmt: skip


async def attack_on(load: Load, seed: int) -> None:
    """Be hostile in one way until the load is over. A connection that the endpoint ends is no fault, status 500 is."""
    draw = random.Random(seed)
    attack = HOSTILE[seed % len(HOSTILE)]
    while not load.is_over:
        status = 0
        with suppress(ConnectionError):
            status = await attack(load, draw)
        load.statuses[attack.__name__, status] += 1
        if status >= 500 and status not in BACK_PRESSURE:
            load.faults.append(f"{attack.__name__} got {status}")
        await asyncio.sleep(PAUSE)


async def put_under_load(
    port: int, num_good: int, num_hostile: int, seconds: float,
    watchers: Sequence[Callable[[Load], Awaitable[None]]] = (),
) -> Load:  # fmt: skip
    """Run all clients at once for so many seconds, and return what they met."""
    load = Load(port, time.monotonic() + seconds)
    good = (ask_on(load, seed) for seed in range(num_good))
    hostile = (attack_on(load, seed) for seed in range(num_hostile))
    await asyncio.gather(watch_health(load), *good, *hostile, *(watch(load) for watch in watchers))
    return load
