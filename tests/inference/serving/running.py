"""Endpoints for tests: within the process, and behind a port of this machine."""

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from tests.waiting import wait_until
from vlm.config.serving_schema import ServingConfig
from vlm.inference.engine.engine import Engine
from vlm.inference.serving.app import make_chat_app
from vlm.inference.serving.server import bind, make_server
from vlm.inference.serving.service import Service
from vlm.web.guard import RequestGuard

NAME = "tiny"
CHAT = "/v1/chat/completions"


def make_endpoint(engine: Engine, key: str | None = None, **limits: Any) -> Any:
    """The endpoint of an engine, with the guard of this machine."""
    reason = RequestGuard(None, "127.0.0.1").refusal_reason
    return make_chat_app(Service(NAME, ServingConfig(**limits)), engine, reason, key)


def make_client(app: Any) -> TestClient:
    """A client within the process; an error of the server is an answer, not raised."""
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def make_body(**fields: Any) -> dict[str, Any]:
    """A request; `fields` replace its own."""
    return {"model": NAME, "messages": [{"role": "user", "content": "what?"}], "max_tokens": 12, **fields}


def to_part(image: Image.Image, format: str = "PNG", **options: Any) -> dict[str, Any]:
    """An image as a content part."""
    file = io.BytesIO()
    image.save(file, format, **options)
    content = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{format.lower()};base64,{content}"}}


@contextmanager
def listen(app: ASGIApp, config: ServingConfig | None = None) -> Iterator[int]:
    """Serve an application on a free port of this machine; give the port."""
    with bind("127.0.0.1", 0) as bound:
        server = make_server(app, config or ServingConfig())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
