"""Fetching from a server on this machine: what is refused, what is tried again, and where connections go."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.waiting import HANG
from vlm.data.tools import fetch
from vlm.data.tools.fetch import (
    Deadline,
    Fetcher,
    FetchError,
    FetchStopped,
    check_image_suffix,
    is_public,
    resolve_host,
    retry_after,
)

PUBLIC = "93.184.216.34"
"""An address that the check lets pass; no test connects to it."""
TRUST = httpx2.create_ssl_context()


def picture(kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    file = BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(file, kind)
    return file.getvalue()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler: BaseHTTPRequestHandler, piece: bytes, seconds: float) -> None:
    """Piece after piece, until the other side has enough."""
    while True:
        handler.wfile.write(piece)
        time.sleep(seconds)


class Site:
    """A server on 127.0.0.1 that knows a few pages and remembers who asked for what."""

    def __init__(self):
        site = self
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        for kind in ("JPEG", "PNG", "WEBP", "GIF"):
            self.page(f"/{kind.lower()}", picture(kind))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.asked.append((self.path, dict(self.headers)))
                page = site.pages.get(self.path.split("?")[0], lambda handler: send(handler, 404))
                try:
                    page(self)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: Any):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def page(self, path: str, body: bytes) -> None:
        self.pages[path] = lambda handler: send(handler, 200, body)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch, "INITIAL_RETRY_WAIT", 0.01)
    site = Site()
    yield site
    site.close()


def fetcher(**changes: Any) -> Fetcher:
    chosen = {"timeout": HANG, "retries": 2, "max_bytes": 100_000, "allow_private": True, "stop": threading.Event()}
    return Fetcher(**{"ssl_context": TRUST, **chosen, **changes})


def reason(url: str, **changes: Any) -> str:
    with pytest.raises(FetchError) as error:
        fetcher(**changes).fetch(url)
    return error.value.reason


def send_to(monkeypatch: pytest.MonkeyPatch, port: int, answers: dict[str, list[str]]) -> list[tuple[str, int]]:
    """A made-up DNS, host -> its answer to each question in turn, and an internet in which all is on this machine."""
    connected: list[tuple[str, int]] = []
    connect = socket.socket.connect

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any):
        addresses = answers[host].pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses.split()]

    def connect_here(self: socket.socket, address: tuple[str, int]):
        connected.append(address)
        connect(self, ("127.0.0.1", port))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    return connected


def test_gives_the_bytes_and_keeps_the_connection(site: Site):
    ports = set()
    site.pages["/port"] = lambda handler: (ports.add(handler.client_address[1]), send(handler, 200, b"x"))[1]
    one = fetcher()
    assert [one.fetch(site.url("/port")) for _ in range(3)] == [b"x"] * 3
    assert len(ports) == 1
    one.close()


def test_a_connection_that_the_server_closed_is_not_used_again(site: Site):
    def once(handler: BaseHTTPRequestHandler):
        send(handler, 200, b"x")
        handler.close_connection = True

    site.pages["/once"] = once
    one = fetcher(retries=0)
    assert one.fetch(site.url("/once")) == b"x"
    time.sleep(0.1)
    assert one.fetch(site.url("/once")) == b"x"


def test_follows_redirects_relative_ones_too(site: Site):
    site.pages["/a"] = lambda handler: send(handler, 302, Location="/b")
    site.pages["/b"] = lambda handler: send(handler, 308, Location=site.url("/c"))
    site.page("/c", b"here")
    assert fetcher().fetch(site.url("/a")) == b"here"


def test_a_loop_of_redirects_ends(site: Site):
    site.pages["/loop"] = lambda handler: send(handler, 301, Location="/loop")
    assert reason(site.url("/loop")) == "too many redirects"
    assert len(site.asked) == 1 + fetch.MAX_REDIRECTS


@pytest.mark.parametrize("status", [400, 403, 404, 410, 204, 304])
def test_what_stays_so_is_not_asked_for_again(site: Site, status: int):
    site.pages["/page"] = lambda handler: send(handler, status)
    assert reason(site.url("/page")) == f"HTTP {status}"
    assert len(site.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_trouble_is_tried_again(site: Site, status: int):
    site.pages["/page"] = lambda handler: send(handler, status if len(site.asked) < 3 else 200, b"x")
    assert fetcher(retries=2).fetch(site.url("/page")) == b"x"
    site.asked.clear()
    assert reason(site.url("/page"), retries=1) == f"HTTP {status}"
    assert len(site.asked) == 2


def test_a_broken_connection_is_tried_again(site: Site):
    def cut(handler: BaseHTTPRequestHandler):
        send(handler, 200, b"short", Content_Length="10" if len(site.asked) < 2 else "5")
        handler.close_connection = True

    site.pages["/cut"] = cut
    assert fetcher().fetch(site.url("/cut")) == b"short"
    assert reason("http://127.0.0.1:1/", retries=1) == "connection failed"


def test_waits_as_long_as_the_server_asks_but_not_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda seconds: waits.append(seconds))
    asked_for = iter(["7", "3600", "nonsense"])
    site.pages["/busy"] = lambda handler: send(handler, 429, Retry_After=next(asked_for, "0"))
    assert reason(site.url("/busy"), retries=3, stop=stop) == "HTTP 429"
    assert waits[:2] == [7, fetch.MAX_RETRY_WAIT]
    assert 0.02 <= waits[2] <= 0.06  # the third wait, four times the first, give or take a half


def test_retry_after_may_be_a_date():
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2150 07:28:00 GMT") > 1e9
    assert retry_after("") == retry_after("soon") == retry_after("²") == 0


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_drips_has_no_more_time_than_others(site: Site, begin: bytes):
    site.pages["/drip"] = lambda handler: (handler.wfile.write(begin), drip(handler, b"x", 0.05))[1]
    assert reason(site.url("/drip"), timeout=0.4, retries=0) == "timed out"  # while the server goes on


def test_a_name_server_that_is_silent_has_no_more_time_either(monkeypatch: pytest.MonkeyPatch):
    silent = threading.Event()
    answered: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: silent.wait(HANG) and answered.append(host))
    assert reason("http://example.com/", timeout=0.2, retries=0) == "timed out"
    assert not answered
    silent.set()


def test_stops_in_the_middle(site: Site):
    stop = threading.Event()
    site.pages["/drip"] = lambda handler: (send(handler, 200, Content_Length="99999"), drip(handler, b"x", 0.02))[1]
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(FetchStopped):  # long before the server is done
        fetcher(stop=stop).fetch(site.url("/drip"))


def test_what_is_too_large_is_not_read_to_its_end(site: Site):
    def endless(handler: BaseHTTPRequestHandler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        drip(handler, bytes(10_000), 0)

    site.pages["/endless"] = endless
    site.pages["/announced"] = lambda handler: send(handler, 200, b"x", Content_Length="1000000")
    site.page("/right", bytes(100_000))
    assert reason(site.url("/endless")) == "too large"
    assert reason(site.url("/announced")) == "too large"
    assert len(fetcher().fetch(site.url("/right"))) == 100_000


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///etc/hostname", "not http or https"),
        ("ftp://example.com/a", "not http or https"),
        ("example.com/a.jpg", "not http or https"),
        ("http://", "bad URL"),
        ("http://[::1/", "bad URL"),
        ("http://example.com:99999/", "bad URL"),
        ("http://example..com/", "bad URL"),
        ("http://example.com/\x00", "bad URL"),
        ("http://" + "a" * 70 + ".example.com/", "bad URL"),
    ],
)
def test_no_url_of_the_web(url: str, expected: str):
    assert reason(url) == expected


def test_redirects_lead_to_the_web_only(site: Site):
    site.pages["/away"] = lambda handler: send(handler, 302, Location="file:///etc/hostname")
    assert reason(site.url("/away")) == "not http or https"


def test_sends_no_credentials_and_no_cookies(site: Site):
    site.pages["/set"] = lambda handler: send(handler, 302, Location=with_user("/png"), Set_Cookie="a=b")
    with_user = lambda path: site.url(path, host="user:secret@127.0.0.1")  # noqa: E731
    fetcher().fetch(with_user("/set"))
    for _, headers in site.asked:
        assert headers["Host"] == f"127.0.0.1:{site.port}"
        assert not {"authorization", "cookie", "referer"} & {name.lower() for name in headers}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "2001::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1",
        "2002:7f00:1::", "2002:c0a8:101::1", "100::1", "4000::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "2606:2800:220:1::1", f"::ffff:{PUBLIC}", "64:ff9b::5db8:d822", "2002:5db8:d822::1"],
)
def test_addresses_that_are(address: str):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0"])
def test_this_machine_is_refused_by_default(site: Site, host: str):
    assert reason(site.url("/png", host), allow_private=False) == "private address"
    assert not site.asked


def test_a_name_of_a_private_address_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch):
    names = {"example.com": ["10.1.2.3"], "www.example.com": [f"{PUBLIC} 127.0.0.1"]}
    connected = send_to(monkeypatch, site.port, names)
    assert reason("http://example.com/png", allow_private=False) == "private address"
    assert reason("http://www.example.com/png", allow_private=False) == "private address"
    assert not connected


def test_a_redirect_to_a_private_address_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch):
    names = {
        "example.com": [PUBLIC],
        "127.0.0.1": ["127.0.0.1"],
        "www.example.com": [PUBLIC],
        "in.example.com": ["::1"],
    }
    connected = send_to(monkeypatch, site.port, names)
    site.pages["/in"] = lambda handler: send(handler, 302, Location=site.url("/png"))
    site.pages["/by-name"] = lambda handler: send(handler, 302, Location="http://in.example.com/png")
    assert reason("http://example.com/in", allow_private=False) == "private address"
    assert reason("http://www.example.com/by-name", allow_private=False) == "private address"
    assert connected == [(PUBLIC, 80)] * 2
    assert site.paths == ["/in", "/by-name"]


def test_connects_to_the_address_that_was_checked(site: Site, monkeypatch: pytest.MonkeyPatch):
    answers = {"example.com": [PUBLIC, "127.0.0.1"]}
    connected = send_to(monkeypatch, site.port, answers)
    assert fetcher(allow_private=False).fetch("http://example.com/png")
    assert connected == [(PUBLIC, 80)]
    assert site.asked[0][1]["Host"] == "example.com"
    assert reason("http://example.com/png", allow_private=False) == "private address"  # the second answer, checked too


def test_tls_asks_for_the_name_and_not_for_the_address(site: Site, monkeypatch: pytest.MonkeyPatch):
    connected = send_to(monkeypatch, site.port, {"example.com": [PUBLIC]})
    names: list[str | None] = []

    class Plain(ssl.SSLContext):
        def wrap_socket(self, sock: socket.socket, *args: Any, server_hostname: str | None = None, **kwargs: Any):
            names.append(server_hostname)
            return sock

    plain = Plain(ssl.PROTOCOL_TLS_CLIENT)
    assert fetcher(allow_private=False, ssl_context=plain).fetch("https://example.com/png")
    assert (connected, names) == ([(PUBLIC, 443)], ["example.com"])
    assert TRUST.check_hostname


def test_a_server_without_tls_fails(site: Site):
    assert reason(site.url("/png").replace("http:", "https:"), retries=0) in ("connection failed", "timed out")


def test_the_next_address_is_tried(site: Site, monkeypatch: pytest.MonkeyPatch):
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (1, site.port)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: here)
    assert fetcher(retries=0).fetch("http://example.com/png")


def test_the_environments_proxies_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    connected = send_to(monkeypatch, site.port, {"example.com": [PUBLIC]})
    assert fetcher(allow_private=False).fetch("http://example.com/png")
    assert connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    ("code", "expected", "times"), [(socket.EAI_NONAME, "no such host", 1), (socket.EAI_AGAIN, "look-up failed", 3)]
)
def test_names_that_are_not_found(monkeypatch: pytest.MonkeyPatch, code: int, expected: str, times: int):
    monkeypatch.setattr(fetch, "INITIAL_RETRY_WAIT", 0.01)
    asked = []

    def getaddrinfo(*args: Any, **kwargs: Any):
        asked.append(args)
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert reason("http://example.com/") == expected
    assert len(asked) == times


def test_too_many_open_files_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any):
        raise OSError(24, "Too many open files")

    found = resolve_host("127.0.0.1", 80, 1)
    monkeypatch.setattr(fetch, "resolve_host", lambda *args: found)
    monkeypatch.setattr(socket, "socket", full)
    with pytest.raises(OSError, match="Too many"):
        fetcher().fetch("http://127.0.0.1/")


def test_clock():
    clock = Deadline(threading.Event())
    with pytest.raises(TimeoutError):
        clock.left()
    clock.start(5)
    assert 4 < clock.left() <= 5


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")])
def test_suffix_is_that_of_the_content(kind: str, suffix: str):
    assert check_image_suffix(picture(kind), 16) == suffix


def test_a_jpeg_with_a_second_image_is_a_jpeg():
    file = BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    assert check_image_suffix(file.getvalue(), 0) == "jpg"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><html>no such picture</html>", "not an image"),
        (b"", "not an image"),
        (picture("BMP"), "not an image"),
        (picture("JPEG")[:-100], "broken image"),
        (picture("PNG")[:-100], "broken image"),
        (picture("PNG", (15, 200)), "too small"),
    ],
)
def test_what_is_no_image_to_train_with(content: bytes, expected: str):
    with pytest.raises(FetchError) as error:
        check_image_suffix(content, 16)
    assert error.value.reason == expected


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 300])  # pixels: Pillow itself refuses, and only warns
def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, limit: int):
    content = picture("PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(FetchError, match="too many pixels"):
        check_image_suffix(content, 0)
