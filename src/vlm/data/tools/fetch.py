"""Fetching untrusted URLs: checked addresses, limits of time and size, retries, and a check that it is an image.

A table of URLs from the web may name anything, and so may every redirect, while the machine that reads it may be in a
private network. So a name is looked up once, all of its addresses must be public, and the connection goes to one of
them, while TLS and the header `Host` still carry the name. The environment's proxies
(`HTTPS_PROXY` and the like) are not used: a proxy looks names up itself, which would void the check; where
the network has no other way out, fetching fails. No cookies, no `.netrc`, and user names in URLs are not sent.

Imports httpx2, the transport it brings with it, Pillow and the standard library only.
"""

import errno
import ipaddress
import math
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any

import httpcore2
import httpx2
from PIL import Image, UnidentifiedImageError

HEADERS = (
    ("User-Agent", "Mozilla/5.0 (compatible; small-vlm; vlm data download)"),
    ("Accept", "image/jpeg,image/png,image/webp,image/gif;q=0.9,*/*;q=0.1"),
    ("Accept-Encoding", "identity"),  # images do not compress, and a compressed answer may be a bomb
)
MAX_REDIRECTS = 5
RETRYABLE_STATUSES = (408, 425, 429)
"""HTTP statuses that are retried, besides those of 500 and above."""
INITIAL_RETRY_WAIT = 1.0
MAX_RETRY_WAIT = 30.0
"""Seconds before the first retry (each one waits twice as long as the one before), and before any."""

SUFFIX_BY_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
"""Pillow's name of a format -> suffix of its files. An MPO is a JPEG with more after it, and opened as one."""

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]
"""An answer of `getaddrinfo`: family, type, protocol, canonical name, address."""


class FetchError(Exception):
    """A URL could not be fetched: has a reason, by which failures are counted, and a detail.

    If it is `retryable`, another try may succeed, after `wait` seconds if the server asks for that.
    """

    def __init__(self, reason: str, detail: str = "", *, retryable: bool = False, wait: float = 0.0):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail
        self.retryable, self.wait = retryable, wait


class FetchStopped(Exception):
    """Fetching was stopped."""


class Deadline:
    """The time limit of one try, which holds for slow servers as for silent ones; `stop` ends every try."""

    def __init__(self, stop: threading.Event):
        self.stop = stop
        self._deadline = 0.0

    def start(self, seconds: float) -> None:
        """Start a try with this time limit."""
        self._deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left; raise TimeoutError if none are, and FetchStopped if `stop` was set."""
        if self.stop.is_set():
            raise FetchStopped
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the time limit for one try was reached")
        return seconds


class Fetcher:
    """Fetches URLs one by one and keeps connections open; every thread needs its own fetcher.

    `timeout` are the seconds that one try may take, from the look-up of the name to the last byte, redirects included.
    `allow_private` allows addresses of private networks and of this machine; `ssl_context`, the trusted certificates,
    may be shared; when another thread sets `stop`, fetching ends with `FetchStopped`.
    """

    def __init__(
        self,
        *,
        timeout: float,
        retries: int,
        max_bytes: int,
        allow_private: bool,
        ssl_context: ssl.SSLContext,
        stop: threading.Event,
    ):
        self.timeout, self.retries, self.max_bytes = timeout, retries, max_bytes
        self._clock = Deadline(stop)
        backend = PublicAddressBackend(self._clock, allow_private)
        self._pool = httpcore2.ConnectionPool(
            ssl_context, max_connections=2, keepalive_expiry=10.0, network_backend=backend
        )

    def fetch(self, url: str) -> bytes:
        """Fetch a URL; raise FetchError, which tells why it could not be fetched, or FetchStopped."""
        for number in range(self.retries + 1):
            try:
                return self._fetch_once(url)
            except FetchError as error:
                if number == self.retries or not error.retryable:
                    raise
                wait = min(MAX_RETRY_WAIT, max(error.wait, INITIAL_RETRY_WAIT * 2**number * random.uniform(0.5, 1.5)))
            if self._clock.stop.wait(wait):
                raise FetchStopped
        raise AssertionError("retries must be 0 or more")

    def close(self) -> None:
        """Close the connections that were kept open."""
        self._pool.close()

    def _fetch_once(self, url: str) -> bytes:
        """Try once; every failure is raised as a `FetchError`."""
        self._clock.start(self.timeout)
        try:
            return self._follow_redirects(url)
        except ssl.SSLCertVerificationError as error:
            raise FetchError("bad certificate", error.verify_message) from error
        except socket.gaierror as error:
            passing = error.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM)
            raise FetchError("look-up failed" if passing else "no such host", str(error), retryable=passing) from error
        except TimeoutError as error:
            raise FetchError("timed out", f"after {self.timeout:g} s", retryable=True) from error
        except (httpx2.InvalidURL, httpcore2.LocalProtocolError, ValueError) as error:  # names that no DNS allows too
            raise FetchError("bad URL", str(error)) from error
        except (OSError, httpcore2.RemoteProtocolError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # this process has too many files open
            raise FetchError("connection failed", str(error), retryable=True) from error

    def _follow_redirects(self, url: str) -> bytes:
        target = parse_url(url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._request(target)
            if isinstance(answer, bytes):
                return answer
            target = parse_url(target.join(answer))
        raise FetchError("too many redirects", f"more than {MAX_REDIRECTS}")

    def _request(self, url: httpx2.URL) -> bytes | str:
        """Return the body, or the location that the server redirects to."""
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        with self._pool.stream("GET", target, headers=[("Host", url.netloc), *HEADERS]) as response:
            headers = {name.lower(): value.decode("utf-8", "replace") for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                return headers[b"location"]
            if response.status != 200:
                retryable = response.status in RETRYABLE_STATUSES or response.status >= 500
                wait = retry_after(headers.get(b"retry-after", "")) if retryable else 0.0
                raise FetchError(f"HTTP {response.status}", retryable=retryable, wait=wait)
            return self._read_body(response, int(headers.get(b"content-length", 0)))

    def _read_body(self, response: httpcore2.Response, content_length: int) -> bytes:
        body = bytearray()
        chunks = response.iter_stream()
        while max(len(body), content_length) <= self.max_bytes:  # the announced length may be wrong
            self._clock.left()  # chunks that are already buffered need no read, which would check the time
            chunk = next(chunks, None)
            if chunk is None:
                return bytes(body)
            body += chunk
        raise FetchError("too large", f"more than {self.max_bytes} bytes")


class PublicAddressBackend(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, unless `allow_private`, within a time limit (not the transport's)."""

    def __init__(self, clock: Deadline, allow_private: bool):
        self._clock, self._allow_private = clock, allow_private

    def connect_tcp(self, host: str, port: int, **unused: object) -> "DeadlineStream":
        """Look the name up, check its addresses, and connect to one of them.

        Raises:
            FetchError: an address is not public.
            OSError: no address answers in time.
        """
        answers = resolve_host(host, port, self._clock.left())
        for *_, address in answers:
            if not (self._allow_private or is_public(address[0])):
                raise FetchError("private address", f"{host} is {address[0]}")
        failure = OSError(f"{host} has no address")
        for number, (family, kind, protocol, _, address) in enumerate(answers):
            seconds = self._clock.left() / (len(answers) - number)  # so that time is left for the next address
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(seconds)
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return DeadlineStream(connection, self._clock)
            except OSError as error:
                connection.close()
                failure = error
        raise failure


