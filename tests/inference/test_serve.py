"""The OpenAI-compatible endpoint: answers as those of `vlm generate`, streamed or whole, and what it refuses."""

import base64
import copy
import functools
import io
import json
import operator
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.command_line import refusal
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts, picture
from vlm.cli.serve import get_default_name
from vlm.config.schema import InferenceConfig
from vlm.data.sample import ImageRef, Turn
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.serve import make_app


@pytest.fixture(scope="module")
def model(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


@pytest.fixture(scope="module")
def client(model: VisionLanguageModel) -> TestClient:
    return TestClient(make_app(model, "tiny", ["127.0.0.1"]), base_url="http://127.0.0.1")


def to_data_url(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def post_chat(client: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "what?"}], "max_tokens": 12, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    return {"status": answer.status_code, **answer.json()}


CONVERSATION = [
    {"role": "user", "content": [to_data_url(picture(0)), {"type": "text", "text": "what is this?"}]},
    {"role": "assistant", "content": "a thing"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "and"}, to_data_url(picture(1)), {"type": "text", "text": "?"}],
    },
]


@pytest.fixture(scope="module")
def expected(model: VisionLanguageModel) -> str:
    turns = [
        Turn("user", (ImageRef(), "\nwhat is this?")), Turn("assistant", ("a thing",)),
        Turn("user", ("and", ImageRef(), "?")),
    ]  # fmt: skip
    return model.answer([turns], [[picture(0), picture(1)]], InferenceConfig(max_new_tokens=12))[0]


def test_a_conversation_with_images_gets_the_answer_of_the_model(client: TestClient, expected: str):
    found = post_chat(client, messages=CONVERSATION)
    assert found["choices"][0]["message"]["content"].strip() == expected
    assert found["usage"]["completion_tokens"] <= 12
    assert found["model"] == "tiny"


def test_a_stream_is_the_same_answer_in_pieces(client: TestClient, expected: str):
    body = {"model": "tiny", "messages": CONVERSATION, "max_tokens": 12, "stream": True}
    text, pieces = "", 0
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
                text, pieces = text + (piece or ""), pieces + bool(piece)
    assert text.strip() == expected
    assert pieces > 1


def test_a_seed_repeats_what_is_sampled(client: TestClient):
    drawn = [
        post_chat(client, temperature=1.5, seed=seed)["choices"][0]["message"]["content"] for seed in (1, 1, 2)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_ends_at_what_a_request_names(client: TestClient):
    whole = post_chat(client)["choices"][0]["message"]["content"]
    end = next(one for one in whole[2:] if one.isascii())
    cut = post_chat(client, stop=[end])["choices"][0]["message"]["content"]
    assert cut == whole[: whole.index(end) + 1] != whole


@pytest.mark.parametrize(("fields", "words"), [
    ({"model": "another"}, "pinned to 'tiny'"),
    ({"n": 3}, "n=3"),
    ({"tools": [{"type": "function"}]}, "tools="),
    ({"temperature": -1}, "temperature=-1: a number from 0 to 2"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"messages": []}, "at least one message"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role must be one of system, developer, user, assistant"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0]: content must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "content[0]: type must be"),
    ({"messages": [{"role": "user", "content": "a " * 4000}]}, "tokens; the model takes fewer than"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_words(client: TestClient, fields: dict[str, Any], words: str):
    found = post_chat(client, **fields)
    assert found["status"] == 400
    assert words in found["error"]["message"]


WHOLE_REQUEST: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "stream": False,
    "frequency_penalty": 0.5,
    "n": 1,
    "tools": [],
    "user": "me",
    "chat_template_kwargs": {},
    "logprobs": False,
    "messages": [
        {"role": "developer", "content": "be brief", "name": "x"},
        {"role": "user", "content": [to_data_url(picture(0)), {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a thing", "tool_calls": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": to_data_url(picture(1))["image_url"]["url"]}]},
    ],
}
WRONG_VALUES = (None, True, -1, 1e-300, 2**70, "", "\ud83d", [None], {"type": None})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of a request, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_whatever_is_missing_or_of_another_type_is_no_internal_error(client: TestClient):
    """Each value of a request at each depth, left out or replaced; the client raises what the server raises."""
    assert client.post("/v1/chat/completions", json=WHOLE_REQUEST).status_code == 200
    refused = 0
    for path in places(WHOLE_REQUEST):
        for wrong in ("left out", *WRONG_VALUES):
            body = copy.deepcopy(WHOLE_REQUEST)
            owner = functools.reduce(operator.getitem, path[:-1], body)
            if wrong == "left out":
                del owner[path[-1]]
            else:
                owner[path[-1]] = wrong
            header = {"content-type": "application/json"}  # `json=` refuses half of a surrogate pair
            answer = client.post("/v1/chat/completions", content=json.dumps(body), headers=header)
            assert answer.status_code in (200, 400), (path, wrong, answer.text)
            if answer.status_code == 400:
                assert answer.json()["error"]["message"], (path, wrong)
                refused += 1
    assert refused > 200


def test_the_place_of_a_malformed_item_is_named(client: TestClient):
    for item in ({"type": "image_url"}, {"type": "image_url", "url": "data:image/png;base64,AA"}, "what?", None):
        found = post_chat(client, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, item]}])
        assert found["status"] == 400
        assert "messages[0].content[1]" in found["error"]["message"]
    for content in ("[1]", "no JSON"):
        header = {"content-type": "application/json"}
        assert client.post("/v1/chat/completions", content=content, headers=header).status_code == 400


def test_the_developer_is_the_system(client: TestClient):
    asked = {"role": "user", "content": "what?"}
    answers = [
        post_chat(client, messages=[{"role": role, "content": "be brief"}, asked])["choices"][0]["message"]["content"]
        for role in ("system", "developer")
    ]
    assert answers[0] == answers[1]


def test_a_text_of_a_megabyte_is_refused_at_once(client: TestClient):
    found = post_chat(client, messages=[{"role": "user", "content": "word " * 200_000}])
    assert found["status"] == 400
    assert "tokens; the model takes fewer than" in found["error"]["message"]


@pytest.mark.parametrize(("url", "words"), [
    ("http://127.0.0.1:9/cat.png", "addresses are not fetched"),
    ("file:///etc/hostname", "addresses are not fetched"),
    ("/etc/hostname", "addresses are not fetched"),
    ("data:text/plain;base64,AAAA", "data:image/png;base64"),
    ("data:image/png;base64,@@@", "base64 does not decode"),
    ("data:image/png;base64,AAAA", "does not open"),
])  # fmt: skip
def test_images_come_with_the_request_and_from_nowhere_else(client: TestClient, url: str, words: str):
    found = post_chat(
        client, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    )
    assert found["status"] == 400
    assert words in found["error"]["message"]


def test_a_page_of_another_site_does_not_reach_it(client: TestClient):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models", headers={"host": "rebound.example"}).status_code == 400


def test_a_checkpoint_is_called_by_its_run(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cats" / "final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [get_default_name(name) for name in ("cats/final", "cats", "me/cats-7b")] == ["cats", "cats", "me/cats-7b"]
    assert "vlm serve: nowhere/at/all: no such folder" in refusal("serve", "nowhere/at/all")
