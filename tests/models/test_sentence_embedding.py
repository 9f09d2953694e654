"""What sentence-transformers loads gives the vectors of `Embedder`, of composed models and of families."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families.tiny_families import TINY, save_family
from tests.tiny_parts import Parts, picture
from vlm import Embedder, VLMForPrediction, VLMPredictionConfig
from vlm.assembly.family import load_family_config, load_family_model
from vlm.data.encoding.labels import get_media_token_ids
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES
from vlm.models.sentence_embedding import SentenceEmbedding

HEAD: dict[str, Any] = {
    "name": "label", "task": "embedding", "loss": "infonce", "type": "linear", "dim": 12,
    "prompts": {"query": "Find it."},
}  # fmt: skip
TEXTS = ["a dog", "an aeroplane in the sky", "x"]


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeds")
    body, processor = parts.model("clip", "llama")
    config = VLMPredictionConfig(body.config, heads=[HEAD], media_token_ids=[processor.image_token_id])
    torch.manual_seed(1)
    VLMForPrediction(config, body).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def encode(module: SentenceEmbedding, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
    with torch.no_grad():
        return module(module.preprocess(inputs, prompt=prompt))["sentence_embedding"].numpy()


def check_equal(module: SentenceEmbedding, embedder: Embedder) -> None:
    images = [picture(number) for number in range(3)]
    blank = [""] * 3
    alone = [[image] for image in images]
    assert np.allclose(encode(module, TEXTS), embedder.embed(TEXTS), atol=1e-5)
    assert np.allclose(encode(module, TEXTS, "Find it."), embedder.embed(TEXTS, side="query"), atol=1e-5)
    assert np.allclose(encode(module, images), embedder.embed(blank, alone), atol=1e-5)
    both = [{"text": text, "image": image} for text, image in zip(TEXTS, images, strict=True)]
    assert np.allclose(encode(module, both), embedder.embed(TEXTS, alone), atol=1e-5)
    mixed = encode(module, [TEXTS[0], images[1], both[2]])
    assert np.allclose(mixed, embedder.embed([TEXTS[0], "", TEXTS[2]], [[], alone[1], alone[2]]), atol=1e-5)


def test_a_composed_model(checkpoint: Path):
    module = SentenceEmbedding.load(str(checkpoint), trust_remote_code=True)
    check_equal(module, Embedder.load(checkpoint, device="cpu"))
    assert module.get_sentence_embedding_dimension() == 12
    message = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}]}]
    assert np.allclose(encode(module, [message]), encode(module, TEXTS[:1]))


WITHOUT_TEMPLATE = {"paligemma": "`images` are expected", "phi4-multimodal": "does not have a chat template"}
"""Families whose own processors render no conversation of texts alone -> what they say."""


def save_with_head(name: str, folder: Path) -> Path:
    """The folder of a family's tiny model with a head that embeds."""
    save_family(name, folder / "family")
    config = load_family_config(str(folder / "family"))
    processor = load_family_processor(str(folder / "family"), FAMILIES[TINY[name].model_type])
    body = load_family_model(str(folder / "family"), config, dtype=torch.float32, attention="eager")
    heads = [{**HEAD, "prompts": {}}]
    settings = VLMPredictionConfig(body.config, heads=heads, media_token_ids=get_media_token_ids(processor))
    VLMForPrediction(settings, body).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("name", WITHOUT_TEMPLATE)
def test_a_family_without_a_chat_template_is_refused(name: str, tmp_path: Path):
    module = SentenceEmbedding.load(str(save_with_head(name, tmp_path)), trust_remote_code=True)
    with pytest.raises(ValueError, match=WITHOUT_TEMPLATE[name]):
        module.preprocess(["a dog"])


@pytest.mark.parametrize("name", [name for name in TINY if name not in WITHOUT_TEMPLATE])
def test_a_family(name: str, tmp_path: Path):
    folder = save_with_head(name, tmp_path)
    module = SentenceEmbedding.load(str(folder), trust_remote_code=True)
    embedder = Embedder.load(folder, device="cpu")
    images = [picture(number) for number in range(2)]
    assert np.allclose(encode(module, TEXTS[:2]), embedder.embed(TEXTS[:2]), atol=1e-5)
    both = [{"text": text, "image": image} for text, image in zip(TEXTS, images, strict=False)]
    expected = embedder.embed(TEXTS[:2], [[image] for image in images])
    assert np.allclose(encode(module, both), expected, atol=1e-5)


def test_what_sentence_transformers_looks_for_is_in_the_checkpoint(checkpoint: Path, tmp_path: Path):
    (module,) = json.loads((checkpoint / "modules.json").read_text())
    assert module["type"] == "sentence_embedding.SentenceEmbedding"
    config = json.loads((checkpoint / "config_sentence_transformers.json").read_text())
    assert config["prompts"] == HEAD["prompts"]
    assert config["default_prompt_name"] is None
    SentenceEmbedding.load(str(checkpoint)).save(str(tmp_path / "again"))
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"modules.json", "sentence_embedding.py", "contrastive.py", "model.safetensors"} <= names


def test_sentence_transformers_itself(checkpoint: Path, tmp_path: Path):
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    place = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    model = package.SentenceTransformer(str(place), trust_remote_code=True, device="cpu")
    embedder = Embedder.load(checkpoint, device="cpu")
    images = [picture(number) for number in range(2)]
    assert np.allclose(model.encode(TEXTS), embedder.embed(TEXTS), atol=1e-5)
    assert np.allclose(model.encode_query(TEXTS), embedder.embed(TEXTS, side="query"), atol=1e-5)
    assert np.allclose(model.encode(images), embedder.embed(["", ""], [[image] for image in images]), atol=1e-5)
    both = {"text": "a dog", "image": images[0]}
    assert np.allclose(model.encode([both]), embedder.embed(["a dog"], [[images[0]]]), atol=1e-5)
    short = model.encode(TEXTS, truncate_dim=4)
    assert np.allclose(short / np.linalg.norm(short, axis=1)[:, None], embedder.embed(TEXTS, width=4), atol=1e-5)
