"""Language models of every kind: those without a bound of positions or with states train, others are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CpmAntConfig,
    LlamaConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RwkvConfig,
    T5Config,
    TrOCRConfig,
)

from tests.fixtures import compose_config
from tests.small_language_models import small_config
from tests.tiny_parts import WIDTH, Parts, byte_tokenizer, picture
from vlm.assembly.compose import build_model, compose
from vlm.assembly.language_models import check_language_model, check_writes, max_positions
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import InferenceConfig
from vlm.data.encoding.sample_encoder import NO_LIMIT
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models import VLMConfig, VLMForConditionalGeneration
from vlm.train.data import max_sample_length
from vlm.train.objectives.table import make_objective

LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 2}
HEADS = {**LAYERS, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}

UNUSUAL: dict[str, tuple[type, Callable[..., PreTrainedConfig]]] = {
    "bloom": (BloomForCausalLM, lambda **ids: BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=2, **ids)),
    "mpt": (MptForCausalLM, lambda **ids: MptConfig(d_model=WIDTH, n_layers=2, n_heads=2, max_seq_len=128, **ids)),
    "mamba": (MambaForCausalLM, lambda **ids: MambaConfig(**LAYERS, state_size=8, **ids)),
    "mamba2": (
        Mamba2ForCausalLM,
        lambda **ids: Mamba2Config(**LAYERS, state_size=8, num_heads=4, head_dim=16, n_groups=1, **ids),
    ),
    "recurrent_gemma": (
        RecurrentGemmaForCausalLM,
        lambda **ids: RecurrentGemmaConfig(**HEADS, lru_width=WIDTH, block_types=["recurrent", "attention"], **ids),
    ),
    "minimax": (
        MiniMaxForCausalLM,
        lambda **ids: MiniMaxConfig(
            **HEADS, num_local_experts=2, layer_types=["linear_attention", "full_attention"], **ids
        ),
    ),
}
"""Language models without `max_position_embeddings` or `past_key_values`, or with a cache of their own."""


def save(folder: Path, kind: str) -> Path:
    """A tiny language model with its tokenizer."""
    tokenizer = byte_tokenizer("chatml")
    tokenizer.save_pretrained(folder)
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model_class, make_config = UNUSUAL[kind]
    torch.manual_seed(0)
    model_class(make_config(**ids)).save_pretrained(folder)
    return folder


def build(parts: Parts, folder: Path) -> VisionLanguageModel:
    recipe = parts.recipe()
    recipe.language_model.hf_name = str(folder)
    config, processor = compose(recipe, "chatml", None)
    return VisionLanguageModel(build_model(recipe, config, processor, torch.float32, 0).eval(), processor)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_language_models_train_answer_and_load_again(parts: Parts, tmp_path: Path, kind: str):
    ours = build(parts, save(tmp_path / kind, kind))
    model: Any = ours.model
    turns = [[user_turn(text, 1)] for text in ("<image> what?", "a longer question about <image>: what is it?")]
    images = [[picture(0)], [picture(1)]]
    inputs = ours.inputs(turns, images)
    answers = ours.answers(inputs, InferenceConfig(max_new_tokens=5))
    for row, question in enumerate(turns):
        alone = ours.inputs([question], [images[row]])
        ids = alone["input_ids"]
        with torch.no_grad():
            for _ in range(5):  # without a cache
                logits = model(**{**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False)
                ids = torch.cat([ids, logits.logits[:, -1:].argmax(-1)], dim=1)
        answer = ours.processor.tokenizer.decode(ids[0, alone["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers[row] == str(answer).strip()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model.train()(**inputs, labels=labels)
    outputs.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("connector"))
    model.eval().save_pretrained(tmp_path / "whole")
    again = VLMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_positions_are_read_under_any_name_or_have_no_limit():
    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert max_positions(MptConfig(max_seq_len=66)) == 66
    for config in (BloomConfig(), MambaConfig(), Mamba2Config(), RecurrentGemmaConfig()):
        assert max_positions(config) == NO_LIMIT
        assert max_sample_length(DatasetConfig(max_length=50), config) == 50
        assert max_sample_length(DatasetConfig(max_length=None), config) == NO_LIMIT
    assert max_sample_length(DatasetConfig(max_length=99), LlamaConfig(max_position_embeddings=77)) == 77
    with pytest.raises(ValueError, match=r"dataset.max_length=null with dataset.streaming=true: .* set dataset"):
        max_sample_length(DatasetConfig(max_length=None, streaming=True), BloomConfig())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(), "transformers has no causal language model"),
        (CpmAntConfig(), "model_type=cpmant does not accept inputs_embeds"),
        (OPTConfig(hidden_size=64, word_embed_proj_dim=32), "word_embed_proj_dim=32"),
        (small_config("deepseek_v4", vocab_size=64), "the code of model_type=deepseek_v4 needs token ids"),
    ],
)
def test_what_cannot_read_images_is_refused_before_weights_load(config: PreTrainedConfig, words: str):
    with pytest.raises(ValueError, match=r"^model.language_model.hf_name=x: .* Choose another") as raised:
        check_language_model(config, "model.language_model.hf_name=x")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BertConfig(), "model_type=bert with is_decoder=false is an encoder"),
        (RobertaConfig(), "is an encoder, whose tokens see later tokens; a causal language model is needed"),
        (TrOCRConfig(), "does not accept logits_to_keep"),
        (RwkvConfig(), "does not accept past_key_values"),
        (BartConfig(), "is the decoder of an encoder-decoder model"),
        (BartConfig(is_encoder_decoder=False), "is the decoder of an encoder-decoder model"),
    ],
)
def test_what_cannot_learn_to_write_is_refused_before_weights_load(config: PreTrainedConfig, words: str):
    whole = VLMConfig(text_config=config, recipe={"language_model": {"hf_name": "y"}})
    with pytest.raises(ValueError, match=r"^model.language_model.hf_name=y: ") as raised:
        check_writes(whole)
    assert words in str(raised.value)
    check_writes(VLMConfig(text_config=BertConfig(is_decoder=True), recipe={"language_model": {"hf_name": "y"}}))
    check_writes(config)  # a model of a family: nothing to look up


def test_a_run_refuses_an_encoder_before_it_reads_records(parts: Parts, tmp_path: Path, common: list[str]):
    """Each family of encoders that transformers also counts as causal language models, by its configuration alone."""
    tokenizer = byte_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    words = [*common, f"model.language_model.hf_name={tmp_path}", "dataset.path=nowhere.json"]
    run = compose_config("finetune-smol", words)
    composed, processor = compose(run.model, "chatml", None)
    with pytest.raises(ValueError, match=f"model.language_model.hf_name={tmp_path}: model_type=bert .* encoder"):
        make_objective(run).load_data(composed, processor, None)  # pyright: ignore[reportArgumentType] - not reached
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
