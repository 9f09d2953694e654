"""What stands before every path: the key, names and sites, paths and methods, counters."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.inference.serving.fake_engine import FakeEngine
from tests.inference.serving.running import CHAT, make_body, make_client, make_endpoint
from vlm.inference.generate import VisionLanguageModel


@pytest.fixture(scope="module")
def client(model: VisionLanguageModel) -> Iterator[TestClient]:
    with make_client(make_endpoint(FakeEngine(model), key="a-secret")) as client:
        yield client


KEY = {"authorization": "Bearer a-secret"}


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", "a-secret", "Basic a-secret", "Bearer a-secret2", "Bearer ä"]
)
def test_requests_need_the_key(client: TestClient, given: str | None):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/nowhere"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.post(CHAT, json=make_body(), headers=headers).status_code == 401
    assert client.get("/health", headers=headers).json() == {"status": "ok"}


def test_the_key_opens(client: TestClient):
    assert client.post(CHAT, json=make_body(), headers=KEY).status_code == 200
    assert client.get("/v1/models", headers=KEY).json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny", headers=KEY).json()["object"] == "model"
    answer = client.get("/v1/models/a/b", headers=KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("headers", [
    {"host": "rebound.example"}, {"host": "[::1"}, {"host": ""}, {"origin": "http://other.example"},
    {"origin": "http://[::1"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
])  # fmt: skip
def test_other_names_and_other_sites_are_not_answered(client: TestClient, headers: dict[str, str]):
    answer = client.post(CHAT, json=make_body(), headers={**KEY, **headers})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
def test_this_machine_is_answered(client: TestClient, host: str):
    assert client.get("/v1/models", headers={**KEY, "host": host}).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", CHAT, 405), ("DELETE", CHAT, 405), ("OPTIONS", CHAT, 405), ("POST", "/v1/models", 405),
    ("POST", "/health", 405), ("POST", "/v1/chat/completions/", 404), ("POST", "/v1/classify", 404),
    ("POST", "/v1/completions", 404), ("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/v1/../health", 404),
    ("GET", "/%00%0d%0a", 404), ("BREW", "/health", 405),
])  # fmt: skip
def test_paths_and_methods_that_are_not_there(client: TestClient, method: str, path: str, status: int):
    answer = client.request(method, path, headers=KEY)
    assert answer.status_code in (status, 200 if path == "/v1/../health" else status)
    if answer.status_code != 200:
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert ("allow" in answer.headers) == (status == 405)


def test_metrics_count(client: TestClient):
    assert client.post(CHAT, json=make_body(), headers=KEY).status_code == 200
    answer = client.get("/metrics", headers=KEY)
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(lines['vlm_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(lines['vlm_requests_total{path="/v1/chat/completions",status="401"}']) >= 1
    assert float(lines["vlm_answer_tokens_total"]) >= 12
    assert float(lines["vlm_prompt_tokens_total"]) > 0
    assert float(lines["vlm_first_token_seconds_count"]) >= 1
    assert {"vlm_answers_running", "vlm_answers_waiting", "vlm_places_taken"} <= lines.keys()


def test_answers_are_no_pages(client: TestClient):
    headers = client.get("/health").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
