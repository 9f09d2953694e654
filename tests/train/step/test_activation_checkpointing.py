"""Activation checkpointing by part: which layers run twice, to the same gradients, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.families.tiny_families import TINY
from tests.fixtures import check_config, compose_config
from tests.models.test_modeling_vlm import batch
from vlm.assembly.family import get_auto_class
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.checks.fields import ConfigError
from vlm.families.parts import get_part_names
from vlm.train.arguments import training_arguments
from vlm.train.model import prepare
from vlm.train.step.activation_checkpointing import _enable_checkpointed_layers

EVERYTHING = [
    "trainer.unfreeze.train_vision_model=true", "trainer.learning_rate.visual_encoder_learning_rate=1e-3",
    "trainer.unfreeze.train_language_model=true", "trainer.learning_rate.language_model_learning_rate=1e-3",
]  # fmt: skip
CONNECTOR: list[str] = []
"""What `pretrain-smol` trains by itself."""
LANGUAGE_MODEL = ["trainer.unfreeze.train_connector=false", *EVERYTHING[2:]]
ADAPTER = [
    "trainer.unfreeze.train_connector=false", "trainer.lora.visual_encoder.r=2", EVERYTHING[1]
]  # fmt: skip


@pytest.fixture
def built(common: list[str]) -> Callable[..., tuple[Any, Any, Any]]:
    """`built(*overrides)`: a model with what trains of it settled, its processor, and the run's arguments."""

    def build(*overrides: str) -> tuple[Any, Any, Any]:
        config = compose_config("pretrain-smol", [*common, *overrides])
        args: Any = training_arguments(config.trainer)
        model_config, processor = resolve_model(config)
        model = load_weights(config, model_config, processor, torch.float32, 42)
        prepare(model, config, args, processor)
        return model.train(), processor, args

    return build


def step(model: Any, processor: Any) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """How often the layers of each part ran in a forward and a backward pass, in layers; and the gradients."""
    calls: dict[str, int] = dict.fromkeys(("visual_encoder", "connector", "language_model"), 0)
    names = get_part_names(model.config)
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            part = names.part_of(f"{path}.")
            norm = next(child for child in module.modules() if "norm" in type(child).__name__.lower())

            def count(*_: Any, part: str = part) -> None:
                calls[part] += 1

            hooks.append(norm.register_forward_hook(count))  # within what is computed anew
    inputs = batch(processor, ["<image> what is it?", "two <image> and <image>"])
    model(**inputs).loss.backward()
    for hook in hooks:
        hook.remove()
    return calls, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("trains", "key", "twice"),
    [
        (EVERYTHING, "null", {"visual_encoder", "language_model"}),
        (EVERYTHING, "[language_model]", {"language_model"}),
        (EVERYTHING, "[visual_encoder]", {"visual_encoder"}),
        (EVERYTHING, "[visual_encoder,language_model]", {"visual_encoder", "language_model"}),
        (CONNECTOR, "null", {"language_model"}),
        (LANGUAGE_MODEL, "null", {"language_model"}),
        (ADAPTER, "[visual_encoder]", {"visual_encoder"}),
        (ADAPTER, "null", {"visual_encoder", "language_model"}),
    ],
)
def test_layers_of_these_parts_run_twice(
    built: Callable[..., tuple[Any, Any, Any]], trains: list[str], key: str, twice: set[str]
):
    plain = step(*built(*trains)[:2])
    model, processor, args = built(
        *trains, "trainer.activation_checkpointing=true", f"trainer.checkpointed_parts={key}"
    )
    calls, gradients = step(model, processor)
    assert calls == {part: number * (2 if part in twice else 1) for part, number in plain[0].items()}
    assert calls["language_model"] > 0
    assert calls["visual_encoder"] > 0
    assert gradients.keys() == plain[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[1][name])
    assert args.activation_checkpointing is False  # Trainer would put it on every layer


def test_every_n_th_layer_of_each_part(built: Callable[..., tuple[Any, Any, Any]]):
    once = step(*built(*EVERYTHING)[:2])[0]
    words = [*EVERYTHING, "trainer.activation_checkpointing=true"]
    every = step(*built(*words, "trainer.activation_checkpointing_kwargs={every_n_layers: 2}")[:2])[0]
    for part in ("visual_encoder", "language_model"):
        assert every[part] == once[part] + -(-once[part] // 2)


def test_it_is_off_where_it_is_not_asked_for(built: Callable[..., tuple[Any, Any, Any]]):
    model, _, _ = built(*EVERYTHING)
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize(
    ("trains", "key", "said"),
    [
        (CONNECTOR, "[visual_encoder]", r"\['visual_encoder'\]: no gradient flows through the visual_encoder, so "
         "it stores no activations; allowed are connector, language_model"),
        (LANGUAGE_MODEL, "[connector]", "no gradient flows through the connector.*; allowed are language_model"),
        (EVERYTHING, "[connector]", "the connector has no layers that transformers can recompute"),
    ],
)  # fmt: skip
def test_parts_that_keep_nothing_are_refused(
    built: Callable[..., tuple[Any, Any, Any]], trains: list[str], key: str, said: str
):
    with pytest.raises(ValueError, match=f"trainer.checkpointed_parts=.*{said}"):
        built(*trains, "trainer.activation_checkpointing=true", f"trainer.checkpointed_parts={key}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.checkpointed_parts=[vision]", "trainer.activation_checkpointing=true"],
         "vision: allowed are visual_encoder, connector, language_model"),
        (["trainer.checkpointed_parts=[]", "trainer.activation_checkpointing=true"], "name at least one of"),
        (["trainer.checkpointed_parts=[language_model]", "trainer.activation_checkpointing=false"],
         "nothing is checkpointed without trainer.activation_checkpointing=true"),
    ],
)  # fmt: skip
def test_keys_that_mean_nothing_are_refused(common: list[str], words: list[str], said: str):
    with pytest.raises(ConfigError, match=f"trainer.checkpointed_parts=.*{said}"):
        check_config(compose_config("pretrain-smol", [*common, *words]))


@pytest.mark.parametrize("name", TINY)
def test_the_layers_of_every_family_belong_to_one_part(name: str):
    made = TINY[name]
    config = CONFIG_MAPPING[made.model_type](**made.config(made.processor()))
    with torch.device("meta"):
        model = get_auto_class(config).from_config(config)
    model.activation_checkpointing_enable()
    found = _enable_checkpointed_layers(model, ["language_model"], 1)
    assert found["language_model"] > 0
    names = get_part_names(config)
    on = [path for path, module in model.named_modules()
          if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing]  # fmt: skip
    assert {names.part_of(f"{path}.") for path in on} == {"language_model"}
    seen = _enable_checkpointed_layers(model, ["visual_encoder"], 1)["visual_encoder"]
    assert (seen > 0) == (name != "mllama")  # whose vision layers transformers does not checkpoint
