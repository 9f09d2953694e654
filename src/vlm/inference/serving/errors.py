"""Refusals in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` with a status."""

import json
from collections.abc import Mapping

MAX_MESSAGE_LENGTH = 500
"""Characters of a message; longer ones are cut: they quote what a request holds."""
RETRY_AFTER_SECONDS = 2
"""What `Retry-After` says where the server is full."""

SERVER_STATUSES = 500, 503


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: what was given, what is allowed, what to do.
        status: the status of the answer.
        param: the field at fault, such as `messages[0].content`.
        code: what programs tell refusals apart by, such as `model_not_found`.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))

    def to_dict(self) -> dict[str, object]:
        """Return the body of the answer."""
        kind = "server_error" if self.status in SERVER_STATUSES else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        param = None if self.param is None else make_safe(self.param)
        return {"error": {"message": make_safe(self.message), "type": kind, "param": param, "code": self.code}}


def internal_error() -> RequestError:
    """Return what a client is told of a fault of the server; the log has the rest."""
    return RequestError("The server failed on this request; see its log.", status=500, code="internal_error")


def make_safe(text: str) -> str:
    """Return a message without control characters and halves of surrogate pairs, and not longer than is read."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text[:2000])
    return shown if len(shown) <= MAX_MESSAGE_LENGTH else f"{shown[:MAX_MESSAGE_LENGTH]}…"


def show(value: object, length: int = 40) -> str:
    """Return a value of a request as a message quotes it; only its beginning is looked at."""
    if isinstance(value, str):
        return repr(value) if len(value) <= length else f"{value[:length]!r}…"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**length:
        return "a huge number"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
