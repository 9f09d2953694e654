"""What a model saves it loads: proved for every kind before training, or refused with what would be lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.assembly.test_saving import MODELS
from tests.families.tiny_families import save_family
from tests.tiny_parts import ENCODERS, SHAPE, Parts
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.round_trip import check_round_trip, is_equal, make_stand_ins
from vlm.models import VLMForConditionalGeneration
from vlm.models.connectors import CONNECTORS


@pytest.mark.parametrize("encoder", ENCODERS)
def test_models_of_every_encoder_come_back(parts: Parts, encoder: str):
    check_round_trip(parts.model(encoder, "tied_llama")[0])


@pytest.mark.parametrize("kind", ["several encoders", "tiles", "heads"])
def test_models_of_every_kind_come_back(parts: Parts, kind: str):
    check_round_trip(MODELS[kind](parts))


@pytest.mark.parametrize("family", ["llava-onevision", "qwen2.5-vl", "smolvlm", "phi4-multimodal"])
def test_families_come_back(tmp_path: Path, family: str):
    save_family(family, tmp_path)
    check_round_trip(open_checkpoint(tmp_path).load_model())


def test_experts_that_are_joined_in_memory_come_back(parts: Parts):
    """On disk each expert has matrices of its own."""
    model = parts.model("clip", "llama", layer=-2)[0]
    text = Qwen3MoeConfig(
        vocab_size=model.config.text_config.vocab_size, **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, decoder_sparse_step=1,
    )  # fmt: skip
    model.config.text_config = text
    experts = VLMForConditionalGeneration(model.config, model.visual_encoder, Qwen3MoeForCausalLM(text))
    check_round_trip(experts)
    assert make_stand_ins(experts, "meta")["language_model.lm_head.weight"].is_meta


class Base(nn.Module):
    """A connector that keeps something in a way of its own."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        self.linear = nn.Linear(vision_dim, text_dim)

    @classmethod
    def num_tokens(cls, num_features: int) -> int:
        return num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


class Unsaved(Base):
    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__(vision_dim, text_dim)
        self.register_buffer("positions", torch.rand(4), persistent=False)


class Tied(Base):
    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__(vision_dim, text_dim)
        self.other = nn.Linear(vision_dim, text_dim)
        self.other.weight = self.linear.weight


class Redrawn(Base):
    """Its weights are drawn anew by loading, which finds something of the module that no checkpoint has."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__(vision_dim, text_dim)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("ones", torch.ones(3), persistent=False)

    def reset_parameters(self) -> None:
        self.scale.data.fill_(2)
        self.ones.fill_(1)


LOSING: dict[str, tuple[type[nn.Module], str]] = {
    "a buffer that is not saved": (Unsaved, "buffer connector.positions, which is not saved, has other values"),
    "tensors that are one, undeclared": (Tied, "cannot be saved: .*connector.other.weight"),
    "weights that are drawn anew": (Redrawn, "does not load what it saves"),
}


def connect(parts: Parts, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> VLMForConditionalGeneration:
    monkeypatch.setitem(CONNECTORS, "tests.own:Connector", kind)  # pyright: ignore[reportArgumentType] - a user's class
    model = parts.model("clip", "llama", layer=-2)[0]
    model.config.connector = {"type": "tests.own:Connector", "options": {}}
    return VLMForConditionalGeneration(model.config, model.visual_encoder, model.language_model)


@pytest.mark.parametrize("loss", LOSING)
def test_a_model_that_loses_something_is_refused(parts: Parts, monkeypatch: pytest.MonkeyPatch, loss: str):
    kind, said = LOSING[loss]
    with pytest.raises(ValueError, match=said):
        check_round_trip(connect(parts, monkeypatch, kind))


def test_a_plain_class_of_the_users_own_comes_back(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    model: Any = connect(parts, monkeypatch, Base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_round_trip(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_is_refused_before_it_trains(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(CONNECTORS, "tests.own:Connector", Unsaved)  # pyright: ignore[reportArgumentType]
    words = [
        "model.connector.type=tests.own:Connector",
        "model.connector.options.input_norm=null",
        "trainer.max_steps=1",
    ]
    with pytest.raises(ValueError, match=r"connector\.positions"):
        train("pretrain-smol", tmp_path, *words)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_buffers_are_equal_but_for_rounding():
    """As half precision computes them, also with infinities; what was never computed is another one."""
    buffer = torch.tensor([float("-inf"), 1e-4, 0.3, 100.0])
    assert is_equal(buffer, buffer.bfloat16())
    assert is_equal(buffer.bfloat16(), buffer)
    assert not is_equal(buffer, torch.zeros(4))
    assert not is_equal(buffer, buffer.nan_to_num())
    assert not is_equal(buffer, buffer[:3])
    assert not is_equal(buffer, None)
    assert not is_equal(torch.arange(3), torch.zeros(3, dtype=torch.long))
