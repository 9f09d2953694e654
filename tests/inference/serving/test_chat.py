"""Chat completions over HTTP: their form, limits, and clients that leave. A fake engine writes the answers."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from tests.inference.serving.fake_engine import FakeEngine
from tests.inference.serving.running import CHAT, make_body, make_client, make_endpoint, to_part
from tests.tiny_parts import QWEN3, picture
from vlm.inference.engine.engine import CLOSED
from vlm.inference.generate import VisionLanguageModel


@pytest.fixture
def engine(model: VisionLanguageModel) -> FakeEngine:
    return FakeEngine(model)


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with make_client(make_endpoint(engine, max_images=2, max_characters=10_000, max_choices=3)) as client:
        yield client


def post(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(CHAT, json=make_body(**fields))
    return {"status": answer.status_code, **answer.json()}


def stream(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post(CHAT, json=make_body(stream=True, **fields))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event[6:]) for event in events if event != "data: [DONE]"]


def test_a_completion_has_the_form_of_openai(client: TestClient):
    found = post(client)
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = found["usage"]["prompt_tokens"]
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert found["id"].startswith("chatcmpl-")
    assert (found["object"], found["model"]) == ("chat.completion", "tiny")
    assert post(client)["system_fingerprint"] == found["system_fingerprint"]


def test_a_stream_is_the_completion_in_pieces(client: TestClient):
    chunks = stream(client, n=2, stream_options={"include_usage": True})
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello there."
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert client.post(CHAT, json=make_body(stream=True)).text.endswith("\n\ndata: [DONE]\n\n")
    assert "usage" not in stream(client)[0]


def test_what_a_request_asks_reaches_the_engine(client: TestClient, engine: FakeEngine):
    found = post(
        client, n=3, seed=2**63 - 1, temperature=0.5, top_p=0.9, presence_penalty=-1, frequency_penalty=2, stop="x",
        logit_bias={"5": -100}, logprobs=True, top_logprobs=2, max_completion_tokens=4, max_tokens=None,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    )  # fmt: skip
    first, second, _ = engine.asked
    assert (first.temperature, first.top_p, first.presence_penalty, first.frequency_penalty) == (0.5, 0.9, -1, 2)
    assert (first.stop, first.logit_bias, first.max_new_tokens) == (("x",), {5: -100}, 4)
    assert (first.seed, second.seed) == (2**63 - 1, -(2**63))
    assert "object" in (first.constraint.grammar if first.constraint else "")
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    tokens = found["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["H", "e", "l", "l"]
    assert tokens[0]["bytes"] == [72]
    assert len(tokens[0]["top_logprobs"]) == 2


def test_a_request_without_a_length_gets_what_the_positions_leave(client: TestClient, engine: FakeEngine):
    prompt = post(client, max_tokens=None)["usage"]["prompt_tokens"]
    assert engine.asked[-1].max_new_tokens == engine.model.positions - prompt
    assert post(client, max_tokens=engine.model.positions - prompt)["status"] == 200
    found = post(client, max_tokens=engine.model.positions - prompt + 1)
    assert (found["status"], found["error"]["code"]) == (400, "context_length_exceeded")
    found = post(client, messages=[{"role": "user", "content": "word " * 1500}])
    assert (found["status"], found["error"]["code"]) == (400, "context_length_exceeded")


def test_a_request_says_whether_the_model_thinks(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """Else it is as the model is set, which `vlm serve --thinking` changes; with tools as without."""
    processor: Any = engine.model.processor
    monkeypatch.setattr(processor, "chat_template", QWEN3)
    monkeypatch.setitem(processor.tokenizer.init_kwargs, "enable_thinking", False)
    empty = "<think>\n\n</think>\n\n"
    for default in (False, True):
        processor.tokenizer.init_kwargs["enable_thinking"] = default
        for asked in (None, False, True):
            fields = {} if asked is None else {"chat_template_kwargs": {"enable_thinking": asked}}
            assert post(client, **fields)["status"] == 200
            assert engine.prompt.endswith(empty) == (not (default if asked is None else asked))
    assert post(client, chat_template_kwargs={"enable_thinking": None})["status"] == 200
    found = post(client, chat_template_kwargs={"enable_thinking": True, "date": "today"})
    assert (found["status"], found["error"]["param"]) == (400, "chat_template_kwargs.date")


def test_thoughts_are_part_of_an_answer_as_the_model_writes_them(client: TestClient, engine: FakeEngine):
    engine.text = "<think>Hm.</think>2"
    assert post(client, max_tokens=100)["choices"][0]["message"]["content"] == engine.text
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(client, max_tokens=100)]
    assert "".join(pieces) == engine.text


@pytest.mark.parametrize(("fields", "status", "param", "words"), [
    ({"model": "another"}, 404, "model", "only 'tiny'"),
    ({"functions": []}, 400, "functions", "use tools"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "not served"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs.enable_thinking",
     "has no such setting"),
    ({"n": 4}, 400, "n", "serving.max_choices"),
    ({"max_tokens": 2**20}, 400, "max_tokens", "serving.max_tokens"),
    ({"stop": ["a"] * 5}, 400, "stop", "serving.max_stops"),
    ({"stop": "a" * 300}, 400, "stop", "serving.max_stop_characters"),
    ({"logit_bias": {str(n): 1 for n in range(400)}}, 400, "logit_bias", "serving.max_logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "no token"),
    ({"messages": [{"role": "user", "content": "a"}] * 600}, 400, "messages", "serving.max_messages"),
    ({"messages": [{"role": "user", "content": "a" * 20_000}]}, 400, "messages", "serving.max_characters"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2000}]}, 400, "messages",
     "serving.max_parts"),
    ({"messages": [{"role": "user", "content": [to_part(picture(0))] * 3}]}, 400, "messages", "serving.max_images"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}}, 400,
     "response_format", "nonsense"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, 400, "tools", "has no tools"),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, 400, "messages", "has no tools"),
])  # fmt: skip
def test_what_is_not_served_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], status: int, param: str, words: str
):
    found = post(client, **fields)
    assert found["status"] == status
    assert found["error"]["param"] == param
    assert words in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"


def test_the_developer_is_the_system_and_a_refusal_is_a_reply(client: TestClient):
    asked = {"role": "user", "content": [to_part(picture(1)), {"type": "text", "text": "what?"}]}
    lengths = {
        post(client, messages=[{"role": role, "content": "be brief"}, asked])["usage"]["prompt_tokens"]
        for role in ("system", "developer")
    }
    assert len(lengths) == 1
    replies = [{"role": "assistant", "content": "no"}, {"role": "assistant", "content": None, "refusal": "no"},
               {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]  # fmt: skip
    lengths = {post(client, messages=[asked, reply, asked])["usage"]["prompt_tokens"] for reply in replies}
    assert len(lengths) == 1


def test_a_failure_has_the_form_of_an_error_also_within_a_stream(client: TestClient, engine: FakeEngine):
    for error, status, code in (
        (ValueError("the answer cannot keep to its schema"), 400, "invalid_value"),
        (torch.OutOfMemoryError("no memory"), 503, "out_of_memory"),
        (RuntimeError(CLOSED), 503, "unavailable"),
        (ZeroDivisionError("a secret of the server"), 500, "internal_error"),
    ):
        engine.error = error
        found = post(client)
        assert (found["status"], found["error"]["code"]) == (status, code)
        assert "secret" not in found["error"]["message"]
        events = stream(client)
        assert events[-1]["error"]["code"] == code
        assert "[DONE]" not in client.post(CHAT, json=make_body(stream=True)).text
    assert engine.num_open == 0


def test_a_full_queue_refuses_and_says_when_to_come_again(engine: FakeEngine):
    with make_client(make_endpoint(engine, max_batch=1, max_queue=1)) as client:
        assert post(client, n=2)["status"] == 200
        answer = client.post(CHAT, json=make_body(n=3))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert post(client, n=2)["status"] == 200


# Clients that leave, by the messages that a server gives an application


class Connection:
    """A client that sends a body, and leaves when it is told to."""

    def __init__(self, **fields: Any):
        self.body = json.dumps(make_body(**fields)).encode()
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.has_sent_body = False

    async def receive(self) -> dict[str, Any]:
        if not self.has_sent_body:
            self.has_sent_body = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def ask(self, app: Any) -> None:
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "scheme": "http", "server": ("127.0.0.1", 80), "http_version": "1.1",
        }  # fmt: skip
        await app(scope, self.receive, self.send)


async def wait_for(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(engine: FakeEngine, is_stream: bool):
    app = make_endpoint(engine)

    async def play() -> None:
        engine.gate = asyncio.Event()  # the answer waits behind its first piece
        connection = Connection(stream=is_stream, n=2)
        asked = asyncio.create_task(connection.ask(app))
        await wait_for(lambda: engine.num_open == 2)
        connection.left.set()
        await asked
        assert engine.num_open == 0
        engine.gate.set()
        other = Connection()
        await other.ask(app)
        assert other.sent[0]["status"] == 200

    asyncio.run(play())


def test_an_answer_that_takes_too_long_is_refused(engine: FakeEngine):
    app = make_endpoint(engine, request_seconds=0.05)

    async def play() -> None:
        engine.gate = asyncio.Event()
        for is_stream in (False, True):
            connection = Connection(stream=is_stream)
            await connection.ask(app)
            content = b"".join(message.get("body", b"") for message in connection.sent)
            assert b"request_timeout" in content
            assert connection.sent[0]["status"] in (200, 503)
        assert engine.num_open == 0

    asyncio.run(play())


def test_a_slow_preparation_does_not_hold_up_health(model: VisionLanguageModel):
    """Preparing waits for `/health`, which therefore has to be answered meanwhile."""
    from threading import Event

    answered = Event()

    class SlowEngine(FakeEngine):
        def prepare(self, *args: Any) -> Any:
            assert answered.wait(60)
            return super().prepare(*args)

    app = make_endpoint(SlowEngine(model))

    async def play() -> None:
        connection = Connection()
        asked = asyncio.create_task(connection.ask(app))
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "query_string": b"",
            "root_path": "", "headers": [(b"host", b"127.0.0.1")], "scheme": "http", "server": ("127.0.0.1", 80),
        }  # fmt: skip
        await app(scope, receive, send)
        assert sent[0]["status"] == 200
        answered.set()
        await asked
        assert connection.sent[0]["status"] == 200

    asyncio.run(play())


def test_pieces_of_an_answer_are_never_kept_for_a_client_that_does_not_read(engine: FakeEngine):
    """A stream that nobody takes from holds a few pieces, not the answer."""
    engine.text = "x" * 400
    drawn = 0
    original = engine.generate

    async def counted(*args: Any) -> AsyncGenerator[Any]:
        nonlocal drawn
        async for piece in original(*args):
            drawn += 1
            yield piece

    engine.generate = counted  # pyright: ignore[reportAttributeAccessIssue]
    app = make_endpoint(engine)

    async def play() -> None:
        connection = Connection(stream=True, max_tokens=400)
        stuck = asyncio.Event()

        async def send(message: Any) -> None:
            connection.sent.append(message)
            if len(connection.sent) > 3:
                stuck.set()
                await asyncio.Event().wait()

        connection.send = send  # pyright: ignore[reportAttributeAccessIssue]
        asked = asyncio.create_task(connection.ask(app))
        await stuck.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert drawn < 40
        connection.left.set()
        await asked

    asyncio.run(play())
