"""Decides which requests the page or the endpoint answers, and what a browser may load.

Gradio answers cross-site requests with headers that keep other sites from reading the answer, but by then a request may
have started a training run. This middleware refuses such requests, and those without a secret, before they reach the
application. It needs no Gradio.
"""

import ipaddress
import socket
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from vlm.web.access import LOGIN_PATH, MAX_LOGIN_BYTES, NEEDS_SECRET, Access, login_page

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
    """ASGI middleware: refuses requests for other hosts, from other sites and without a secret; adds headers.

    Args:
        app: the guarded application.
        host: the address at which the application listens.
        access: the secrets that let a request in; None: whoever reaches the address is let in.
        open_paths: paths that are read (GET, HEAD) without a secret, such as `/health`.
        headers: what is added to each answer.
    """

    def __init__(
        self,
        app: "ASGIApp",
        host: str,
        access: Access | None = None,
        open_paths: Collection[str] = (),
        headers: Sequence[tuple[bytes, bytes]] = SECURITY_HEADERS,
    ):
        self.app, self.access, self.open_paths, self.headers = app, access, frozenset(open_paths), list(headers)
        self.loopback_only = is_loopback(host)
        names = [host] if self.loopback_only else [host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()]
        self.names = set(names)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on, let its sender in, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin, site = headers.get(b"host", ""), headers.get(b"origin"), headers.get(b"sec-fetch-site")
        method = scope.get("method", "GET")

        async def send_with_headers(message: "Message") -> None:
            """Send a message, security headers added to the response's."""
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        if (reason := self.refusal_reason(host, origin, site, method)) is not None:
            return await self.refuse(scope, send_with_headers, 403, reason)
        port = _port(host)
        is_open = scope["path"] in self.open_paths and method in ("GET", "HEAD")
        if self.access is None or is_open or self.access.admits(headers, port):
            return await self.app(scope, receive, send_with_headers)
        if scope["type"] == "http" and method in ("GET", "HEAD"):
            query = parse_qsl(scope.get("query_string", b"").decode("latin-1"))
            if any(name == "token" and self.access.is_token(value) for name, value in query):
                rest = urlencode([pair for pair in query if pair[0] != "token"])
                path = f"/{quote(scope['path'].lstrip('/'))}"  # never `//host`
                return await self._let_in(scope, send_with_headers, port, f"{path}?{rest}" if rest else path)
        if scope["type"] == "http" and method == "POST" and scope["path"] == LOGIN_PATH:
            return await self._log_in(scope, receive, send_with_headers, port)
        return await self.refuse(scope, send_with_headers, 401, NEEDS_SECRET)

    async def refuse(self, scope: "Scope", send: "Send", status: int, reason: str) -> None:
        """Answer a request that is refused; with status 401 the answer is a page that asks for the secret."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason[:100]})
        elif status == 401:
            await _answer(send, status, login_page(reason), "text/html")
        else:
            await _answer(send, status, reason.encode(), "text/plain")

    async def _log_in(self, scope: "Scope", receive: "Receive", send: "Send", port: str) -> None:
        """Answer the form of the login page."""
        assert self.access is not None
        body = await _read_body(receive, MAX_LOGIN_BYTES)
        accepted = False if body is None else await self.access.is_secret(body)
        if accepted:
            return await self._let_in(scope, send, port, "/")
        reason = (
            "Too many people are logging in. Try again later."
            if accepted is None
            else f"That was wrong. {NEEDS_SECRET}"
        )
        return await self.refuse(scope, send, 429 if accepted is None else 401, reason)

    async def _let_in(self, scope: "Scope", send: "Send", port: str, location: str) -> None:
        """Give a browser the cookie, and send it to an address without a secret."""
        assert self.access is not None
        cookie = self.access.set_cookie_header(port, is_encrypted=scope.get("scheme") == "https")
        await _answer(send, 303, b"", "text/plain", [cookie, (b"location", location.encode("latin-1"))])

    def refusal_reason(self, host: str, origin: str | None, site: str | None, method: str) -> str | None:
        """Return why a request is refused; None if it is allowed.

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
            return f"The page is not served under the name {name[:80]!r}. To allow that name, give it with --host."
        other_origin = origin is not None and origin_host != host
        if other_origin or (method not in ("GET", "HEAD") and site == "cross-site"):
            return "Requests from other sites are rejected."
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


def _port(host: str) -> str:
    """Return the port in a request's `Host`, as the browser sees it; empty if there is none."""
    return "".join(filter(str.isdigit, host.rpartition("]")[2].partition(":")[2]))


async def _read_body(receive: "Receive", limit: int) -> bytes | None:
    """Return a request's body; None if it is longer than the limit, or breaks off."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > limit:
            return None
        if not message.get("more_body"):
            return body


async def _answer(
    send: "Send", status: int, body: bytes, kind: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    own = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode())]
    no_store = (b"cache-control", b"no-store")
    await send({"type": "http.response.start", "status": status, "headers": [*own, no_store, *headers]})
    await send({"type": "http.response.body", "body": body})
