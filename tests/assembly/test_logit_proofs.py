"""What training takes for granted of a model: true models pass, in both precisions; each fault is found and named."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from tests.families.tiny_families import TINY, save_family
from tests.tiny_parts import LANGUAGE_MODELS, WIDTH, Parts, byte_tokenizer
from vlm.assembly.compose import build_model, compose
from vlm.assembly.family import load_family_config, load_family_model
from vlm.assembly.logit_proofs import check_causal, check_padding, choose_tokens, dropout_off, model_label
from vlm.config.schema import RunConfig
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES

LABEL = "model.language_model.hf_name=x"


def prove(model: Any, processor: Any) -> None:
    check_causal(model, processor, LABEL)
    check_padding(model, processor, LABEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_composed_models_pass(parts: Parts, name: str, dtype: torch.dtype):
    model, processor = parts.model("clip", name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.train()
    prove(model, processor)
    assert model.training
    assert model.language_model.training


@pytest.mark.parametrize("name", TINY)
def test_families_pass_those_with_a_prefix_too(name: str, tmp_path: Path):
    save_family(name, tmp_path)
    config = load_family_config(str(tmp_path))
    model = load_family_model(str(tmp_path), config, dtype=torch.float32).train()
    prove(model, load_family_processor(str(tmp_path), FAMILIES[TINY[name].model_type]))


def faulty(model: Any, fault: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """A model whose logits are changed by a fault, which gets them and the mask."""
    return Faulty(model, fault)


class Faulty(torch.nn.Module):
    """See `faulty`."""

    def __init__(self, model: Any, fault: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.fault = model, fault
        self.config, self.device = model.config, model.device

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        logits = self.model(input_ids=input_ids, **inputs).logits
        return SimpleNamespace(logits=self.fault(logits, inputs["attention_mask"]))


def test_a_model_that_sees_later_tokens_is_refused_with_its_key(parts: Parts):
    model, processor = parts.model("clip", "llama")
    with pytest.raises(
        ValueError, match=r"^model.language_model.hf_name=x: its tokens attend to later tokens .* causal"
    ):
        check_causal(faulty(model, lambda logits, mask: logits + logits.mean(dim=1, keepdim=True)), processor, LABEL)
    little = faulty(model, lambda logits, mask: logits + 0.001 * logits.roll(-1, dims=1))
    with pytest.raises(ValueError, match="attend to later tokens"):
        check_causal(little, processor, LABEL)


def test_a_batch_that_is_not_its_rows_is_refused(parts: Parts):
    model, processor = parts.model("clip", "llama")
    faults = {
        "statistics of the batch": lambda logits, mask: logits - logits.mean(dim=(0, 1), keepdim=True),
        "positions from the end": lambda logits, mask: (
            logits + torch.arange(mask.shape[1]).flip(0)[None, :, None] * 0.1
        ),
        "padding that is read": lambda logits, mask: logits + (1 - mask).sum(1)[:, None, None],
    }
    for fault in faults.values():
        with pytest.raises(
            ValueError, match=r"^model.language_model.hf_name=x: the logits of a sample in a padded batch"
        ):
            check_padding(faulty(model, fault), processor, LABEL)


def test_an_encoder_that_is_loaded_as_a_language_model_is_found(parts: Parts, tmp_path: Path):
    tokenizer = byte_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    recipe = parts.recipe()
    recipe.language_model.hf_name = str(tmp_path)
    composed, processor = compose(recipe, "chatml", None)
    model = build_model(recipe, composed, processor, torch.float32, 0)
    with pytest.raises(ValueError, match=r"its tokens attend to later tokens \(model_type=bert"):
        check_causal(model, processor, LABEL)
    check_padding(model, processor, LABEL)


def test_experts_that_round_otherwise_in_other_groups_are_no_fault(parts: Parts):
    """Noise in all rows alike, as where the tokens of a batch are sorted by their experts."""
    model, processor = parts.model("clip", "llama")
    calls = [0]

    def noise(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return logits + 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(calls[0]))

    prove(faulty(model, noise), processor)


def test_a_model_whose_code_fails_is_named(parts: Parts):
    model, processor = parts.model("clip", "llama")

    def fail(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'NoneType' object has no attribute 'reshape'")

    with pytest.raises(
        ValueError, match=r"^model.language_model.hf_name=x: its code fails .* AttributeError: 'NoneType'"
    ):
        check_causal(faulty(model, fail), processor, LABEL)


def test_dropout_is_off_and_modes_are_as_before(parts: Parts):
    model, processor = parts.model("clip", "llama")
    model.train()
    model.connector.eval()
    with dropout_off(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.connector.training
    ids = choose_tokens(processor, 13)
    assert len(set(ids)) == 13
    assert not {*ids} & {*processor.tokenizer.all_special_ids}


def test_the_key_of_the_model_is_named():
    config = RunConfig()
    config.model.language_model.hf_name = "a"
    assert model_label(config) == "model.language_model.hf_name=a"
    config.model.hf_name = "b"
    assert model_label(config) == "model.hf_name=b"
    config.trainer.from_pretrained = "c"
    assert model_label(config) == "trainer.from_pretrained=c"
