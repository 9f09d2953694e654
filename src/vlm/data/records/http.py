"""Reads a file from a web server in sequence; after a lost connection, it continues at the next byte.

Imports the standard library only.
"""

import http.client
import io
import logging
import re
import time
from typing import IO
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

log = logging.getLogger(__name__)

HTTP_PREFIXES = ("http://", "https://")
MAX_FAILURES = 8
"""Number of failures in a row after which a file is given up; with the waits between them, after about two minutes."""
LONGEST_WAIT = 60.0
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as failed."""
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
BUFFER_BYTES = 1 << 20


def open_http(url: str, start: int = 0) -> io.BufferedReader:
    """Open a file of a web server from a byte on; see `HttpFile` for errors."""
    return io.BufferedReader(HttpFile(url, start), BUFFER_BYTES)


class HttpRedirects(HTTPRedirectHandler):
    """Follows redirects to HTTP(S) only, since a server may name other addresses, such as `ftp:`."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        """Return the request for where a server redirects to."""
        if not newurl.lower().startswith(HTTP_PREFIXES):
            raise HTTPError(req.full_url, code, f"redirects to {newurl[:80]}, which is not http(s)", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class HttpFile(io.RawIOBase):
    """The bytes of a file from a given byte on. Failures are logged and retried after 1, 2, 4, … seconds.

    Reading raises:
        OSError: the server refuses the file, or failed `MAX_FAILURES` times in a row.
        ValueError: the file has changed since it was opened.
    """

    def __init__(self, url: str, start: int = 0):
        self.url, self.offset = url, start
        self._response: http.client.HTTPResponse | None = None
        self._size: int | None = None
        self._version: str | None = None
        self._failures = 0

    def readable(self) -> bool:
        """Return True: the file can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Read some bytes; 0 at the end."""
        while True:
            try:
                if self._size is not None and self.offset >= self._size:
                    return 0
                if self._response is None:
                    self._connect()
                    continue
                number = self._response.readinto(buffer)
                if not number and self._size is not None and self.offset < self._size:
                    raise ConnectionError(f"the connection ended at byte {self.offset:,} of {self._size:,}")
            except (OSError, http.client.HTTPException) as error:
                self._wait_or_give_up(error)
                continue
            self.offset += number
            self._failures = 0
            return number

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        super().close()

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None

    def _connect(self) -> None:
        """Ask for the file from the current byte on; a server that knows no ranges sends it from the start."""
        headers = {"Range": f"bytes={self.offset}-"} if self.offset else {}
        try:
            response = build_opener(HttpRedirects).open(Request(self.url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            if error.code == 416 and self.offset:  # nothing is left behind the last byte
                self._size = self.offset
                return
            raise
        self._check_version(response)
        self._response = response
        ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 206 and ranged is not None and int(ranged[1]) == self.offset:
            self._size = int(ranged[2])
            return
        length = response.headers.get("Content-Length")
        self._size = int(length) if length is not None else None
        if self.offset:
            log.warning("%s: the server does not support ranges; %s bytes are read again", self.url, f"{self.offset:,}")
            _discard(response, self.offset)

    def _check_version(self, response: http.client.HTTPResponse) -> None:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if self._version is not None and version != self._version:
            raise ValueError(f"{self.url}: the file has changed while it was read")
        self._version = version

    def _wait_or_give_up(self, error: Exception) -> None:
        self._disconnect()
        if isinstance(error, HTTPError) and error.code not in RETRIED_STATUSES:
            raise OSError(f"{self.url}: {error}") from error
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise OSError(f"{self.url}: failed {self._failures} times in a row, the last time with: {error}") from error
        wait = min(2.0 ** (self._failures - 1), LONGEST_WAIT)
        log.warning("%s: %s; read on from byte %s in %.0f s", self.url, error, f"{self.offset:,}", wait)
        time.sleep(wait)


def _discard(response: http.client.HTTPResponse, number: int) -> None:
    while number:
        chunk = response.read(min(number, BUFFER_BYTES))
        if not chunk:
            raise ConnectionError("the connection ended")
        number -= len(chunk)
