"""Operations are counted as PyTorch counts those of a real step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.families.test_families import load, make_images, make_sample
from tests.families.tiny_families import TINY, save_family
from tests.fixtures import compose_config
from tests.tiny_parts import LANGUAGE_MODELS, Parts
from tests.train.test_distributed_runs import CONNECTORS
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.data.batching.collator import Collator
from vlm.data.batching.stats import BatchStats, compute_batch_stats
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import IGNORE_INDEX, encode
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES
from vlm.train.lora import add_adapter
from vlm.train.monitor.flops import (
    FIXED_IMAGE_SIZE_FAMILIES,
    FlopsNotCountable,
    StepFlops,
    copy_to_meta_device,
    count_flops,
)
from vlm.train.parts import freeze, make_parts

LORA = ["trainer.lora.language_model.r=4", "trainer.learning_rate.language_model_learning_rate=1e-2"]
EVERYTHING = [
    "trainer.unfreeze.train_vision_model=true",
    "trainer.unfreeze.train_language_model=true",
    "trainer.learning_rate.visual_encoder_learning_rate=1e-3",
    "trainer.learning_rate.language_model_learning_rate=1e-3",
]
RESAMPLER = ["model/connector=resampler", *(f"model.connector.options.{word}" for word in CONNECTORS["resampler"])]
"""Its queries are the same for all images."""
LANGUAGE_MODEL_ALONE = ["trainer.unfreeze.train_connector=false", *LORA]


@pytest.fixture
def built(common: list[str]) -> Callable[..., tuple[Any, Any]]:
    """`built(*overrides)`: model and processor as a run has them when it begins to train."""

    def build(*overrides: str) -> tuple[Any, Any]:
        config = compose_config("pretrain-smol", [*common, "model.attn_implementation=eager", *overrides])
        model_config, processor = resolve_model(config)
        model = load_weights(config, model_config, processor, torch.float32, 42)
        add_adapter(model, config.trainer.lora, 42, torch.float32)
        freeze(make_parts(model, config.trainer, config.model))
        return model.train(), processor

    return build


def batch_of(processor: Any, words: int) -> tuple[dict[str, torch.Tensor], BatchStats]:
    """A sample with one picture and a reply, and what it holds."""
    ids, inputs = dummy_image(processor)
    ids = [*ids, *range(5, 5 + words)]
    labels = [IGNORE_INDEX] * (len(ids) - words) + ids[-words:]
    item = {"input_ids": ids, "labels": labels, **inputs}
    batch = Collator.of(processor)([item])
    batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    return batch, compute_batch_stats([item], batch["input_ids"].numel())


def really(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """What PyTorch counts in a step, of attention that keeps what its backward pass needs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    return counter.get_total_flops()


def as_squares(flops: StepFlops, facts: BatchStats) -> float:
    """Operations where attention computes what it masks too, as plain attention does."""
    return flops.total(facts, facts.images, facts.images, 1) + flops.pair * (facts.squared_lengths - facts.tokens) / 2


@pytest.mark.parametrize(
    "overrides", [[], EVERYTHING, LORA, LANGUAGE_MODEL_ALONE, RESAMPLER], ids=lambda words: words[0] if words else "-"
)
def test_a_real_step_needs_what_was_counted(built: Callable[..., tuple[Any, Any]], overrides: list[str]):
    model, processor = built(*overrides)
    flops = count_flops(model, dummy_image(processor)[1])
    for words in (3, 20):
        batch, facts = batch_of(processor, words)
        assert as_squares(flops, facts) == really(model, batch)


def test_layers_behind_the_selected_one_and_what_is_frozen_cost_nothing(built: Callable[..., tuple[Any, Any]]):
    def counted(*overrides: str) -> StepFlops:
        model, processor = built(*overrides)
        return count_flops(model, dummy_image(processor)[1])

    whole, early = counted("model.visual_encoder.feature_layer=-1"), counted("model.visual_encoder.feature_layer=1")
    assert early.encoded < whole.encoded / 2
    trained = counted(*EVERYTHING, "model.visual_encoder.feature_layer=-1")
    assert trained.encoded > 2.5 * whole.encoded
    assert trained.token == pytest.approx(1.5 * whole.token, rel=1e-3)  # forward, inputs; and now weights


