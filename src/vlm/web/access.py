"""The secrets that let a request in: a token in the address, as Jupyter has it, or a password; then a cookie.

Secrets are compared in constant time, and wrong passwords are answered slowly, one after the other. Imports the
standard library only; `vlm.web.guard` asks it.
"""

import asyncio
import getpass
import hmac
import html
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

PASSWORD_VARIABLE = "VLM_WEB_PASSWORD"
"""The variable of the environment that holds the password, where `--password-file` names no file."""
SHORTEST_PASSWORD = 8
WRONG_PASSWORD_SECONDS = 1.0
"""How long a wrong password waits for its answer."""
MAX_WAITING = 16
"""Number of passwords that wait to be looked at; further ones are refused."""
LOGIN_PATH = "/vlm-login"
MAX_LOGIN_BYTES = 4096

LOGIN_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>vlm</title>
<body style="font-family: system-ui, sans-serif; max-width: 30em; margin: 4em auto; padding: 0 1em">
<h1>small-vlm</h1><p>{message}</p>
<form method="post" action="{action}"><input type="password" name="secret" aria-label="Token or password" autofocus
autocomplete="current-password"> <button>Open</button></form>
"""
NEEDS_SECRET = "Open the address that vlm web printed, which contains a token, or enter the token or the password here."


def make_token() -> str:
    """Return a new token of 256 random bits."""
    return secrets.token_urlsafe(32)


def read_password(file: str | None) -> str | None:
    """Return the password of the page, which no command line shows; None if there is none.

    Args:
        file: the file whose first line it is, or `-` to ask at the terminal; None: the environment may have it, from
            which it is removed, so that no training that the page starts inherits it.

    Raises:
        ValueError: it is too short.
        OSError: the file cannot be read.
    """
    if file is None:
        password, source = os.environ.pop(PASSWORD_VARIABLE, None), PASSWORD_VARIABLE
    elif file == "-":
        password, source = getpass.getpass("Password of the page: "), "the password"
    else:
        password, source = Path(file).read_text(encoding="utf-8").partition("\n")[0].strip(), f"--password-file {file}"
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise ValueError(f"{source}: at least {SHORTEST_PASSWORD} characters are needed")
    return password


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Attributes:
        token: opens with the address (`?token=…`), or as a bearer token (`Authorization: Bearer …`).
        password: opens besides; None: there is none.
        cookie: the value of the cookie that a browser gets.
    """

    token: str = field(default_factory=make_token, repr=False)
    password: str | None = field(default=None, repr=False)
    cookie: str = field(default_factory=make_token, repr=False)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)
    _waiting: list[object] = field(default_factory=list, repr=False, compare=False)

    def is_token(self, text: str) -> bool:
        """Return whether a text is the token."""
        return _equal(text, self.token)

    def has_cookie(self, header: str, port: int | str) -> bool:
        """Return whether a request's `Cookie` has the page's cookie."""
        pairs = (pair.strip().partition("=") for pair in header.split(";"))
        return any(name == cookie_name(port) and _equal(value, self.cookie) for name, _, value in pairs)

    def admits(self, headers: Mapping[bytes, str], port: int | str) -> bool:
        """Return whether a request carries the cookie or the token among its headers."""
        scheme, _, credential = headers.get(b"authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer" and self.is_token(credential.strip())
        return is_bearer or self.has_cookie(headers.get(b"cookie", ""), port)

    async def is_secret(self, body: bytes) -> bool | None:
        """Return whether the form of a login has the token or the password; None if too many wait."""
        text = next(iter(parse_qs(body.decode("utf-8", "replace")).get("secret", [])), "").strip()
        if self.is_token(text):
            return True
        if self.password is None or len(self._waiting) >= MAX_WAITING:
            return None if self.password is not None else False
        self._waiting.append(None)
        try:
            async with self._turn:
                if _equal(text, self.password):
                    return True
                await asyncio.sleep(WRONG_PASSWORD_SECONDS)
                return False
        finally:
            self._waiting.pop()

    def set_cookie_header(self, port: int | str, *, is_encrypted: bool) -> tuple[bytes, bytes]:
        """Return the header that gives a browser the cookie."""
        secure = "; Secure" if is_encrypted else ""
        cookie = f"{cookie_name(port)}={self.cookie}; Path=/; HttpOnly; SameSite=Lax{secure}"
        return b"set-cookie", cookie.encode()


def cookie_name(port: int | str) -> str:
    """Return the cookie's name: browsers send cookies to all ports of a machine, on each of which may be a page."""
    return f"vlm-{port}"


def login_page(message: str = NEEDS_SECRET) -> bytes:
    """Return the page that asks for the token or the password."""
    return LOGIN_PAGE.format(message=html.escape(message), action=LOGIN_PATH).encode()


def _equal(text: str, secret: str) -> bool:
    return hmac.compare_digest(text.encode("utf-8", "surrogatepass"), secret.encode())
