"""What stands between the network and the page: who may ask, and what a browser may load.

Gradio answers cross-site requests with headers that keep other sites from reading the answer; a request that starts a
training has done so by then. So what other sites send is refused here, before it reaches Gradio.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; frame-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)
"""Everything comes from the page's own address: nothing that a model says makes a browser load from elsewhere."""

SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class RequestGuard:
    """ASGI middleware: refuses requests for other hosts and from other sites, and adds `HEADERS` to the answers.

    Args:
        app: what it guards.
        host: where the page listens.
    """

    def __init__(self, app: Any, host: str):
        self.app = app
        self.names = allowed_names(host)
        self.loopback_only = is_loopback(host)

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal_reason = self.refusal_reason(headers.get(b"host", ""), headers.get(b"origin"), headers.get(b"sec-fetch-site"),
                               scope.get("method", "GET"))  # fmt: skip
        if refusal_reason is not None:
            return await _refuse(scope, send, refusal_reason)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        return await self.app(scope, receive, with_headers)

    def refusal_reason(self, host: str, origin: str | None, site: str | None, method: str) -> str | None:
        """Why a request is refused; None: it is not.

        Args:
            host: its `Host`.
            origin: its `Origin`, which browsers send with whatever another page asks for.
            site: its `Sec-Fetch-Site`.
            method: its method.
        """
        name = urlsplit(f"//{host}").hostname or ""
        if not self.is_allowed_name(name):
            return f"This page does not answer to the name {name!r}. Give it with vlm web --host."
        if origin is not None and urlsplit(origin).netloc != host:
            return "Requests from other sites are not answered."
        if method not in ("GET", "HEAD") and site == "cross-site":
            return "Requests from other sites are not answered."
        return None

    def is_allowed_name(self, name: str) -> bool:
        """Whether a name stands for this machine: a site's own name that leads here (DNS rebinding) does not."""
        if name in self.names or is_loopback(name):
            return True
        return not self.loopback_only and _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def allowed_names(host: str) -> set[str]:
    """The names by which a page that listens there may be asked for."""
    return {host} if is_loopback(host) else {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(scope: Any, send: Any, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    text = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": text})
    await send({"type": "http.response.body", "body": reason.encode()})
