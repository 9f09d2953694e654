"""Models with prediction heads, on composed bodies and on every family: what is read, learned, saved and said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from tests.families.tiny_families import TINY, save_family
from tests.tiny_parts import Parts, picture
from vlm.data.collate import Collator
from vlm.data.dataset import dummy_image, model_inputs
from vlm.data.encode import encode, media_ids
from vlm.data.labelled import prompt_mask
from vlm.data.sample import Picture, Sample, Turn
from vlm.families.loading import load_family_config, load_family_model
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES
from vlm.models import VLMForPrediction, VLMPredictionConfig
from vlm.models.head_losses import head_loss

COMPOSED = {"tied": ("clip", "tied_llama"), "untied": ("dinov2", "gemma3")}
BODIES = [*COMPOSED, *TINY]

BINARY = {"name": "answer", "task": "binary", "labels": ["no", "yes"], "loss": "bce"}
EVERY = {"name": "every", "task": "multiclass", "labels": ["a", "b", "c"], "loss": "ce", "pooling": "alltoken"}
HEADS = [
    BINARY,
    EVERY,
    {"name": "below", "task": "pairwise", "loss": "margin", "pooling": "attention", "layer": 1},
]
"""The last state of the last token, the last state of every token, and an earlier one of every token."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> Callable[[str], tuple[nn.Module, Any]]:
    """A fresh body of `BODIES` in float32 with the processor that training has for it."""
    root = tmp_path_factory.mktemp("bodies")

    def load(name: str) -> tuple[nn.Module, Any]:
        if name in COMPOSED:
            return parts.model(*COMPOSED[name], template="chatml")
        if not (root / name).exists():
            save_family(name, root / name)
        config = load_family_config(str(root / name))
        body = load_family_model(str(root / name), config, dtype=torch.float32, attention="eager")
        return body, load_family_processor(str(root / name), FAMILIES[TINY[name].model_type])

    return load


@pytest.fixture(params=BODIES)
def name(request: pytest.FixtureRequest) -> str:
    """Each body."""
    return request.param


def predictor(body: Any, processor: Any, *heads: dict[str, Any], **more: Any) -> VLMForPrediction:
    """A model with these heads, which does not train."""
    config = VLMPredictionConfig(
        body_config=body.config, heads=heads or [BINARY], media_token_ids=media_ids(processor), **more
    )
    return VLMForPrediction(config, body).eval()


def batch_of(processor: Any, *numbers: int, reply: str = "a cat") -> dict[str, Tensor]:
    """Rows that show so many pictures, of different lengths, each with a reply that is supervised."""
    rows = []
    for row, number in enumerate(numbers):
        images = [picture(seed, (40 - 8 * seed, 30)) for seed in range(number)]
        asked = (*(Picture(Path()) for _ in images), "what is it?" * (row + 1))
        sample = Sample("x", (Turn("user", asked), Turn("assistant", (reply,))))
        encoded = encode(processor, sample, [image.size[::-1] for image in images])
        rows.append(model_inputs(processor, encoded, images))
    batch = Collator.of(processor, dummy_image(processor))(rows)
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    return batch


def saved_names(folder: Path) -> list[str]:
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names += list(weights.keys())
    return names


def refuse(*_: Any) -> None:
    raise AssertionError("the vocabulary head was asked")


# Every body


def test_heads_read_the_hidden_states_of_the_body(name: str, opened: Callable[[str], tuple[nn.Module, Any]]):
    """Exactly, of the last layer and of another one; the vocabulary head is not asked."""
    body, processor = opened(name)
    batch = batch_of(processor, 1, 2, 0)
    del batch["labels"]
    before = {key: value.clone() for key, value in body.state_dict().items()}
    model = predictor(body, processor, *HEADS, {**EVERY, "name": "first", "layer": 0})
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    with torch.no_grad():
        states = body(**batch, output_hidden_states=True).hidden_states
        body.get_output_embeddings().register_forward_hook(refuse)
        found = model.features(**batch)
        outputs = model(**batch).outputs
    real = batch["attention_mask"].bool()
    for head, layer in (("every", -1), ("below", 1), ("first", 0)):
        assert torch.equal(found[head][real], states[layer][real]), head
    last = [int(row.nonzero().max()) for row in real]
    assert torch.equal(found["answer"], states[-1][range(3), last])
    assert {head: tuple(one.shape) for head, one in outputs.items()} == {
        "answer": (3, 1), "every": (3, 3), "below": (3, 1), "first": (3, 3)
    }  # fmt: skip


