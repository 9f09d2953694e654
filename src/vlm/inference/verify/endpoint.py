"""A server that speaks OpenAI's chat completions: it tells how many tokens a prompt has, and answers.

Only the address that is given is asked, and no redirection is followed. The standard library speaks HTTP.
"""

import base64
import json
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from vlm.inference.verify.cases import Case, Message
from vlm.inference.verify.engines import NUM_IDS, State

TIMEOUT = 600.0
"""Seconds that one answer may take."""


class _NoRedirection(HTTPRedirectHandler):
    def redirect_request(self, *given: object, **named: object) -> None:
        """Follow no redirection."""
        return


class Endpoint:
    """A server at an address.

    Args:
        url: such as `http://127.0.0.1:8000`, with `/v1` behind it or without.

    Raises:
        ValueError: the address is none of HTTP, or the server does not answer.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {url}: must be an address such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._open = build_opener(_NoRedirection).open
        models = self.ask("/v1/models").get("data") or []
        if not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise ValueError(f"--url {url}: /v1/models lists no model")
        self.model = str(models[0]["id"])

    def observe(self, cases: Sequence[Case], max_new_tokens: int) -> tuple[dict[str, State], dict[str, str]]:
        """Return, for each case by its name, the number of prompt tokens where the server tells it, and the answer."""
        outputs: dict[str, State] = {}
        answers: dict[str, str] = {}
        for case in cases:
            body = {
                "model": self.model,
                "messages": messages_with_data(case),
                "temperature": 0,
                "max_tokens": max_new_tokens,
            }
            response = self.ask("/v1/chat/completions", body)
            try:
                answers[case.name] = (response["choices"][0]["message"]["content"] or "").strip()
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"{self.url} did not return a chat completion: {json.dumps(response)[:200]}"
                ) from error
            number = (response.get("usage") or {}).get("prompt_tokens")
            outputs[case.name] = {NUM_IDS: torch.tensor([number])} if isinstance(number, int) else {}
        return outputs, answers

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object that the server gives at a path, for a body if there is one.

        Raises:
            ValueError: the server does not answer, refuses, or gives something else.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=TIMEOUT) as response:
                values = json.load(response)
        except HTTPError as error:
            said = error.read(400).decode(errors="replace")
            raise ValueError(f"{self.url}{path} was refused with status {error.code}: {said!r}") from error
        except (URLError, OSError, HTTPException) as error:
            raise ValueError(f"{self.url}{path} does not answer: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.url}{path} did not return JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.url}{path} did not return a JSON object")
        return values


def messages_with_data(case: Case) -> list[Message]:
    """Return a case's messages as OpenAI's interface takes them: images as data in their addresses."""
    images = iter(case.images)
    messages = []
    for message in case.messages:
        items = [
            item if item["type"] == "text" else {"type": "image_url", "image_url": {"url": as_data(next(images))}}
            for item in message["content"]
        ]
        has_images = any(item["type"] != "text" for item in items)
        text = "".join(item.get("text", "") for item in items)
        messages.append({"role": message["role"], "content": items if has_images else text})
    return messages


def as_data(image: bytes) -> str:
    """Return an image file as an address that holds it."""
    kind = "jpeg" if image.startswith(b"\xff\xd8\xff") else "png" if image.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
