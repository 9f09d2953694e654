"""Log-probabilities of both sides equal those of whole logits; copies are frozen, and adapters switch off."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_parts import Parts
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.preference_schema import PreferenceOptions
from vlm.config.schema import LoraConfig, LoraPartConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import load_dataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.preference import CHOSEN, REJECTED, PreferenceEncoder
from vlm.data.preference.collator import PREFERENCE_KEYS, PreferenceCollator
from vlm.data.preference.dataset import PreferenceDataset
from vlm.data.skipped import Skipped
from vlm.models.text_loss import SupervisedScores
from vlm.train.lora import add_adapter
from vlm.train.preference.losses import record_losses
from vlm.train.preference.reference import AdapterReference, CopyReference, fingerprint_weights
from vlm.train.preference.scores import WholeDataset, score_batch

RECORDS: list[dict[str, Any]] = [
    {"image": "0.png", "question": "which?", "chosen": "a red square", "rejected": "no"},
    {"question": "one?", "chosen": "1", "rejected": "two and more"},
]


@pytest.fixture(scope="module")
def loaded(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PreferenceDataset]:
    folder = tmp_path_factory.mktemp("scores")
    Image.new("RGB", (24, 24), "red").save(folder / "0.png")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    model, processor = parts.model("clip", "llama")
    encoder = PreferenceEncoder(processor, 500, truncate=False)
    config = DatasetConfig(path=str(folder / "pairs.jsonl"), format="preference", cache_dir=str(folder / "cache"))
    return model.eval(), PreferenceDataset(load_dataset(config, encoder))


def make_batch(dataset: PreferenceDataset, items: list[Any] | None = None) -> dict[str, Any]:
    processor = dataset.dataset.processor
    collate = PreferenceCollator(Collator.of(processor, deduplicate=("pixel_values",)))
    batch: dict[str, Any] = dict(collate([dataset[0], dataset[1]] if items is None else items))
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def plain_log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The sum of log-probabilities of each row's supervised tokens."""
    inputs = {name: value for name, value in batch.items() if name not in (*PREFERENCE_KEYS, "labels")}
    log_probs = model(**inputs).logits.float().log_softmax(-1)
    rows = []
    for row, labels in zip(log_probs, batch["labels"], strict=True):
        places = [place for place, label in enumerate(labels.tolist()) if label != IGNORE_INDEX]
        rows.append(sum(row[place - 1, labels[place]] for place in places))
    return torch.stack(rows)


def test_scores_equal_those_of_whole_logits(loaded: tuple[Any, PreferenceDataset]):
    model, dataset = loaded
    batch = make_batch(dataset)
    sides, _, _ = score_batch(SupervisedScores(model), batch)
    expected = plain_log_probs(model, batch)
    assert torch.allclose(sides.log_probs[:, :2], expected.reshape(2, 2).T, atol=1e-4)
    assert sides.is_there.tolist() == [[True, True, False]] * 2
    supervised = (batch["labels"] != IGNORE_INDEX).sum(dim=1).reshape(2, 2).T
    assert torch.equal(sides.tokens[:, :2].long(), supervised)


def test_the_gradient_of_a_loss_equals_that_of_a_plain_one(loaded: tuple[Any, PreferenceDataset]):
    model, dataset = loaded
    batch = make_batch(dataset)
    weight = model.language_model.model.layers[0].mlp.up_proj.weight
    options = PreferenceOptions(beta=0.5)
    sides, _, _ = score_batch(SupervisedScores(model), batch)
    loss = record_losses(replace(sides, reference=torch.zeros_like(sides.log_probs)), options).mean()
    found = torch.autograd.grad(loss, weight)[0]
    chosen, rejected = plain_log_probs(model, batch).reshape(2, 2)
    plain = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
    assert torch.allclose(found, torch.autograd.grad(plain, weight)[0], atol=1e-6)


def test_a_batch_without_records_has_no_loss_and_reaches_every_parameter(loaded: tuple[Any, PreferenceDataset]):
    model, dataset = loaded
    batch = make_batch(dataset, [Skipped(0, "0", "broken", None, "pairs")])
    sides, mean, _ = score_batch(SupervisedScores(model), batch)
    assert sides.log_probs.shape == (0, 3)
    assert float(mean.detach()) == 0
    assert mean.requires_grad


def test_records_that_cannot_be_used_keep_their_place(loaded: tuple[Any, PreferenceDataset], tmp_path: Path):
    model, dataset = loaded
    whole = WholeDataset(dataset)
    source = dataset.dataset.sources[0]
    folder, source.folder = source.folder, tmp_path
    items = [whole[index] for index in range(len(whole))]
    source.folder = folder
    assert [item["roles"] for item in items] == [[], [CHOSEN, REJECTED]]
    sides, _, _ = score_batch(SupervisedScores(model), make_batch(dataset, items))
    assert sides.is_there[:, 0].tolist() == [False, True]


def test_a_reference_without_adapters_says_what_a_copy_says(parts: Parts, loaded: tuple[Any, PreferenceDataset]):
    _, dataset = loaded
    model, _ = parts.model("clip", "llama")
    batch = make_batch(dataset)
    start = plain_log_probs(model.eval(), batch).detach().reshape(2, 2).T
    before = fingerprint_weights(model)
    add_adapter(model, LoraConfig(language_model=LoraPartConfig(r=4)), 0, torch.float32)
    trainer: Any = None
    copied = CopyReference(model, SimpleNamespace(device=torch.device("cpu")))  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    without = AdapterReference()
    scores = SupervisedScores(model)
    without.prepare(trainer, scores)
    copied.prepare(trainer, scores)
    model.train()
    trained = score_batch(scores, batch)[0].log_probs
    for reference in (without, copied):
        said = reference.training(batch)
        assert not said.requires_grad
        assert torch.allclose(said[:, :2], start, atol=1e-4)
        assert not torch.allclose(said[:, :2], trained[:, :2], atol=1e-2)
    assert model.training
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert fingerprint_weights(model) != before
