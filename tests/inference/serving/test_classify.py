"""`/v1/classify`: predictions of all heads, as `Predictor` makes them, in vLLM's form with thresholds beside."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from tests.inference.serving.running import CHAT, NAME, make_client, to_part
from tests.inference.test_predict import HEADS
from tests.tiny_parts import Parts, picture
from vlm import Predictor, VLMForPrediction, VLMPredictionConfig
from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.app import make_classify_app
from vlm.inference.serving.batcher import Batcher
from vlm.inference.serving.service import Service
from vlm.web.guard import RequestGuard

PATH = "/v1/classify"


@pytest.fixture(scope="module")
def predictor(parts: Parts) -> Predictor:
    body, processor = parts.model("clip", "llama")
    settings = [{"name": name, "loss": "", "pooling": "last", **head} for name, head in HEADS.items()]
    config = VLMPredictionConfig(body.config, heads=settings, media_token_ids=[processor.image_token_id])
    torch.manual_seed(1)
    return Predictor(VLMForPrediction(config, body).eval(), processor)


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    service = Service(NAME, ServingConfig(max_inputs=5, max_batch=2))
    with make_client(make_classify_app(service, predictor, RequestGuard(None, "127.0.0.1").refusal_reason)) as client:
        yield client


def post(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={"model": NAME, **fields})
    return {"status": answer.status_code, **answer.json()}


def test_texts_get_the_predictions_of_the_predictor(client: TestClient, predictor: Predictor):
    texts = ["what colour?", "what colour really?", "which?"]  # more than a batch
    found = post(client, input=texts)
    assert found["object"] == "list"
    assert [item["index"] for item in found["data"]] == [0, 1, 2]
    for item, expected in zip(found["data"], predictor.predict(texts), strict=True):
        assert item["label"] == expected["kind"].prediction
        assert item["probs"] == pytest.approx(list(expected["kind"].probabilities.values()), abs=1e-5)
        assert item["num_classes"] == 3
        assert item["heads"].keys() == HEADS.keys()
        for name, head in item["heads"].items():
            assert head["task"] == HEADS[name]["task"]
            assert head["score"] == pytest.approx(expected[name].score, abs=1e-5)
            assert head["probabilities"].keys() == {str(label) for label in expected[name].probabilities}
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0


def test_thresholds_and_numbers_stand_beside(client: TestClient):
    heads = post(client, input="what colour?")["data"][0]["heads"]
    assert heads["warm"]["threshold"] == 0.3
    assert heads["warm"]["prediction"] == ("yes" if heads["warm"]["probabilities"]["yes"] >= 0.3 else "no")
    assert heads["tags"]["threshold"] == {"red": 0.2, "green": 0.9, "blue": 0.5}
    assert heads["kind"]["threshold"] is None
    assert isinstance(heads["size"]["prediction"], float)
    assert heads["rank"]["prediction"] in (1, 2, 3)


def test_a_conversation_has_images(client: TestClient, predictor: Predictor):
    content = [to_part(picture(0)), {"type": "text", "text": "what colour?"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    found = post(client, messages=messages)["data"][0]["heads"]["kind"]
    expected = predictor.predict("<image>\nwhat colour?", [picture(0)], system_prompt="be brief")["kind"]
    assert list(found["probabilities"].values()) == pytest.approx(list(expected.probabilities.values()), abs=1e-5)


@pytest.mark.parametrize(("fields", "param"), [
    ({}, "input"), ({"input": []}, "input"), ({"input": ["a", 5]}, "input[1]"),
    ({"input": "a", "messages": []}, "messages"),
    ({"input": ["a"] * 6}, "input"), ({"input": [1, 2]}, "input[0]"), ({"input": "a", "stream": True}, "stream"),
    ({"input": "word " * 2000}, "input[0]"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"input": "a", "model": "another"}, "model"),
])  # fmt: skip
def test_malformed_requests_are_refused_by_name(client: TestClient, fields: dict[str, Any], param: str):
    found = post(client, **fields)
    assert found["status"] in (400, 404)
    assert found["error"]["param"] == param


def test_it_writes_no_text_and_says_so(client: TestClient):
    answer = client.post(CHAT, json={"model": NAME, "messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 404
    assert "/v1/classify" in answer.json()["error"]["message"]


def test_prompts_that_wait_share_a_batch(predictor: Predictor):
    """A failure of one batch is that of its prompts; a caller that left takes no place."""
    sizes: list[int] = []

    def run(inputs: dict[str, torch.Tensor]) -> list[int]:
        sizes.append(len(inputs["input_ids"]))
        if 7 in inputs["input_ids"]:
            raise ValueError("seven")
        return inputs["attention_mask"].sum(dim=1).tolist()

    def row(*ids: int) -> dict[str, Any]:
        return {"input_ids": [*ids], "labels": [-100] * len(ids)}

    async def play() -> None:
        batcher = Batcher(predictor.processor, torch.device("cpu"), run, max_batch=2)
        left = asyncio.create_task(batcher.run([row(1)] * 10))
        await asyncio.sleep(0)
        left.cancel()
        results = await asyncio.gather(batcher.run([row(1), row(1, 2)]), batcher.run([row(1, 2, 3)]))
        assert results == [[1, 2], [3]]
        with pytest.raises(ValueError, match="seven"):
            await batcher.run([row(7)])
        batcher.close()

    asyncio.run(play())
    assert len(sizes) <= 4
    assert max(sizes) == 2