def test_a_model_comes_back_as_it_was(
    name: str, opened: Callable[[str], tuple[nn.Module, Any]], tmp_path: Path
):
    """Equal outputs through both auto classes; weights that are tied stay so, and are saved once."""
    body, processor = opened(name)
    batch = batch_of(processor, 1, 2)
    labels = batch.pop("labels")
    model = predictor(body, processor, *HEADS)
    tied = body.get_output_embeddings().weight is body.get_input_embeddings().weight
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)  # as training would
        wanted = model(**batch)
    model.save_pretrained(tmp_path)
    assert any("lm_head" in key for key in saved_names(tmp_path)) == (not tied)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded, info = auto.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
        assert isinstance(loaded, VLMForPrediction)
        assert not any(info.values())
        found = loaded(**batch)
        assert torch.allclose(found.logits, wanted.logits, atol=1e-5)
        for head, one in wanted.outputs.items():
            assert torch.allclose(found.outputs[head], one, atol=1e-5)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        assert loaded.predict(**batch)["answer"]["predictions"] == model.predict(**batch)["answer"]["predictions"]
    assert (labels != -100).any()


def test_replies_are_learned_beside_and_not_read(name: str, opened: Callable[[str], tuple[nn.Module, Any]]):
    """The loss is the heads' and a share of the body's own; another reply leaves what heads say as it was."""
    body, processor = opened(name)
    batch = batch_of(processor, 1, 2)
    text = batch.pop("labels")
    model = predictor(body, processor, *HEADS, generation_weight=0.3)
    prompt = prompt_mask(text, batch["attention_mask"])
    labels = {"answer": torch.tensor([0.0, 1.0]), "every": torch.tensor([2, 0])}
    with torch.no_grad():
        joint = model(**batch, labels=labels, text_labels=text, prompt_mask=prompt)
        alone = model(**batch, labels=labels, prompt_mask=prompt)
        own = body(**batch, labels=text).loss
        other = {**batch, "input_ids": batch["input_ids"].where(text == -100, processor.tokenizer.eos_token_id)}
        foreseen = model(**other, prompt_mask=prompt)
    assert torch.allclose(joint.loss, alone.loss + 0.3 * own, atol=1e-5)
    for head, one in joint.outputs.items():
        assert torch.allclose(alone.outputs[head], one, atol=1e-5)
        assert torch.allclose(foreseen.outputs[head], one, atol=1e-5)


def test_a_batch_gives_each_row_what_it_would_get_alone(
    name: str, opened: Callable[[str], tuple[nn.Module, Any]]
):
    """In Llama 3.2 Vision as transformers has it, a row without a picture attends to those of others: left out."""
    body, processor = opened(name)
    model = predictor(body, processor, *HEADS)
    numbers = [1, 2, 1] if name == "mllama" else [1, 2, 0]
    with torch.no_grad():
        batch = batch_of(processor, *numbers)
        text = batch.pop("labels")
        together = model(**batch, prompt_mask=prompt_mask(text, batch["attention_mask"])).outputs
        for row in range(3):
            kept = int(batch["attention_mask"][row].sum())
            single = batch_of(processor, *numbers[: row + 1]) if row == 0 else None
            if single is None:
                continue
            text = single.pop("labels")
            assert single["input_ids"].shape[1] == kept
            alone = model(**single, prompt_mask=prompt_mask(text, single["attention_mask"])).outputs
            for head, one in together.items():
                assert torch.allclose(one[:1], alone[head], atol=1e-4), head
