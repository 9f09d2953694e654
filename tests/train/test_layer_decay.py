"""Layer-wise learning-rate decay: which layer has which rate, in a run's optimiser too."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.fixtures import compose_config
from tests.train.test_optimizers import Made, made
from vlm.checks.fields import ConfigError
from vlm.checks.run import check
from vlm.train.layer_decay import rate_factors
from vlm.train.objectives.table import make_objective
from vlm.train.optimizers import read_learning_rates

__all__ = ["made"]

SMALL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def factors_of(model: nn.Module, decay: float = 0.5) -> dict[str, float]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return rate_factors(dict(model.named_modules()), sizes, decay, "language_model")


def test_each_layer_of_a_language_model_has_half_the_rate_of_the_next():
    factors = factors_of(LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=16, num_key_value_heads=2)))
    for layer, factor in enumerate((0.125, 0.25, 0.5)):
        own = {value for name, value in factors.items() if f".layers.{layer}." in name}
        assert own == {factor}
    assert factors["model.embed_tokens.weight"] == 0.0625
    assert factors["model.norm.weight"] == factors["lm_head.weight"] == 1


def test_embeddings_of_an_encoder_come_first_whatever_the_order_of_its_modules():
    factors = factors_of(CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)))
    first = {name for name, factor in factors.items() if factor == 0.0625}
    assert {name.split(".")[-2] for name in first} == {
        "embeddings",
        "patch_embedding",
        "position_embedding",
        "pre_layrnorm",
    }
    assert {name.split(".")[-2] for name, factor in factors.items() if factor == 1} == {"post_layernorm"}


def test_two_encoders_decay_by_themselves_and_small_lists_are_no_layers():
    model = nn.ModuleDict({
        "one": nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))}),
        "other": nn.ModuleDict({
            "patch_embed": nn.Linear(2, 8), "blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),
            "mergers": nn.ModuleList(nn.Linear(1, 1) for _ in range(4)),
        }),
    })  # fmt: skip
    factors = factors_of(model)
    assert (factors["one.blocks.0.weight"], factors["one.blocks.1.weight"]) == (0.25, 0.5)
    assert (factors["other.blocks.0.weight"], factors["other.patch_embed.weight"]) == (0.125, 0.0625)
    assert factors["other.mergers.0.weight"] == 1


def test_a_part_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"language_model_layer_decay=0.5: the language_model has no list of layers"):
        factors_of(nn.Linear(2, 2))
    assert rate_factors({}, {"weight": 4}, None, "language_model") == {}


def test_a_run_has_a_group_for_each_layer_and_logs_the_parts_rate(made: Made):
    optimizer, model, parts = made(
        "trainer.unfreeze.train_language_model=true", "trainer.learning_rate.language_model_layer_decay=0.5"
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(rates) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    depth = model.config.get_text_config().num_hidden_layers
    for name, rate in rates.items():
        if ".layers." in name and name.startswith("language_model"):
            assert rate == pytest.approx(1e-4 * 0.5 ** (depth - int(name.split(".layers.")[1].split(".")[0])))
    assert rates["language_model.model.embed_tokens.weight"] == pytest.approx(1e-4 * 0.5 ** (depth + 1))
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    logged = read_learning_rates(optimizer, [torch.tensor(group["lr"]) for group in optimizer.param_groups])
    assert logged == pytest.approx({f"learning_rate/{part.name}": part.learning_rate for part in parts})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.learning_rate.visual_encoder_layer_decay=0.9"], "the visual_encoder does not train; leave it out"),
        (["trainer.learning_rate.language_model_layer_decay=0"], "a share above 0, at most 1"),
        (["trainer.average_decay=0.9", "trainer/deepspeed=zero3"], "no rank has the whole weights to average"),
        (["trainer.average_decay=1"], "a share from 0 to below 1"),
    ],
)
def test_settings_without_effect_are_refused(common: list[str], words: list[str], message: str):
    config = compose_config("pretrain-smol", [*common, *words])
    with pytest.raises(ConfigError, match=message):
        check(config, make_objective(config))