def test_attention_is_counted_as_a_triangle_of_each_sample():
    flops = StepFlops(token=10.0, pair=1.0, supervised=100.0, encoded=1000.0, connected=10000.0, batch=7.0)
    facts = BatchStats(samples=2, tokens=5, positions=8, supervised=2, images=2, squared_lengths=13)  # lengths 3 and 2
    assert flops.total(facts, 1, 2, 2) == 50 + (6 + 3) + 200 + 1000 + 20000 + 14


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_of_all_kinds_are_counted(parts: Parts, name: str):
    model, processor = parts.model("clip", name)
    flops = count_flops(model, dummy_image(processor)[1])
    assert min(flops.token, flops.pair, flops.supervised, flops.encoded, flops.connected) > 0


def test_counting_leaves_the_model_as_it_is(built: Callable[..., tuple[Any, Any]]):
    model, processor = built(*LORA, "model.attn_implementation=sdpa")
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    bare = copy_to_meta_device(model)
    assert all(p.device.type == "meta" for p in bare.parameters())
    assert [n for n, p in bare.named_parameters() if p.requires_grad] == [n for n, (_, on) in before.items() if on]
    count_flops(model, dummy_image(processor)[1])
    assert all(
        before[name][0] is p and p.device.type == "cpu" and p.grad is None for name, p in model.named_parameters()
    )
    assert model.language_model.config._attn_implementation == "sdpa"


def test_what_the_lengths_do_not_tell_is_refused(parts: Parts):
    model, processor = parts.model("clip", "llama")
    image = dummy_image(processor)[1]
    model.language_model.model.convolution = torch.nn.Conv1d(4, 4, 3)
    with pytest.raises(FlopsNotCountable, match="convolutions"):
        count_flops(model, image)


def test_what_checkpointing_computes_anew_is_not_counted(built: Callable[..., tuple[Any, Any]]):
    model, processor = built()
    image = dummy_image(processor)[1]
    plain = count_flops(model, image)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert count_flops(model, image) == plain


@pytest.mark.parametrize("name", TINY)
def test_families_are_counted_where_all_images_cost_the_same(name: str, tmp_path: Path):
    save_family(name, tmp_path)
    kind = TINY[name].model_type
    model = load(tmp_path).train()
    processor = load_family_processor(str(tmp_path), FAMILIES[kind])
    if kind not in FIXED_IMAGE_SIZE_FAMILIES:
        with pytest.raises(FlopsNotCountable, match=f"not the same for all in model_type={kind}"):
            count_flops(model, {})
        return
    shown = make_images(1)
    sizes: list[Any] = [one.size[::-1] for one in shown]
    item = model_inputs(processor, encode(processor, make_sample(1, "yes"), sizes), shown)
    facts, batch = compute_batch_stats([item], 0), Collator.of(processor)([item])
    batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    targets = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=IGNORE_INDEX)[:, 1:]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, logits_to_keep=targets != IGNORE_INDEX, use_cache=False).logits.sum().backward()
    assert as_squares(count_flops(model, dummy_image(processor)[1]), facts) == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_token_counts_in_the_experts_that_it_goes_through(parts: Parts, kind: str):
    model, processor = parts.model("clip", "llama")
    image = dummy_image(processor)[1]

    def count(num_experts: int, active: int) -> StepFlops:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": active, "vocab_size": 320}
        names = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
        if kind == "qwen3_moe":
            shape["moe_intermediate_size"] = 48
        model.language_model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind](**shape, **{names[kind]: num_experts})
        )
        return count_flops(model.train(), image)

    expert = 3 * (3 * 2 * 32 * 48)  # forward, inputs and weights of three matrices
    few, more, many = count(4, 1), count(4, 2), count(8, 2)
    assert more.token - few.token == pytest.approx(2 * expert)  # one expert more in each of two layers
    assert many.token - more.token == pytest.approx(2 * 3 * 2 * 32 * 4)  # the router alone grows
    assert (many.pair, many.supervised) == (few.pair, few.supervised)
