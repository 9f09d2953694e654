"""What stands before every path: names and other sites, the API key, and counting.

Each is a plain ASGI middleware: none of them reads a body, and none holds one.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.inference.serving.errors import RequestError
from vlm.inference.serving.metrics import Metrics
from vlm.inference.serving.service import refuse

RefusalReason = Callable[[str, str | None, str | None, str], str | None]
"""Returns why a request is refused by its Host, Origin, Sec-Fetch-Site and method; None if it is not."""

OPEN_PATHS = ("/health",)
"""Paths that need no key."""
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]


class SiteGate:
    """Refuses requests for other hosts, and those that pages of other sites make (403)."""

    def __init__(self, app: ASGIApp, reason: RefusalReason):
        self.app, self.reason = app, reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin, site = headers.get("origin"), headers.get("sec-fetch-site")
            if reason := self.reason(headers.get("host", ""), origin, site, scope["method"]):
                await refuse(RequestError(reason, status=403, code="forbidden"), send, False)
                return
        await self.app(scope, receive, send)


class KeyGate:
    """Refuses requests without the API key (401); the time that takes tells nothing about it."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.digest = app, hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
            if not hmac.compare_digest(digest, self.digest) or scheme.lower() != "bearer":
                said = "the API key is wrong" if given else "an API key is required: Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                error = RequestError(said, status=401, code="invalid_api_key", headers=headers)
                await refuse(error, send, False)
                return
        await self.app(scope, receive, send)


class CountingGate:
    """Counts requests by path and status, and adds `SECURITY_HEADERS`.

    Args:
        app: the application behind it.
        metrics: where they are counted.
        paths: the paths that are counted by name; others are `other`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it when it has been answered."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        begun, status = time.monotonic(), "none"

        async def send_counting(message: Message) -> None:
            """Note the status of the answer, add the security headers and send the message."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, send_counting)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - begun)
        return None
