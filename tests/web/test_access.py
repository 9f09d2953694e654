"""Who is let in: the token in the address, the cookie, the password, and nobody else; without Gradio."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm.web import access as access_module
from vlm.web.access import (
    LOGIN_PATH,
    MAX_LOGIN_BYTES,
    MAX_WAITING,
    PASSWORD_VARIABLE,
    Access,
    make_token,
    read_password,
)
from vlm.web.guard import RequestGuard

PORT = 7860


class Answer:
    """What a guarded application answered; `passed` says whether the request reached it."""

    def __init__(self, sent: list[dict[str, Any]], *, passed: bool):
        self.passed = passed
        self.start = sent[0] if sent else {}
        self.status = self.start.get("status", self.start.get("code"))
        self.headers = {name.decode(): value.decode() for name, value in self.start.get("headers", [])}
        self.body = b"".join(message.get("body", b"") for message in sent)

    @property
    def cookie(self) -> str:
        return self.headers["set-cookie"].partition(";")[0]


def ask(
    access: Access | None, path: str = "/", *, query: str = "", method: str = "GET", body: bytes = b"",
    kind: str = "http", open_paths: tuple[str, ...] = (), headers: Mapping[str, str] | None = None,
) -> Answer:  # fmt: skip
    """Send a request to an application under a guard."""
    passed, sent = [], []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"secret content"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    own = {"host": f"127.0.0.1:{PORT}", **(headers or {})}
    scope = {
        "type": kind, "path": path, "query_string": query.encode(), "scheme": "http",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in own.items()],
    }  # fmt: skip
    if kind == "http":
        scope["method"] = method
    asyncio.run(RequestGuard(application, "127.0.0.1", access, open_paths)(scope, receive, send))
    return Answer(sent, passed=bool(passed))


@pytest.mark.parametrize("path", ["/", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file=/etc/passwd"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_nothing_passes_without_a_secret(path: str, method: str):
    answer = ask(Access(password="long enough"), path, method=method, open_paths=("/health",))
    assert (answer.status, answer.passed) == (401, False)
    assert b"secret content" not in answer.body
    assert "frame-ancestors" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": "token="}, {"query": "token=x"}, {"query": "token=%F0%9F"}, {"headers": {"authorization": "Bearer "}},
        {"headers": {"authorization": "Basic eDp5"}}, {"headers": {"cookie": f"vlm-{PORT}="}},
        {"headers": {"cookie": f"vlm-{PORT}=\xe9"}}, {"headers": {"cookie": f"; =;;vlm-{PORT}"}},
    ],
)  # fmt: skip
def test_a_wrong_secret_is_none(wrong: dict[str, Any]):
    assert ask(Access(), **wrong).status == 401
    assert ask(Access(), kind="websocket", **wrong).status == 1008


def test_the_token_in_the_address_becomes_a_cookie_and_leaves_the_address():
    access = Access()
    first = ask(access, query=f"token={access.token}&__theme=dark")
    assert (first.status, first.passed, first.headers["location"]) == (303, False, "/?__theme=dark")
    assert access.token not in first.headers["set-cookie"]
    assert "HttpOnly" in first.headers["set-cookie"]
    assert ask(access, headers={"cookie": f"other=1; {first.cookie}"}).passed
    assert ask(access, kind="websocket", headers={"cookie": first.cookie}).passed
    assert not ask(Access(), headers={"cookie": first.cookie}).passed, "another page has another cookie"


def test_the_address_behind_the_token_stays_here():
    access = Access()
    answer = ask(access, "//elsewhere.example", query=f"token={access.token}")
    assert answer.headers["location"] == "/elsewhere.example"


def test_a_program_gives_the_token_as_a_bearer():
    access = Access()
    assert ask(access, method="POST", headers={"authorization": f"bearer {access.token}"}).passed


def test_paths_that_are_open_are_read_and_no_more():
    access = Access()
    assert ask(access, "/health", open_paths=("/health",)).passed
    assert not ask(access, "/health", method="POST", open_paths=("/health",)).passed
    assert not ask(access, "/health/more", open_paths=("/health",)).passed
    assert ask(None, "/").passed


def log_in(access: Access, body: bytes) -> Answer:
    return ask(access, LOGIN_PATH, method="POST", body=body)


def test_the_password_or_the_token_logs_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(access_module, "WRONG_PASSWORD_SECONDS", 0)
    access = Access(password="pass word é")
    for secret in (b"pass+word+%C3%A9", access.token.encode()):
        answer = log_in(access, b"secret=" + secret)
        assert (answer.status, answer.headers["location"]) == (303, "/")
        assert ask(access, headers={"cookie": answer.cookie}).passed
    for wrong in (b"", b"secret=", b"secret=pass", b"secret=%ff", b"token=x", b"secret=" + bytes(MAX_LOGIN_BYTES)):
        assert log_in(access, wrong).status == 401
    assert log_in(Access(), b"secret=").status == 401, "no password is not an empty one"
    assert ask(access, LOGIN_PATH, method="POST", headers={"origin": "http://elsewhere.example"}).status == 403


def test_wrong_passwords_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(access_module, "WRONG_PASSWORD_SECONDS", 0.01)
    access = Access(password="long enough")

    async def guess() -> list[bool | None]:
        return list(await asyncio.gather(*(access.is_secret(b"secret=no") for _ in range(2 * MAX_WAITING))))

    begin = time.monotonic()
    answers = asyncio.run(guess())
    assert answers.count(None) == answers.count(False) == MAX_WAITING
    assert time.monotonic() - begin >= MAX_WAITING * 0.01


def test_the_password_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert read_password(None) is None
    (tmp_path / "password").write_text("from a file\nnot this\n")
    assert read_password(str(tmp_path / "password")) == "from a file"
    monkeypatch.setenv(PASSWORD_VARIABLE, "from the environment")
    assert read_password(None) == "from the environment"
    assert read_password(None) is None, "no process that is started inherits it"
    (tmp_path / "password").write_text("short\n")
    with pytest.raises(ValueError, match="at least 8 characters"):
        read_password(str(tmp_path / "password"))
    monkeypatch.setattr(access_module.getpass, "getpass", lambda _: "from the terminal")
    assert read_password("-") == "from the terminal"


def test_secrets_are_not_shown():
    access = Access(password="long enough")
    assert not any(secret in repr(access) for secret in (access.token, access.cookie, "long enough"))
    assert len({make_token() for _ in range(50)}) == 50
