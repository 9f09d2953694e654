"""Every causal language model of transformers is trained in a composed model, or refused in a sentence.

A composed model with a small language model of each type is proved as a run proves it, takes a step padded, with
activation checkpointing and packed, answers in a batch as alone without a cache, and is saved and loaded. Another takes
a step with an adapter in place of the language model's weights, which is merged.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import filterfalse
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from tests.small_language_models import TYPES, small_config
from tests.tiny_parts import Parts, picture
from tests.train.step.test_packing import Ready, items
from vlm.assembly.language_models import check_language_model, check_writes
from vlm.assembly.logit_proofs import check_causal, check_padding, prove_scores
from vlm.assembly.packed_attention import use_packed_attention
from vlm.assembly.packed_rows import check_packing
from vlm.config.schema import LoraConfig, LoraPartConfig
from vlm.families.parts import get_part_names
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models import VLMConfig, VLMForConditionalGeneration
from vlm.models.text_loss import SupervisedScores
from vlm.train.lora import add_adapter, is_adapter

NUM_TOKENS = 3
DIVERSE = (
    "mamba2", "falcon_h1", "granitemoehybrid", "lfm2", "qwen3_next", "qwen3_5_text", "mixtral", "qwen3_moe",
    "gemma3n_text", "gemma4_text", "deepseek_v3", "olmoe", "gpt_oss",
)  # fmt: skip
"""State-space and hybrid models, mixtures of experts, and those that look tokens up in each layer."""
NOT_SMALL = {
    *("blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "emu3", "gemma3n", "gemma4", "git"),
    *(
        "gemma4_assistant",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "gemma4_unified_text",
        "mimo_v2_flash",
        "mllama",
    ),
    *("musicgen", "musicgen_melody", "phi4_multimodal", "plbart", "qwen4_exp", "qwen4_exp_text", "reformer", "whisper"),
    *("xlm", "zamba"),
}
"""Types whose default configuration does not become small by its sizes alone."""
ANSWERS_DIFFER = {"moshi", "hrm_text"}
"""Types whose own generation in transformers differs from passes without a cache, or fails."""
MOST_PARAMETERS = 2 * 10**7
ADAPTED = ("llama", "mamba", "gemma3n_text", "llama4_text", "deepseek_v32", "gpt2")
"""Layers that are all called, whose weights are taken, whose class computes more, that choose tokens, and none."""
NO_LAYERS = {"gpt-sw3", "gpt2"}
"""Types without a Linear layer but the vocabulary head: GPT-2 has one-dimensional convolutions."""


def is_refused(key: str, *calls: Callable[[], object]) -> bool:
    """Whether one of some calls raises; it has to do so in one paragraph that begins with the key that it is about."""
    try:
        for call in calls:
            call()
    except ValueError as error:
        message = str(error)
    else:
        return False
    assert message.startswith(key)
    assert "\n" not in message
    return True


def compose_with(parts: Parts, kind: str) -> tuple[Any, Any]:
    """A composed model with a small language model of a type, and its processor; None where it is refused before."""
    base, processor = parts.model("clip", "llama")
    ids = {"vocab_size": len(processor.tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text_config = small_config(kind, **ids)
    with torch.device("meta"):
        number = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(text_config)).parameters())
    assert number < MOST_PARAMETERS
    label = "model.language_model.hf_name=y"
    config = copy.deepcopy(base.config)
    config.text_config = text_config
    config.recipe["language_model"]["hf_name"] = "y"
    if is_refused(label, lambda: check_language_model(text_config, label), lambda: check_writes(config)):
        return None, processor
    torch.manual_seed(0)
    return VLMForConditionalGeneration(VLMConfig.from_dict(config.to_dict())).float(), processor


def take_step(
    model: Any, scores: SupervisedScores, batch: dict[str, Any], *, packed: bool = False, every: bool = False
) -> None:
    """A step whose gradient reaches the connector, with `every` each parameter that is not declared as unused.

    Ranks wait for the gradients of all parameters that train.
    """
    model.train()
    with use_packed_attention(model.config.get_text_config()) if packed else nullcontext():
        losses, _, _ = scores(batch)
        losses.mean().backward()
    gradients = [parameter.grad for parameter in model.connector.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    names = get_part_names(model.config)
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not every or list(filterfalse(names.is_unused, missing)) == []
    model.zero_grad()


def check_answers(model: Any, processor: Any) -> None:
    """Greedy answers of a padded batch are those of each row alone, without a cache, but for ties."""
    ready = VisionLanguageModel(model.eval(), processor)
    turns = [[user_turn(text, 1)] for text in ("<image> what?", "a longer question about <image>: what is it?")]
    images = [[picture(0)], [picture(1)]]
    answers = model.generate(**ready.inputs(turns, images), max_new_tokens=NUM_TOKENS, do_sample=False)
    for row, answer in enumerate(answers[:, -NUM_TOKENS:]):
        inputs = ready.inputs([turns[row]], [images[row]])
        ids = inputs["input_ids"]
        for token in answer:
            passed = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**passed, use_cache=False).logits[0, -1]
            assert logits.max() - logits[token] <= 1e-4 * logits.abs().max()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)


@pytest.mark.parametrize(
    "kind", [kind if kind in DIVERSE else pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES]
)
def test_a_language_model_trains_and_answers_or_is_refused(parts: Parts, tmp_path: Path, kind: str):
    if kind in NOT_SMALL:
        pytest.skip("its default configuration does not become small by its sizes alone")
    model, processor = compose_with(parts, kind)
    if model is None:
        assert kind not in DIVERSE
        return
    label = "model.language_model.hf_name=y"
    checks = (lambda: check_causal(model, processor, label), lambda: check_padding(model, processor, label))
    if is_refused(label, *checks):
        assert kind not in DIVERSE
        return
    scores = SupervisedScores(model)
    prove_scores(scores, processor, label)
    collate, samples = Ready(processor), items(processor)
    take_step(model, scores, collate(samples), every=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    take_step(model, scores, collate(samples))
    model.activation_checkpointing_disable()
    key = "trainer.packing=true:"
    if not is_refused(key, lambda: check_packing(model, processor)):
        is_refused(key, lambda: take_step(model, scores, collate(samples, packed=True), packed=True))  # a window
        model.zero_grad()
    if kind not in ANSWERS_DIFFER:
        check_answers(model, processor)
    model.eval().save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = {name: value for name, value in collate(samples).items() if name != "labels"}
    with torch.no_grad():
        real = batch["attention_mask"].bool()
        assert torch.equal(again(**batch, use_cache=False).logits[real], model(**batch, use_cache=False).logits[real])


@pytest.mark.parametrize(
    "kind", [kind if kind in ADAPTED else pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES]
)
def test_a_language_model_learns_with_an_adapter_or_is_refused(parts: Parts, kind: str):
    if kind in NOT_SMALL:
        pytest.skip("its default configuration does not become small by its sizes alone")
    model, processor = compose_with(parts, kind)
    if model is None:
        return
    label = "model.language_model.hf_name=y"
    if is_refused(label, lambda: check_causal(model, processor, label), lambda: check_padding(model, processor, label)):
        return
    wanted = LoraConfig(language_model=LoraPartConfig(r=2))
    if is_refused("trainer.lora.language_model.r=2:", lambda: add_adapter(model, wanted, 0, torch.float32)):
        assert kind in NO_LAYERS
        return
    assert kind not in NO_LAYERS
    adapters = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters or name.startswith("connector."))
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    collate, samples = Ready(processor), items(processor)
    losses, _, _ = SupervisedScores(model.train())(collate(samples))
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in adapters.items()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert sum(bool(gradient.any()) for gradient in gradients.values() if gradient is not None) > len(adapters) / 2
    batch = {name: value for name, value in collate(samples).items() if name != "labels"}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        adapted = model.eval()(**batch, use_cache=False).logits[real]
        model.disable_adapters()
        before = model(**batch, use_cache=False).logits[real]
        model.enable_adapters()
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
        after = model(**batch, use_cache=False).logits[real]
    assert not torch.allclose(adapted, before, atol=1e-4)
    torch.testing.assert_close(after, adapted, atol=1e-4, rtol=1e-3)
