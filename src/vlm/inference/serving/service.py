"""What all paths of an endpoint share: limits, places, threads, counters, and how a request becomes an answer."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.admission import Admission, WorkerThreads, run_while_client_stays
from vlm.inference.serving.answers import to_event
from vlm.inference.serving.body import Body, BodyReader, ClientLeft, parse_json
from vlm.inference.serving.errors import RequestError, internal_error
from vlm.inference.serving.metrics import Metrics

logger = logging.getLogger(__name__)

Respond = Callable[["Call"], Awaitable[dict[str, object] | AsyncGenerator[bytes]]]
"""Answers a request: an object, or events of a stream, the first of which is there once the answer has begun."""


@dataclass
class Service:
    """One model that is served, and what bounds its requests.

    Attributes:
        name: what requests call the model.
        config: the limits.
        created: when it was loaded, in seconds since 1970.
        bodies: reads bodies.
        admission: counts answers.
        threads: run what would hold up the event loop.
        metrics: counters.
    """

    name: str
    config: ServingConfig
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.bodies = BodyReader(self.config)
        self.admission = Admission(self.config)
        self.threads = WorkerThreads(self.config.preparation_threads)
        self.metrics = Metrics()
        self.metrics.add_gauge("vlm_places_taken", "Answers written or waiting", lambda: self.admission.num_taken)
        self.metrics.add_gauge("vlm_prepared_bytes", "Bytes of inputs", lambda: self.admission.prepared_bytes)
        self.metrics.add_gauge("vlm_body_bytes", "Bytes of bodies in memory", lambda: self.bodies.pending_bytes)

    def limit_characters(self, positions: int) -> None:
        """Lower the limit of characters to what a model of so many positions may have use of."""
        limit = min(self.config.max_characters, self.config.max_characters_per_position * positions)
        self.config = replace(self.config, max_characters=limit)

    def check_model(self, name: object) -> None:
        """Refuse the name of another model."""
        if name != self.name:
            message = f"model: {str(name)[:100]!r} is not served here, only {self.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")


@dataclass
class Call:
    """A request that is being answered.

    Attributes:
        service: the endpoint's.
        body: its bytes, until the prompt has been made of them: what they become takes many times as much memory.
        begun: when its body was there, by the monotonic clock.
    """

    service: Service
    body: Body
    begun: float

    def parse(self) -> dict[str, object]:
        """Return the body's JSON. CPU work: call it in a worker thread, and do not keep the result beyond it.

        Raises:
            RequestError: it is no JSON object.
        """
        return parse_json(self.body.content, self.service.config.max_characters)

    def release(self) -> None:
        """Forget the body, and let others have its place."""
        self.body.release()


class JsonEndpoint:
    """An ASGI application for one path: reads JSON, and sends what `respond` returns, or a refusal.

    Args:
        service: the endpoint's.
        respond: answers a request.
    """

    def __init__(self, service: Service, respond: Respond):
        self.service, self.respond = service, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        service = self.service
        started = asyncio.Event()

        async def send_noting(message: Message) -> None:
            """Note that the answer has started, and send the message."""
            started.set()
            await send(message)

        try:
            body = await service.bodies.read(Headers(scope=scope), receive)
            try:
                with service.admission.places(1):
                    answer = self._answer(body, send_noting)
                    await run_while_client_stays(receive, answer, service.config.request_seconds)
            finally:
                body.release()
        except ClientLeft:
            service.metrics.clients_left.inc()
        except RequestError as error:
            await refuse(error, send, started.is_set())
        except Exception:
            logger.exception("%s failed", scope["path"])
            await refuse(internal_error(), send, started.is_set())

    async def _answer(self, body: Body, send: Send) -> None:
        answer = await self.respond(Call(self.service, body, time.monotonic()))
        if isinstance(answer, dict):
            await send_json(send, answer)
        else:
            async with aclosing(answer):
                await send_events(send, answer)


async def refuse(error: RequestError, send: Send, is_started: bool) -> None:
    """Send a refusal; within a stream as its last event."""
    if not is_started:
        await send_json(send, error.to_dict(), error.status, error.headers)
        return
    await send({"type": "http.response.body", "body": to_event(error.to_dict())})


async def send_json(
    send: Send, value: dict[str, object], status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """Send an object."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    await send_bytes(send, content, "application/json", status, headers)


async def send_bytes(
    send: Send, content: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """Send a body of some type."""
    raw = {"content-type": kind, "content-length": str(len(content)), **(headers or {})}
    encoded = [(name.lower().encode(), value.encode()) for name, value in raw.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


async def send_events(send: Send, events: AsyncGenerator[bytes]) -> None:
    """Send a stream of events; the status goes out with the first, so that an early failure has its own."""
    first = await anext(events)
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    push = partial(_send_event, send)
    await push(first)
    async for event in events:
        await push(event)
    await send({"type": "http.response.body", "body": b""})


async def _send_event(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})
