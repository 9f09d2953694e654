"""Vectors of texts and images, of a file of records, in an endpoint and in sentence-transformers' module: all equal."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from tests.command_line import refusal
from tests.inference.serving.running import NAME, make_client, to_part
from tests.tiny_parts import Parts, picture
from vlm import Embedder, VLMForPrediction, VLMPredictionConfig
from vlm.cli.main import main
from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.app import make_embeddings_app
from vlm.inference.serving.service import Service
from vlm.inference.vector_table import ids_path
from vlm.web.guard import RequestGuard

PROMPTS = {"query": "Find it.", "document": "Represent it."}
WIDTH = 32


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained head that embeds, with system turns of both sides."""
    folder = tmp_path_factory.mktemp("embeds")
    body, processor = parts.model("clip", "llama")
    head = {"name": "label", "task": "embedding", "loss": "infonce", "type": "identity", "prompts": PROMPTS}
    config = VLMPredictionConfig(body.config, heads=[head], media_token_ids=[processor.image_token_id])
    torch.manual_seed(1)
    VLMForPrediction(config, body).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(checkpoint: Path) -> Embedder:
    return Embedder.load(checkpoint, device="cpu")


def test_sides_widths_and_images_make_other_vectors(embedder: Embedder):
    vectors = embedder.embed(["a dog", ""], [[], [picture(0)]])
    assert vectors.shape == (2, WIDTH)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    short = embedder.embed(["a dog"], width=4)
    assert np.allclose(short[0], vectors[0, :4] / np.linalg.norm(vectors[0, :4]), atol=1e-6)
    assert not np.allclose(embedder.embed(["a dog"], side="query"), vectors[:1], atol=1e-3)
    own = embedder.embed(["a dog"], system_prompt=PROMPTS["query"])
    assert np.array_equal(own, embedder.embed(["a dog"], side="query"))


@pytest.mark.parametrize(
    ("options", "problem"), [({"side": "passage"}, "allowed are query, document"), ({"width": 33}, "have 32 numbers")]
)
def test_what_there_is_not_is_refused(options: dict[str, Any], problem: str, embedder: Embedder):
    with pytest.raises(ValueError, match=problem):
        embedder.embed(["a dog"], **options)


def write_records(folder: Path) -> Path:
    picture(1).save(folder / "a.png")
    records: list[dict[str, Any]] = [
        {"id": "0", "query": {"image": "a.png"}, "positive": "a cat", "negatives": ["a dog"]},
        {"id": "1", "query": {"image": "none.png"}, "positive": "a dog"},
        {"id": "2", "query": {"text": "which?", "image": "a.png", "instruction": "Own."}, "positive": "a fish"},
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".npy"])
def test_a_file_of_records_becomes_vectors(
    suffix: str, checkpoint: Path, embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records, output = write_records(tmp_path), tmp_path / f"vectors{suffix}"
    words = ["predict", str(checkpoint), "--input", str(records), "--format", "pair", "--output", str(output),
             "--num-workers", "0", "--device", "cpu"]  # fmt: skip
    main([*words, "--side", "query", "--width", "8"])
    assert "3 records" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output if suffix == ".jsonl" else ids_path(output)).read_text().splitlines()]
    assert [row["source"] for row in rows] == ["0", "1", "2"]
    assert "none.png does not exist" in rows[1]["error"]
    found = np.array([row["vector"] or [np.nan] * 8 for row in rows]) if suffix == ".jsonl" else np.load(output)
    assert found.shape == (3, 8)
    assert np.isnan(found[1]).all()
    image = Image.open(tmp_path / "a.png")
    assert np.allclose(found[0], embedder.embed([""], [[image]], side="query", width=8)[0], atol=1e-5)
    assert np.allclose(found[2], embedder.embed(["which?"], [[image]], system_prompt="Own.", width=8)[0], atol=1e-5)
    assert not list(tmp_path.glob("*.partial*"))
    main([*words, "--overwrite"])
    whole = np.load(output)[1] if suffix == ".npy" else json.loads(output.read_text().splitlines()[2])["vector"]
    expected = None if suffix == ".npy" else embedder.embed(["a fish"])[0]
    assert np.isnan(whole).all() if expected is None else np.allclose(whole, expected, atol=1e-5)


def test_one_prompt_is_printed_as_json(checkpoint: Path, embedder: Embedder, capsys: pytest.CaptureFixture[str]):
    main(["predict", str(checkpoint), "--prompt", "a dog", "--side", "query", "--device", "cpu"])
    assert np.allclose(json.loads(capsys.readouterr().out), embedder.embed(["a dog"], side="query")[0], atol=1e-6)


def test_a_table_ends_as_vectors_can(checkpoint: Path, tmp_path: Path):
    words = ["predict", str(checkpoint), "--input", str(write_records(tmp_path)), "--output", str(tmp_path / "v.csv")]
    assert "must end in .jsonl or .npy" in refusal(*words, "--format", "pair")


@pytest.fixture(scope="module")
def client(embedder: Embedder) -> Iterator[TestClient]:
    app: Any = None
    reason = RequestGuard(app, "127.0.0.1").refusal_reason
    with make_client(make_embeddings_app(Service(NAME, ServingConfig()), embedder, reason)) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client: TestClient) -> Callable[..., dict[str, Any]]:
    return lambda **fields: client.post("/v1/embeddings", json={"model": NAME, **fields}).json()


def test_the_endpoint_answers_with_the_heads_vectors(ask: Callable[..., dict[str, Any]], embedder: Embedder):
    found = ask(input=["a dog", "a cat"], dimensions=8)
    vectors = np.array([item["embedding"] for item in found["data"]])
    assert np.allclose(vectors, embedder.embed(["a dog", "a cat"], width=8), atol=1e-5)
    assert "trained to embed" in found["pooling"]
    queries = ask(input="a dog", input_type="query", encoding_format="base64")["data"][0]["embedding"]
    unpacked = struct.unpack(f"<{WIDTH}f", base64.b64decode(queries))
    assert np.allclose(unpacked, embedder.embed(["a dog"], side="query")[0], atol=1e-5)
    shown = picture(2)
    message = {"role": "user", "content": [to_part(shown), {"type": "text", "text": "\na dog"}]}
    found = ask(messages=[message])["data"][0]["embedding"]
    assert np.allclose(found, embedder.embed(["a dog"], [[shown]])[0], atol=1e-5)
    assert ask(input="a dog", dimensions=64)["error"]["param"] == "dimensions"


def test_other_paths_say_what_this_model_does(client: TestClient):
    answer = client.post("/v1/classify", json={"model": NAME, "input": "a dog"})
    assert answer.status_code == 404
    assert "/v1/embeddings" in answer.json()["error"]["message"]
