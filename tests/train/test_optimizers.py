"""Optimisers by name: transformers', Muon and the user's own keep the parts' groups, train and resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer

from tests.fixtures import compose_config, losses
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.train.arguments import training_arguments
from vlm.train.optimizers import MuonWithAdamW, hidden_matrix_names, make_optimizer, parse_options
from vlm.train.parts import freeze, make_parts

Made = Callable[..., tuple[Optimizer, Any, list[Any]]]
RATES = [
    "trainer.learning_rate.language_model_learning_rate=1e-4", "trainer.learning_rate.connector_learning_rate=1e-3",
    "trainer.weight_decay.connector_weight_decay=0.1", "trainer.unfreeze.train_vision_model=true",
    "trainer.learning_rate.visual_encoder_learning_rate=1e-5",
]  # fmt: skip
OWN = """
import torch
from torch.optim import SGD, Optimizer

class Signs(Optimizer):
    def __init__(self, params, lr, betas=(0.1, 0.2), *, scale=1.0):
        super().__init__(params, {"lr": lr, "betas": betas, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
                    parameter -= group["scale"] * group["lr"] * parameter.grad.sign()

def make(params, lr, momentum=0.0):
    return SGD(params, lr=lr, momentum=momentum)

def nothing(params):
    return None
"""
"""Optimisers of a user's, by a class and by a function."""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def made(common: list[str]) -> Made:
    """`made(*overrides)` returns the optimiser of a run, its model and its parts."""

    def make(*overrides: str) -> tuple[Optimizer, Any, list[Any]]:
        config = compose_config("finetune-smol", [*common, *RATES, *overrides])
        args = training_arguments(config.trainer)
        model_config, processor = resolve_model(config)
        model = load_weights(config, model_config, processor, torch.float32, 42)
        parts = make_parts(model, config.trainer, config.model)
        freeze(parts)
        decayed = {name for name, _ in model.named_parameters() if not name.endswith("bias") and "norm" not in name}
        return make_optimizer(args, model, parts, decayed), model, parts

    return make


def check_groups(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Each parameter is in one group with its part's learning rate and weight decay; returns the groups by name."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert len(groups) == len(optimizer.param_groups)
    assert sorted(names[id(p)] for group in groups.values() for p in group["params"]) == sorted(trained)
    rates = {"visual_encoder": 1e-5, "connector": 1e-3, "language_model": 1e-4}
    for name, group in groups.items():
        part, decay = name.split(".")[:2]
        assert group["lr"] == rates[part]
        assert group["weight_decay"] == (0.1 if (part, decay) == ("connector", "decay") else 0.0)
    return groups


def test_muon_takes_the_matrices_of_hidden_layers(made: Made):
    words = ["trainer.optim=muon", "trainer.optim_args='momentum=0.9'", "trainer.adam_beta2=0.98"]
    optimizer, model, parts = made(*words)
    assert isinstance(optimizer, MuonWithAdamW)
    groups = check_groups(optimizer, model)
    assert {name.split(".")[0] for name, group in groups.items() if group["is_muon"]} == {
        "visual_encoder", "connector", "language_model"
    }  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups.values():
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_matrix = name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) or (
                name.startswith("connector") and parameter.ndim == 2
            )
            assert group["is_muon"] is is_matrix, name
        if group["is_muon"]:
            assert (group["momentum"], group["adjust_lr_fn"]) == (0.9, "match_rms_adamw")
        else:
            assert group["betas"] == (0.9, 0.98)
    assert hidden_matrix_names(model, parts).isdisjoint(
        name for name in names.values() if "embed" in name or "lm_head" in name
    )


def test_a_muon_step_is_that_of_torch():
    """The matrix moves as `torch.optim.Muon` moves it, the vector as AdamW does, and both go on after a reload."""
    torch.manual_seed(0)
    starts = torch.randn(6, 4), torch.randn(5)
    gradients = [(torch.randn(6, 4), torch.randn(5)) for _ in range(4)]

    def build() -> tuple[nn.Parameter, nn.Parameter]:
        matrix, vector = (nn.Parameter(start.clone()) for start in starts)
        return matrix, vector

    def step(optimizers: list[Optimizer], matrix: nn.Parameter, vector: nn.Parameter, number: int) -> None:
        matrix.grad, vector.grad = (gradient.clone() for gradient in gradients[number])
        for optimizer in optimizers:
            optimizer.step()

    def join(matrix: nn.Parameter, vector: nn.Parameter) -> MuonWithAdamW:
        return MuonWithAdamW(
            [
                {"params": [matrix], "lr": 1e-2, "weight_decay": 0.1, "is_muon": True},
                {"params": [vector], "lr": 1e-3, "weight_decay": 0.0, "is_muon": False},
            ]
        )

    matrix, vector = build()
    apart: list[Optimizer] = [
        torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW([vector], lr=1e-3, weight_decay=0.0),
    ]
    for number in range(4):
        step(apart, matrix, vector, number)

    first, second = build()
    together = join(first, second)
    for number in range(2):
        step([together], first, second, number)
    state = together.state_dict()
    reloaded = join(first, second)
    reloaded.load_state_dict(state)
    for number in range(2, 4):
        step([reloaded], first, second, number)
    assert torch.equal(first, matrix)
    assert torch.equal(second, vector)
    assert reloaded.state.keys() == {first, second}


def test_muon_trains_and_resumes_to_the_bit(train: Callable[..., Path], tmp_path: Path):
    options = [
        *RATES, "trainer.optim=muon", "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2",
        "trainer.save_total_limit=5", "trainer.num_samples=0",
    ]  # fmt: skip
    whole = train("finetune-smol", tmp_path / "whole", *options)
    again = train(
        "finetune-smol", tmp_path / "again", *options, f"trainer.resume_from_checkpoint={whole / 'checkpoint-2'}"
    )
    assert losses(again) == losses(whole)[2:]
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (again, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    other = train("finetune-smol", tmp_path / "adamw", *RATES, "trainer.max_steps=4", "trainer.num_samples=0")
    assert losses(other)[0] == losses(whole)[0]
    assert losses(other)[-1] != losses(whole)[-1]


@pytest.mark.parametrize("words", [
    ["trainer.optim=own_optimizers:Signs", "trainer.optim_args='scale=0.5'"], ["trainer.optim=adafactor"],
], ids=["of the user's own", "adafactor"])  # fmt: skip
def test_an_optimiser_trains_and_resumes(own: None, train: Callable[..., Path], tmp_path: Path, words: list[str]):
    options = [
        *RATES, *words, "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2",
        "trainer.save_total_limit=5", "trainer.num_samples=0",
    ]  # fmt: skip
    whole = train("finetune-smol", tmp_path / "whole", *options)
    again = train(
        "finetune-smol", tmp_path / "again", *options, f"trainer.resume_from_checkpoint={whole / 'checkpoint-2'}"
    )
    assert losses(again) == losses(whole)[2:]


def test_a_users_class_gets_the_groups_and_its_options(own: None, made: Made):
    optimizer, model, _ = made(
        "trainer.optim=own_optimizers:Signs", "trainer.optim_args='scale=0.5'", "trainer.adam_beta1=0.7"
    )
    assert type(optimizer).__name__ == "Signs"
    assert {(group["scale"], group["betas"]) for group in check_groups(optimizer, model).values()} == {
        (0.5, (0.7, 0.999))
    }  # fmt: skip
    optimizer, model, _ = made("trainer.optim=own_optimizers:make", "trainer.optim_args='momentum=0.9'")
    assert {group["momentum"] for group in check_groups(optimizer, model).values()} == {0.9}


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adamw_torch", "adagrad", "rmsprop"])
def test_transformers_own_keep_the_groups(name: str, made: Made):
    optimizer, model, _ = made(f"trainer.optim={name}")
    check_groups(optimizer, model)


def test_a_low_rank_optimiser_keeps_the_parts_groups(made: Made, monkeypatch: pytest.MonkeyPatch):
    """GaLore and APOLLO get groups of transformers' making: the layers that they project, with settings, and others."""

    def low_rank(_: Any, model: Any) -> tuple[Any, dict[str, Any]]:
        named = dict(model.named_parameters())
        targets = [p for name, p in named.items() if name.endswith("q_proj.weight")]
        others = [p for name, p in named.items() if not name.endswith("q_proj.weight")]
        return AdamW, {"lr": 7.0, "params": [{"params": others}, {"params": targets, "rank": 3}]}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(low_rank))
    optimizer, model, _ = made("trainer.optim=sgd")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] in (1e-5, 1e-3, 1e-4)
        assert {names[id(p)].endswith("q_proj.weight") for p in group["params"]} == {"rank" in group}


@pytest.mark.parametrize("extra", ["model", "optimizer_dict"])
def test_an_optimiser_that_steps_by_itself_is_refused(extra: str, made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: (AdamW, {extra: None})))
    with pytest.raises(ValueError, match=r"trainer.optim=sgd: it updates all parameters at one learning rate"):
        made("trainer.optim=sgd")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.optim=no_such_module:Optimizer"], "trainer.optim=no_such_module:Optimizer: No module named"),
        (["trainer.optim=own_optimizers:Sings"], "trainer.optim=own_optimizers:Sings: module 'own_optimizers' has no"),
        (["trainer.optim=own_optimizers:nothing"], "it returned a NoneType; a torch.optim.Optimizer is needed"),
        (["trainer.optim=own_optimizers:Signs", "trainer.optim_args='speed=2'"], "got an unexpected keyword argument"),
        (["trainer.optim=muon", "trainer.optim_args='speed=2'"], "'speed'; muon takes momentum and ns_steps"),
        (
            ["trainer.optim=muon", "trainer.optim_args=fast"],
            "trainer.optim_args=fast: fast is not of the form key=value",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(own: None, words: list[str], message: str, made: Made):
    with pytest.raises(ValueError, match=r"trainer\.optim") as error:
        made(*words)
    assert message in str(error.value)


def test_options_are_literals_or_strings():
    assert parse_options("a=1, b=0.5,c=true,d=True") == {"a": 1, "b": 0.5, "c": "true", "d": True}
    assert parse_options(None) == {}
