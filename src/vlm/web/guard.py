"""Decides which requests the page answers, and what a browser may load.

Gradio answers cross-site requests with headers that keep other sites from reading the answer, but by then a request may
have started a training run. This middleware refuses such requests before they reach Gradio.
"""

import ipaddress
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; frame-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)
"""Everything comes from the page's own address: no answer of a model makes a browser load from elsewhere."""

SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class RequestGuard:
    """ASGI middleware: refuses requests for other hosts and from other sites, and adds `SECURITY_HEADERS` to answers.

    Args:
        app: the guarded application.
        host: the address at which the page listens.
    """

    def __init__(self, app: "ASGIApp", host: str):
        self.app = app
        self.loopback_only = is_loopback(host)
        names = [host] if self.loopback_only else [host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()]
        self.names = set(names)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin, site = headers.get(b"host", ""), headers.get(b"origin"), headers.get(b"sec-fetch-site")
        reason = self.refusal_reason(host, origin, site, scope.get("method", "GET"))
        if reason is not None:
            return await _refuse(scope, send, reason)

        async def send_with_headers(message: "Message") -> None:
            """Send a message, security headers added to the response's."""
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        return await self.app(scope, receive, send_with_headers)

    def refusal_reason(self, host: str, origin: str | None, site: str | None, method: str) -> str | None:
        """Return why a request is refused; None where it is allowed.

        Args:
            host: the request's `Host`.
            origin: its `Origin`, which browsers send with all requests that another page makes.
            site: its `Sec-Fetch-Site`.
            method: its method.
        """
        try:
            name, origin_host = urlsplit(f"//{host}").hostname or "", urlsplit(origin or "").netloc
        except ValueError:  # a bracket without its pair
            return "The request's Host or Origin is malformed."
        if not self._is_allowed_name(name):
            return f"This address does not answer to the name {name[:80]!r}. Give it with --host."
        other_origin = origin is not None and origin_host != host
        if other_origin or (method not in ("GET", "HEAD") and site == "cross-site"):
            return "Requests from other sites are not answered."
        return None

    def _is_allowed_name(self, name: str) -> bool:
        """Return whether a name stands for this machine; a site's own name that leads here (DNS rebinding) does not."""
        if name in self.names or is_loopback(name):
            return True
        return not self.loopback_only and _is_address(name)


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(scope: "Scope", send: "Send", reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
