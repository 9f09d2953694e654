"""Listening: uvicorn, with connections that are slow, half open, or too many closed in time."""

import asyncio
import json
import resource
import socket
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.errors import RequestError

FREE_PIECES, LEAST_PIECE_BYTES = 1000, 1024
"""A body may have so many pieces of any size; beyond them the mean piece has so many bytes: each piece, such as a chunk
of one byte, takes as much time on the event loop."""
OTHER_FILES = 128
"""Open files besides connections."""
MAX_HEADER_BYTES = 32 * 2**10
"""The most bytes of a request's headers."""
SHUTDOWN_SECONDS = 30
"""How long answers go on that are being written when the server is told to end."""


class BoundedConnection(h11.Connection):
    """The state of a connection; refuses bodies that come in too many pieces."""

    _num_pieces = _num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return what arrived next.

        Raises:
            h11.RemoteProtocolError: it is no HTTP, or a body in too many pieces.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > FREE_PIECES + self._num_bytes // LEAST_PIECE_BYTES:
                raise h11.RemoteProtocolError("too many pieces")
        return event


def make_protocol(config: ServingConfig) -> type[H11Protocol]:
    """Return the class of connections that these limits hold for."""

    class LimitedProtocol(BoundedProtocol):
        """A connection with the limits of this server."""

        limits = config

    return LimitedProtocol


class BoundedProtocol(H11Protocol):
    """A connection that ends where headers do not arrive in time, or the client does not read.

    Bodies that do not arrive in time are `body.BodyReader`'s matter, answers that take too long `service`'s.

    Attributes:
        limits: the limits.
    """

    limits: ServingConfig
    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn = BoundedConnection(h11.SERVER, MAX_HEADER_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for headers; refuse a connection beyond the limit."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(RequestError("too many connections (serving.max_connections)", status=503, code="overloaded"))
        else:
            self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Read what arrived."""
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        """Begin to wait for the headers of the next request, where its first byte is there already."""
        super().on_response_complete()
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Give a client that does not read some time."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client reads again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(RequestError(msg, code="invalid_http"))

    def _watch_headers(self) -> None:
        """Have a timer exactly while headers are awaited; an idle connection between requests has uvicorn's own."""
        is_awaited = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if is_awaited and self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._end_half_open)
        elif not is_awaited and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_half_open(self) -> None:
        seconds = f"{self.limits.header_seconds:g} seconds"
        message = f"no request arrived within {seconds} (serving.header_seconds)"
        self._refuse(RequestError(message, status=408, code="request_timeout"))

    def _refuse(self, error: RequestError) -> None:
        """Send a refusal, unless an answer is being sent, and close the connection."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            content = json.dumps(error.to_dict()).encode()
            lines = [
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
                "Connection: close",
                *(f"{name}: {value}" for name, value in error.headers.items()),
            ]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + content)
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, IPv6 too; nothing listens on it yet.

    Raises:
        ValueError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({reason})") from error
    return bound


def allow_connections(number: int) -> int:
    """Let this process open so many connections; return how many it can: the system may allow fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(number, soft - OTHER_FILES))
    return number


def make_server(app: ASGIApp, config: ServingConfig, **options: object) -> uvicorn.Server:
    """Return the server of an application; `run(sockets=[bind(…)])` starts it."""
    config = replace(config, max_connections=allow_connections(config.max_connections))
    settings: dict[str, Any] = {
        "http": make_protocol(config),
        "ws": "none",
        "lifespan": "on",
        "log_level": "warning",
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": config.idle_seconds,
        "timeout_graceful_shutdown": SHUTDOWN_SECONDS,
        **options,
    }
    return uvicorn.Server(uvicorn.Config(app, **settings))
