"""The balance loss of mixtures of experts: added as transformers' own code adds it, and switched by its key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.small_language_models import small_config
from tests.tiny_parts import Parts, byte_tokenizer
from tests.train.step.test_packing import Ready, items
from vlm.assembly.compose import build_model, compose
from vlm.models.text_loss import SupervisedScores, add_balance_loss

KINDS = ("mixtral", "qwen3_moe", "granitemoe", "olmoe")


def save(folder: Path, kind: str, **changes: Any) -> Path:
    """A small language model with its tokenizer."""
    tokenizer = byte_tokenizer("chatml")
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = small_config(kind, **ids)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build(parts: Parts, folder: Path, coefficient: float | None) -> tuple[Any, Any]:
    recipe = parts.recipe()
    recipe.language_model.hf_name = str(folder)
    recipe.language_model.balance_loss = coefficient
    config, processor = compose(recipe, "chatml", None)
    return build_model(recipe, config, processor, torch.float32, 0).eval(), processor


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_language_models_own_code(parts: Parts, tmp_path: Path, kind: str):
    """Padding is left out; in the loss of the whole model, and in the one that is computed in the head's call."""
    model, processor = build(parts, save(tmp_path, kind), 0.3)
    batch = Ready(processor)(items(processor))
    embeddings = model.merge_images(batch["input_ids"], batch["pixel_values"])
    own: PreTrainedModel = model.language_model
    expected = own(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert float(expected.aux_loss) > 0
    found = model(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    losses, _, outputs = SupervisedScores(model)(batch)
    loss = add_balance_loss(losses.mean(), outputs, model.config.text_config, losses.numel(), None)
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    routers = [p.grad for name, p in own.named_parameters() if "gate" in name or "router" in name]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in routers)


def test_batches_of_a_step_add_their_share(parts: Parts, tmp_path: Path):
    model, processor = build(parts, save(tmp_path, "mixtral"), 0.5)
    batches = [Ready(processor)([item]) for item in items(processor)[:2]]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    parts_of_loss = [model(**batch, num_items_in_batch=sum(counts)) for batch in batches]
    alone = [model(**batch) for batch in batches]
    expected = sum(outputs.loss * count for outputs, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(sum(outputs.loss for outputs in parts_of_loss), expected)


def test_the_configuration_or_the_key_decides(parts: Parts, tmp_path: Path):
    plain = save(tmp_path / "plain", "mixtral")
    asks = save(tmp_path / "asks", "mixtral", output_router_logits=True, router_aux_loss_coef=0.07)
    for folder, coefficient, expected in (
        (plain, None, None), (plain, 0.2, 0.2), (asks, None, 0.07), (asks, 0.2, 0.2), (asks, 0.0, None),
    ):  # fmt: skip
        model, processor = build(parts, folder, coefficient)
        outputs = model(**Ready(processor)(items(processor)))
        assert (outputs.aux_loss is None) == (expected is None)
        if expected is not None:
            assert model.config.text_config.router_aux_loss_coef == expected
    with pytest.raises(ValueError, match=r"balance_loss=0.1: .*deepseek_v3\) has no loss that balances experts"):
        build(parts, save(tmp_path / "other", "deepseek_v3"), 0.1)


def test_a_run_logs_it_and_a_later_one_ends_it(train: Callable[..., Path], tmp_path: Path):
    words = (
        f"model.language_model.hf_name={save(tmp_path / 'lm', 'mixtral')}", "trainer.max_steps=2",
        "trainer.num_samples=0", "trainer.learning_rate.language_model_learning_rate=1e-3", "dataset.template=chatml",
    )  # fmt: skip
    run = train("finetune-smol", tmp_path / "run", *words, "model.language_model.balance_loss=0.1")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["balance_loss"] for line in logged if "balance_loss" in line]
    assert len(values) == 2
    assert min(values) > 0.5
    start = f"trainer.from_pretrained={run / 'final'}"
    later = train("finetune-smol", tmp_path / "later", *words, start, "model.language_model.balance_loss=0")
    assert "balance_loss" not in (later / "metrics.jsonl").read_text()
    kept = json.loads((run / "final" / "config.json").read_text())["text_config"]
    ended = json.loads((later / "final" / "config.json").read_text())["text_config"]
    assert (kept["output_router_logits"], kept["router_aux_loss_coef"]) == (True, 0.1)
    assert not ended.get("output_router_logits")