class DeadlineStream(httpcore2.NetworkStream):
    """A connection on which every wait ends with the time limit."""

    def __init__(self, connection: socket.socket, clock: Deadline):
        self._connection, self._clock = connection, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Wait for data and return them."""
        self._connection.settimeout(self._clock.left())
        return self._connection.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of the data."""
        self._connection.settimeout(self._clock.left())
        self._connection.sendall(buffer)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "DeadlineStream":
        """Start TLS; the certificate must be for the name, whatever its address."""
        try:
            self._connection.settimeout(self._clock.left())
            wrapped = ssl_context.wrap_socket(self._connection, server_hostname=server_hostname)
        except BaseException:
            self._connection.close()
            raise
        return DeadlineStream(wrapped, self._clock)

    def get_extra_info(self, info: str) -> bool | None:
        """Return whether data can be read, which on an idle connection means that the server has closed it."""
        if info != "is_readable":
            return None
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))


def parse_url(url: str | httpx2.URL) -> httpx2.URL:
    """Parse a URL; raise FetchError if it is invalid, or neither http nor https."""
    parts = httpx2.URL(url)
    if parts.scheme not in ("http", "https"):
        raise FetchError("not http or https", parts.scheme or "a URL without a scheme")
    if not parts.host or not 0 < (parts.port or 80) < 2**16:
        raise FetchError("bad URL", "no host" if not parts.host else f"port {parts.port}")
    return parts


def resolve_host(host: str, port: int, seconds: float) -> Sequence[AddressInfo]:
    """Look up the addresses of a name, in a thread that may be abandoned, since the look-up has no time limit.

    Raises:
        OSError: there are none (`socket.gaierror`), or not in time (`TimeoutError`).
        UnicodeError: the name is invalid.
    """
    answer: Future[Sequence[AddressInfo]] = Future()

    def resolve() -> None:
        """Resolve the host; give the addresses or the error to `answer`."""
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=resolve, daemon=True).start()
    return answer.result(timeout=seconds)


def is_public(text: str) -> bool:
    """Return whether an address is public: not private, loopback, link-local, multicast, reserved and so on.

    An IPv6 address that stands for an IPv4 address (mapped, NAT64, 6to4) is public if that is.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
    if inner := address.ipv4_mapped or nat64 or address.sixtofour:
        return is_public(str(inner))
    return address in GLOBAL_UNICAST and address.is_global


def retry_after(text: str) -> float:
    """Return the seconds of a `Retry-After` header, a number or a date; 0 for one that cannot be read."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def check_image_suffix(content: bytes, min_size: int) -> str:
    """Decode an image (of an animated one the first frame) and return the suffix of its format.

    Raises:
        FetchError: the content is not an image, or an image that cannot be trained on.
    """
    try:
        with Image.open(BytesIO(content), formats=[name for name in SUFFIX_BY_FORMAT if name != "MPO"]) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            if min(image.size) < min_size:
                raise FetchError("too small", f"{image.width} x {image.height} pixels")
            image.load()
            return SUFFIX_BY_FORMAT[image.format or ""]
    except FetchError:
        raise
    except UnidentifiedImageError as error:
        raise FetchError("not an image", f"begins with {content[:20]!r}") from error
    except Image.DecompressionBombError as error:
        raise FetchError("too many pixels", str(error)) from error
    except Exception as error:  # Pillow's readers fail in many ways on untrusted bytes
        raise FetchError("broken image", str(error)) from error
