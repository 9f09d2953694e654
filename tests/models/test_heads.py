"""Prediction heads: what holds for all of them, poolings with weights of their own, and cut points."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_tasks import NUM_OUTPUTS_BY_TASK, probabilities
from vlm.models.heads import (
    HEADS,
    LinearHead,
    MLPHead,
    OrdinalThresholds,
    PredictionHead,
    average_token_outputs,
    head_class,
)
from vlm.models.poolings import EVERY_TOKEN_POOLINGS, POOLINGS, TokenMasks, pool_hidden_states

WIDTH, ROWS, TOKENS = 8, 3, 5
LABELS = {"binary": 2, "multiclass": 4, "multilabel": 4, "regression": 0, "ordinal": 4, "pairwise": 0}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"input_norm": False}, {"dropout": 0.5}],
    "mlp": [{}, {"hidden_dim": 3}, {"num_layers": 4}, {"input_norm": False, "dropout": 0.5}],
}


LEARNED = tuple(OPTIONS)
"""Heads with parameters; `identity` gives hidden states as they are."""


def head(task: str = "binary", pooling: str = "last", **more: Any) -> PredictionHead:
    return PredictionHead(WIDTH, HeadSettings("head", task, list(range(LABELS[task])), pooling=pooling, **more))


def marks() -> TokenMasks:
    """Rows of 5, 3 and 2 tokens, padded on the left."""
    prompt_mask = torch.arange(TOKENS)[None] >= torch.tensor([0, 2, 3])[:, None]
    chosen = prompt_mask & (torch.arange(TOKENS) >= 3)
    media_mask = prompt_mask & (torch.arange(TOKENS) == 4)
    return TokenMasks(prompt_mask, media_mask, chosen)


def test_every_head_is_tested():
    assert {*OPTIONS, "identity"} == set(HEADS)


def test_identity_gives_what_it_is_given():
    features = torch.randn(2, WIDTH)
    assert torch.equal(HEADS["identity"](WIDTH, WIDTH)(features), features)
    with pytest.raises(ValueError, match=f"has the width of hidden states, {WIDTH}, not 2"):
        HEADS["identity"](WIDTH, 2)
    vectors = PredictionHead(WIDTH, HeadSettings("head", "embedding", type="identity"))(features)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(("kind", "options"), [(kind, one) for kind, many in OPTIONS.items() for one in many])
def test_a_head_maps_whatever_stands_before_the_width(kind: str, options: dict[str, Any]):
    layers = HEADS[kind](WIDTH, 3, **options).eval()
    features = torch.randn(2, TOKENS, WIDTH)
    found = layers(features)
    assert found.shape == (2, TOKENS, 3)
    assert torch.allclose(layers(features[:, 0]), found[:, 0], atol=1e-6)
    found.square().sum().backward()
    for name, parameter in layers.named_parameters():
        assert isinstance(parameter.grad, Tensor), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", LEARNED)
def test_options_of_every_head(kind: str):
    features = 100 * torch.randn(6, WIDTH) + 5
    plain = HEADS[kind](WIDTH, 2).eval()
    assert torch.allclose(plain(features), plain(3 * features), atol=1e-4)  # features are normalised
    raw = HEADS[kind](WIDTH, 2, input_norm=False).eval()
    assert not torch.allclose(raw(features), raw(3 * features), atol=1e-2)
    dropping = HEADS[kind](WIDTH, 2, dropout=0.5)
    assert not torch.equal(dropping(features), dropping(features))
    assert torch.equal(dropping.eval()(features), dropping(features))
    assert not [name for name, _ in plain.named_parameters() if "norm" in name]


def test_layers_of_an_mlp():
    widths = [tuple(one.weight.shape) for one in MLPHead(8, 2, hidden_dim=5, num_layers=3).layers
              if isinstance(one, nn.Linear)]  # fmt: skip
    assert widths == [(5, 8), (5, 5), (2, 5)]
    assert isinstance(MLPHead(8, 2).layers[-1], nn.Linear)
    with pytest.raises(ValueError, match=r"num_layers=1: at least 2"):
        MLPHead(8, 2, num_layers=1)


def test_a_linear_head_is_a_linear_map_of_normalised_features():
    layers = LinearHead(WIDTH, 2)
    features = torch.randn(4, WIDTH)
    normal = (features - features.mean(1, keepdim=True)) / (features.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(layers(features), normal @ layers.linear.weight.T + layers.linear.bias, atol=1e-6)


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", LEARNED)
def test_every_head_answers_every_task_from_every_pooling(task: str, pooling: str, kind: str):
    """Shapes; every parameter gets a gradient; the hidden states do too."""
    model = head(task, pooling, type=kind)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    read = pool_hidden_states(pooling, hidden, marks())
    assert read.shape == ((ROWS, TOKENS, WIDTH) if pooling in EVERY_TOKEN_POOLINGS else (ROWS, WIDTH))
    found = model(read, marks().prompt_mask)
    assert found.shape == (ROWS, NUM_OUTPUTS_BY_TASK[task](LABELS[task]))
    (found * torch.randn_like(found)).sum().backward()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, Tensor), name
        assert parameter.grad.abs().sum() > 0, name
    assert isinstance(hidden.grad, Tensor)
    assert hidden.grad.abs().sum() > 0
    assert (hidden.grad[~marks().prompt_mask] == 0).all()


@pytest.mark.parametrize("pooling", ["last", *EVERY_TOKEN_POOLINGS])
@pytest.mark.parametrize("task", ["ordinal", "regression", "multiclass"])
def test_numbers_are_in_single_precision(task: str, pooling: str):
    """With half-precision weights, and under autocast, which the head itself does not run in."""
    model, hidden = head(task, pooling), torch.randn(ROWS, TOKENS, WIDTH)
    selected_mask = model(pool_hidden_states(pooling, hidden, marks()), marks().prompt_mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(pool_hidden_states(pooling, hidden, marks()), marks().prompt_mask), selected_mask)
    model.bfloat16()
    found = model(pool_hidden_states(pooling, hidden.bfloat16(), marks()), marks().prompt_mask)
    assert found.dtype == torch.float32
    assert torch.allclose(found, selected_mask, atol=0.05)


def test_a_regression_is_in_units_of_its_labels():
    plain, scaled = (head("regression", pooling="alltoken", **more) for more in ({}, {"shift": 40.0, "scale": 10.0}))
    scaled.load_state_dict(plain.state_dict())
    features = torch.randn(ROWS, TOKENS, WIDTH)
    found = scaled(features, marks().prompt_mask)
    assert torch.allclose(found, 40 + 10 * plain(features, marks().prompt_mask))
    assert torch.equal(head("pairwise", shift=40.0).eval()(torch.zeros(1, WIDTH)).abs() < 1, torch.tensor([[True]]))


# Poolings with weights of their own


@pytest.mark.parametrize("pooling", EVERY_TOKEN_POOLINGS)
@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_padding_says_nothing(pooling: str, task: str):
    """Not even NaN, and its gradients stay finite; nor does it matter how much of it there is."""
    model, prompt_mask = head(task, pooling), marks().prompt_mask
    features = torch.randn(ROWS, TOKENS, WIDTH)
    found = model(features.masked_fill(~prompt_mask.unsqueeze(-1), torch.nan), prompt_mask)
    assert torch.equal(found, model(features, prompt_mask))
    found.sum().backward()
    assert all(torch.isfinite(one.grad).all() for one in model.parameters() if one.grad is not None)
    for row, length in enumerate((5, 3, 2)):
        alone = model(features[row : row + 1, -length:], torch.ones(1, length, dtype=torch.bool))
        assert torch.allclose(alone.diff(dim=1), found[row : row + 1].diff(dim=1), atol=1e-5)
        if task != "multiclass":  # whose logits may differ by what all have alike
            assert torch.allclose(alone, found[row : row + 1], atol=1e-5)


def test_attention_is_a_mean_with_learned_weights():
    model, prompt_mask = head("pairwise", "attention"), marks().prompt_mask
    features = torch.randn(ROWS, TOKENS, WIDTH)
    assert model.attention is not None
    for row in range(ROWS):
        seen = features[row, prompt_mask[row]]
        normal = (seen - seen.mean(1, keepdim=True)) / seen.std(1, correction=0, keepdim=True)
        weights = torch.softmax((normal @ model.attention.weight.T)[:, 0], dim=0)
        selected_mask = model.layers((weights[:, None] * seen).sum(dim=0))
        assert torch.allclose(model(features, prompt_mask)[row], selected_mask, atol=1e-4)


@pytest.mark.parametrize("pooling", EVERY_TOKEN_POOLINGS)
def test_features_of_every_token_need_their_mask(pooling: str):
    with pytest.raises(ValueError, match=f"pooling={pooling} reads every token: give attention_mask with features"):
        head("binary", pooling)(torch.randn(ROWS, TOKENS, WIDTH))


@pytest.mark.parametrize("task", ["binary", "multilabel", "ordinal", "multiclass"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_a_mean_answer_has_the_log_odds_of_the_mean_probability(task: str, scale: float):
    numbers, prompt_mask = NUM_OUTPUTS_BY_TASK[task](LABELS[task]), marks().prompt_mask
    outputs = (scale * torch.randn(ROWS, TOKENS, numbers)).sort(dim=2, descending=True).values
    found = probabilities(task, average_token_outputs(task, outputs, prompt_mask).double())
    for row in range(ROWS):
        chances = probabilities(task, outputs[row, prompt_mask[row]].double()).mean(dim=0)
        assert torch.allclose(found[row], chances, rtol=1e-5, atol=1e-9)
        if task != "multiclass":
            above = outputs[row, prompt_mask[row]].double().sigmoid().mean(dim=0)
            naive = above.log() - (1 - above).log()
            assert torch.allclose(
                average_token_outputs(task, outputs, prompt_mask)[row].double(), naive, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_numbers_stay_finite(task: str, value: float):
    outputs = torch.full((ROWS, TOKENS, NUM_OUTPUTS_BY_TASK[task](LABELS[task])), value)
    outputs[:, -1, 0] = -value
    outputs.requires_grad_()
    found = average_token_outputs(task, outputs, marks().prompt_mask)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert isinstance(outputs.grad, Tensor)
    assert torch.isfinite(outputs.grad).all()


# Cut points


@pytest.mark.parametrize("number", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_points_ascend(number: int, dtype: torch.dtype):
    cuts = OrdinalThresholds(number)
    at_first = -cuts(torch.zeros(1))
    assert torch.allclose(at_first, torch.arange(number) - (number - 1) / 2)
    for _ in range(20):
        nn.init.normal_(cuts.first, std=100)
        if number > 1:
            nn.init.normal_(cuts.steps, std=3)
        found = cuts.to(dtype)(torch.tensor([[0.0], [2.5]]))
        assert found.shape == (2, number)
        assert found.dtype == torch.float32
        assert (found.diff(dim=1) < 0).all()
        assert torch.allclose(found[1] - found[0], torch.tensor(2.5), atol=1e-4)
        cuts = cuts.float()


def test_an_ordinal_head_has_one_score_for_all_cut_points():
    model = head("ordinal")
    found = model(torch.randn(6, WIDTH))
    assert torch.allclose(found.diff(dim=1), found.diff(dim=1)[:1].expand(6, -1), atol=1e-5)
    assert (probabilities("ordinal", found) >= 0).all()


# Names


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"model\.head\.type=conv: allowed are linear, mlp, .*trust_remote_code"):
        head_class("conv")
    with pytest.raises(TypeError, match="depth"):
        head(options={"depth": 3})


def test_a_head_that_gives_another_count_of_numbers_is_refused(monkeypatch: pytest.MonkeyPatch):
    class InputIgnoringHead(LinearHead):
        def __init__(self, width: int, num_outputs: int):
            super().__init__(width, num_outputs + 1)

    monkeypatch.setitem(HEADS, "mine:Deaf", InputIgnoringHead)
    with pytest.raises(ValueError, match=r"model\.head\.type=mine:Deaf gives 2 numbers; .* asked for 1"):
        head("regression", type="mine:Deaf")(torch.randn(1, WIDTH))
