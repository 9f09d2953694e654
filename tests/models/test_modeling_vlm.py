"""The composed model: which features are read, where they go, what is computed and what is not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from tests.tiny_parts import ENCODERS, IGNORE_INDEX, LANGUAGE_MODELS, Parts, picture
from vlm.data.batching.collator import Collator
from vlm.models import VLMForConditionalGeneration, VLMProcessor

LAYERS = {name: 5 if name == "timm_convnet" else 3 for name in ENCODERS}
"""Layers (stages of a convolutional network) of each tiny encoder."""

CONNECTORS = [
    ("identity", {}),
    ("linear", {}),
    ("linear", {"input_norm": True, "bias": False}),
    ("mlp", {"num_layers": 1}),
    ("mlp", {"num_layers": 3, "hidden_dim": 20, "activation": "relu", "input_norm": True}),
]

Built = tuple[VLMForConditionalGeneration, VLMProcessor]


def batch(processor: VLMProcessor, rows: Sequence[str]) -> dict[str, Tensor]:
    """Texts with `<image>` as a batch; what follows the last image, or the first token, is supervised."""
    samples, number = [], 0
    for text in rows:
        ids = processor.tokenize(text)[0]
        images = text.count("<image>")
        seen = [picture(number + index, (30 + 5 * index, 40)) for index in range(images)]
        number += images
        start = max([0, *(place for place, token in enumerate(ids) if token == processor.image_token_id)]) + 1
        labels = [IGNORE_INDEX] * start + ids[start:]
        pixels = processor.pixel_values(seen) if seen else None
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return Collator(processor.tokenizer.pad_token_id)(samples)


ROWS = ("what is <image> and <image>? two cats", "no picture here", "<image>a red circle")


@pytest.fixture(scope="module")
def built(parts: Parts) -> Built:
    """CLIP, mlp, Llama; tests must leave the weights as they are."""
    return parts.model()


# The features


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_hidden_layer_is_the_encoders_own(parts: Parts, encoder: str):
    """`feature_layer` counts as `hidden_states` of the whole encoder does, though later layers may not be built."""
    whole = AutoModel.from_pretrained(parts.encoder(encoder)).eval()
    count = len(whole(torch.zeros(1, 3, *SIZES[encoder]), output_hidden_states=True).hidden_states)
    assert count == LAYERS[encoder] + (not encoder.startswith("timm"))
    for layer in range(-count, count):
        model, processor = parts.model(encoder, connector="linear", layer=layer, strategy="full")
        pixels = processor.pixel_values([picture(0), picture(1)])
        with torch.no_grad():
            expected = whole(pixels, output_hidden_states=True).hidden_states[layer]
            features = model.eval().encode_images(pixels)
        if expected.ndim == 4:
            expected = expected.flatten(2).transpose(1, 2)
        assert torch.allclose(features, expected, atol=1e-6), layer


SIZES = {
    "clip": (24, 24), "siglip": (24, 24), "dinov2": (16, 16), "dinov2_with_registers": (16, 16),
    "timm_vit": (32, 32), "timm_convnet": (32, 32),
}  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS)
def test_without_a_layer_the_encoders_own_output_is_read(parts: Parts, encoder: str):
    model, processor = parts.model(encoder, connector="linear", strategy="full")
    pixels = processor.pixel_values([picture(0)])
    with torch.no_grad():
        expected = AutoModel.from_pretrained(parts.encoder(encoder)).eval()(pixels).last_hidden_state
        features = model.eval().encode_images(pixels)
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.allclose(features, expected, atol=1e-6)


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name not in ("siglip", "timm_convnet")])
def test_strategies_choose_among_the_same_tokens(parts: Parts, encoder: str):
    """CLS stands first, then registers, then patches."""
    pixels = torch.randn(2, 3, *SIZES[encoder])
    seen = {}
    for strategy in ("full", "patch", "cls", "cls+patch"):
        model = parts.model(encoder, connector="linear", strategy=strategy)[0].eval()
        with torch.no_grad():
            seen[strategy] = model.encode_images(pixels)
    prefix = model.config.num_prefix_tokens
    assert torch.equal(seen["patch"], seen["full"][:, prefix:])
    assert torch.equal(seen["cls"], seen["full"][:, :1])
    assert torch.equal(seen["cls+patch"], torch.cat([seen["cls"], seen["patch"]], dim=1))


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_layers_past_the_selected_one_are_not_built(parts: Parts, encoder: str):
    model = parts.model(encoder, layer=-3)[0]
    layers = [name for name, _ in model.visual_encoder.named_modules() if "layers." in name and name.endswith(".mlp")]
    assert len(layers) == model.config.vision_config.num_hidden_layers == 1


def test_siglips_pooling_head_is_not_built(parts: Parts):
    """Nobody reads its output."""
    model = parts.model("siglip")[0]
    assert not any("head" in name for name in model.visual_encoder.state_dict())


# The merge


def test_features_stand_at_their_placeholders_in_order(built: Built):
    """Image k of the batch takes the k-th stretch of placeholders, row after row; text stays as it is."""
    model, processor = built
    inputs = batch(processor, ROWS)
    with torch.no_grad():
        merged = model.merge_images(inputs["input_ids"], inputs["pixel_values"])
        features = model.get_image_features(inputs["pixel_values"])
        text = model.get_input_embeddings()(inputs["input_ids"])
    rows, columns = (inputs["input_ids"] == model.config.image_token_id).nonzero(as_tuple=True)
    assert rows.tolist() == [0] * 18 + [2] * 9
    assert torch.equal(merged[rows, columns], features.flatten(0, 1))
    assert not torch.allclose(features[0], features[1])
    elsewhere = inputs["input_ids"] != model.config.image_token_id
    assert torch.equal(merged[elsewhere], text[elsewhere])


def test_a_row_is_what_it_is_alone(built: Built):
    """Neighbouring rows, their images and padding change nothing."""
    model, processor = built
    together = batch(processor, ROWS)
    with torch.no_grad():
        logits = model.eval()(**{**together, "labels": None}).logits
        pixels = [together["pixel_values"][:2], None, together["pixel_values"][2:]]
        for row, (text, seen) in enumerate(zip(ROWS, pixels, strict=True)):
            ids = torch.tensor([processor.tokenize(text)[0]])
            alone = model(input_ids=ids, pixel_values=seen).logits[0]
            assert torch.allclose(logits[row, : ids.shape[1]], alone, atol=1e-5)


def test_too_many_and_too_few_placeholders_name_the_rows(built: Built):
    model, processor = built
    inputs = batch(processor, ROWS)
    with pytest.raises(
        ValueError, match=r"2 images of 9 tokens each need 18 placeholders \(id \d+\), but the batch has"
    ):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match=r"row -> count \{0: 18, 2: 9\}.*Prepare the inputs with this model's own"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][[0, 1, 2, 2]]})


def test_exactly_one_kind_of_input_is_needed(built: Built):
    model = built[0]
    ids = torch.tensor([[5, 6]])
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


# Loss and logits


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_supervised_logits_are_those_of_a_whole_pass(parts: Parts, language_model: str):
    """For every language model: the kept logits are rows of all logits, and the loss is their cross-entropy."""
    model, processor = parts.model("clip", language_model)
    inputs = batch(processor, ROWS)
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    with torch.no_grad():
        whole = model.eval()(**{**inputs, "labels": None}).logits
        output = model(**inputs)
    assert whole.shape[:2] == inputs["input_ids"].shape
    assert output.logits.shape == (int((targets != IGNORE_INDEX).sum()), whole.shape[-1])
    assert torch.allclose(output.logits, whole[targets != IGNORE_INDEX], atol=1e-5)
    expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    assert torch.allclose(output.loss, expected, atol=1e-5)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_gradients_reach_every_part(parts: Parts, language_model: str):
    model, processor = parts.model("clip", language_model, layer=-2)
    model.train()(**batch(processor, ROWS)).loss.backward()
    for part in (model.visual_encoder, model.connector, model.language_model):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert gradients
        assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(("connector", "options"), CONNECTORS)
def test_every_connector_trains(parts: Parts, connector: str, options: dict[str, Any]):
    """One step on the connector alone lowers the loss; the identity has nothing to train."""
    model, processor = parts.model(connector=connector, options=options)
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    inputs = batch(processor, ROWS)
    parameters = list(model.connector.parameters())
    if connector == "identity":
        assert not parameters
        assert torch.isfinite(model(**inputs).loss)
        return
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = model.train()(**inputs).loss
    before.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters)
    optimizer.step()
    assert model(**inputs).loss < before


def test_without_labels_logits_are_kept_as_asked(built: Built):
    model, processor = built
    inputs = batch(processor, ROWS[:1])
    inputs.pop("labels")
    with torch.no_grad():
        whole, last = model(**inputs).logits, model(**inputs, logits_to_keep=1).logits
    assert last.shape[1] == 1
    assert torch.allclose(whole[:, -1:], last, atol=1e-6)


def test_nothing_supervised_is_a_loss_of_zero_with_a_graph(built: Built):
    """Every rank runs the same backward pass, whatever its data."""
    model, processor = built
    inputs = batch(processor, ROWS)
    for items in (None, torch.tensor(5)):
        output = model(
            **{**inputs, "labels": torch.full_like(inputs["labels"], IGNORE_INDEX)}, num_items_in_batch=items
        )
        assert output.loss.item() == 0
        assert output.logits.shape[0] == 0
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.connector.parameters())
        model.zero_grad()


def test_the_first_token_predicts_nothing(built: Built):
    """A label at position 0 has no position before it."""
    model, processor = built
    inputs = batch(processor, ["cats"])
    labels = inputs["input_ids"].clone()
    assert len(model(**{**inputs, "labels": labels}).logits) == labels.shape[1] - 1


# What is not computed


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_frozen_encoder_builds_no_graph_and_stays_in_evaluation_mode(parts: Parts, encoder: str):
    model, processor = parts.model(encoder)
    model.visual_encoder.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.visual_encoder.modules())
    assert model.connector.training
    seen: list[Tensor] = []
    model.connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = {name: value.clone() for name, value in model.visual_encoder.state_dict().items()}
    model(**batch(processor, ROWS)).loss.backward()
    assert not seen[0].requires_grad
    assert seen[0].grad_fn is None
    assert all(torch.equal(value, before[name]) for name, value in model.visual_encoder.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.connector.parameters())


def test_an_encoder_that_trains_is_in_training_mode(parts: Parts):
    """Batch norm counts its batches only then."""
    model, processor = parts.model("timm_convnet")
    model.train()
    assert model.visual_encoder.training
    model(**batch(processor, ROWS))
    counted = [value for name, value in model.visual_encoder.state_dict().items() if "num_batches" in name]
    assert counted
    assert all(value == 1 for value in counted)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("frozen", [(), ("visual_encoder",), ("visual_encoder", "language_model")])
def test_gradient_checkpointing_gives_the_same_gradients(parts: Parts, encoder: str, frozen: tuple[str, ...]):
    model, processor = parts.model(encoder)
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0  # statistics of the first pass must not reach the second
    inputs = batch(processor, ROWS)
    passes: list[int] = []
    model.language_model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(passes) == 1
    model.activation_checkpointing_enable()
    recomputed = gradients()
    assert len(passes) == 3  # once more, and once for the backward pass
    assert plain.keys() == recomputed.keys()
    assert any(name.startswith("connector") for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-6), name


def test_the_cache_goes_on_where_it_stopped(built: Built):
    """Logits of the last tokens out of a cache are those of a whole pass."""
    model, processor = built
    inputs = batch(processor, ROWS[:1])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        whole = model.eval()(input_ids=ids, pixel_values=pixels).logits
        first = model(input_ids=ids[:, :-3], pixel_values=pixels, use_cache=True)
        rest = model(input_ids=ids[:, -3:], past_key_values=first.past_key_values).logits
    assert torch.allclose(whole[:, -3:], rest, atol=1e-5)


def test_hidden_states_and_attentions_are_given_where_asked_for(built: Built):
    model, processor = built
    inputs = batch(processor, ROWS[:1])
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert output.hidden_states[0].shape[:2] == inputs["input_ids"].shape
    assert model(**inputs).hidden_states is None
