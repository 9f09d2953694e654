"""Connectors with learned queries, against other people's modules with the same weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlm.models.connectors import CONNECTORS, connector_options

VISION_DIM, TEXT_DIM = 16, 24


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 10, VISION_DIM)


def jitter(module: nn.Module) -> None:
    """Random norms and biases, so that one in a wrong place shows."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)


# Resampler


def test_the_resampler_is_flamingos_as_idefics_has_it(features: torch.Tensor):
    """IDEFICS rebuilt Flamingo; its resampler with our weights gives our tokens."""
    ours = CONNECTORS["resampler"](VISION_DIM, TEXT_DIM, num_queries=4, num_layers=2, num_heads=2, activation="relu")
    jitter(ours)
    settings = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False),
        vision_config=SimpleNamespace(embed_dim=VISION_DIM),
    )
    theirs = IdeficsPerceiverResampler(settings, VISION_DIM, 2, 2, VISION_DIM // 2, 4)
    with torch.no_grad():
        theirs.latents.copy_(ours.queries)
        theirs.layer_norm.load_state_dict(ours.norm.state_dict())
        for (attention, feed_forward), block in zip(theirs.blocks, ours.blocks, strict=True):
            names = {
                "context_layer_norm": "feature_norm", "latents_layer_norm": "query_norm", "q_proj": "query",
                "k_proj": "key", "v_proj": "value", "output_proj": "output",
            }  # fmt: skip
            for name, our_name in names.items():
                attention.get_submodule(name).load_state_dict(block.get_submodule(our_name).state_dict())
            for module, our_module in zip(
                (feed_forward.ln, feed_forward.fc, feed_forward.act, feed_forward.c_proj),
                block.feed_forward, strict=True,
            ):  # fmt: skip
                module.load_state_dict(our_module.state_dict())
        assert torch.allclose(ours.output(theirs(features)), ours(features), atol=1e-5)


def test_the_resampler_does_not_see_the_order_of_features(features: torch.Tensor):
    ours = CONNECTORS["resampler"](VISION_DIM, TEXT_DIM, num_queries=4, num_layers=2, num_heads=2)
    shuffled = features[:, torch.randperm(10)]
    with torch.no_grad():
        assert torch.allclose(ours(features), ours(shuffled), atol=1e-5)
        assert not torch.allclose(ours(features), ours(features.roll(1, 0)), atol=1e-3)  # but whose they are
        assert ours(features)[0].std(dim=0).min() > 1e-3  # and its queries differ


def test_the_resampler_takes_another_width(features: torch.Tensor):
    ours = CONNECTORS["resampler"](VISION_DIM, TEXT_DIM, num_queries=4, num_layers=1, num_heads=2, hidden_dim=8)
    assert ours.queries.shape == (4, 8)
    assert ours(features).shape == (2, 4, TEXT_DIM)


# Q-Former


def test_the_qformer_is_blip2s(features: torch.Tensor):
    """A whole BLIP-2 of transformers with our weights gives our tokens for what its encoder gives."""
    options = connector_options(
        "qformer", {"num_queries": 4, "num_layers": 3, "hidden_dim": 8, "num_heads": 2, "input_norm": False}
    )
    ours = CONNECTORS["qformer"](VISION_DIM, TEXT_DIM, **options).eval()
    settings = Blip2Config(
        vision_config={"hidden_size": VISION_DIM, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "intermediate_size": 8, "image_size": 6, "patch_size": 2},
        qformer_config=ours.qformer.config.to_dict(),
        text_config=OPTConfig(hidden_size=TEXT_DIM, word_embed_proj_dim=TEXT_DIM, num_hidden_layers=1, ffn_dim=8,
                              num_attention_heads=2, vocab_size=64).to_dict(),
        num_query_tokens=4,
    )  # fmt: skip
    theirs = Blip2ForConditionalGeneration(settings).eval()
    with torch.no_grad():
        theirs.query_tokens.copy_(ours.queries[None])
        theirs.qformer.load_state_dict(ours.qformer.state_dict())
        theirs.language_projection.load_state_dict(ours.output.state_dict())
        pixels = torch.randn(2, 3, 6, 6)
        seen = theirs.vision_model(pixels).last_hidden_state
        assert seen.shape == features.shape
        assert torch.allclose(theirs.get_image_features(pixels).pooler_output, ours(seen), atol=1e-5)


def test_the_qformer_holds_nothing_of_text():
    names = [name for name, _ in CONNECTORS["qformer"](VISION_DIM, TEXT_DIM, num_layers=2).named_parameters()]
    assert not [name for name in names if "embedding" in name or ".intermediate." in name or (".output.L" in name
                and "attention" not in name)]  # fmt: skip
    assert any("intermediate_query" in name for name in names)


@pytest.mark.parametrize(("frequency", "reading"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_every_so_many_layers_read_the_features(frequency: int, reading: list[int]):
    ours = CONNECTORS["qformer"](
        VISION_DIM, TEXT_DIM, num_layers=4, hidden_dim=8, num_heads=2, cross_attention_frequency=frequency
    )
    layers = ours.qformer.encoder.layer
    assert [index for index, layer in enumerate(layers) if layer.has_cross_attention] == reading


def test_the_qformer_begins_as_bert_does():
    ours = CONNECTORS["qformer"](VISION_DIM, TEXT_DIM)
    assert ours.queries.shape == (32, 768)
    assert ours.queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert ours.qformer.encoder.layer[0].attention.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert len(ours.qformer.encoder.layer) == 12


def test_dropout_is_for_training_alone(features: torch.Tensor):
    ours = CONNECTORS["qformer"](VISION_DIM, TEXT_DIM, num_layers=1, hidden_dim=8, num_heads=2, dropout=0.5)
    assert not torch.equal(ours(features), ours(features))
    ours.eval()
    assert torch.equal(ours(features), ours(features))
