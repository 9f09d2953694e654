"""Features at native resolution are those of the encoders' own code; images of a batch do not change each other."""

from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, Qwen2_5_VLForConditionalGeneration, Siglip2VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from tests.tiny_parts import NATIVE_ENCODERS, Parts, picture
from vlm.models.native import square_order
from vlm.models.native_encoders import MergerNorm, read_native_features, remove_merger

SHAPES = [(40, 30), (64, 24), (17, 70), (40, 30)]
"""Widths and heights."""
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "identity": {},
    "pixel_shuffle": {},
    "pooling": {"kernel": 2},
    "resampler": {"num_queries": 5, "num_heads": 2, "num_layers": 2},
    "qformer": {"num_queries": 5, "num_layers": 2, "hidden_dim": 32, "num_heads": 2},
}


def encode(model: Any, processor: Any, shapes: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    """Tokens of images."""
    images = [picture(seed + number, shape) for number, shape in enumerate(shapes)]
    inputs = processor.image_inputs(images)
    pixels = processor.normalise(inputs["pixel_values"])
    with torch.no_grad():
        tokens = model.get_image_features(pixels, image_grids=inputs["image_grids"])
    sizes = [(image.height, image.width) for image in images]
    assert len(tokens) == sum(processor.native_resolution.image_tokens(sizes))
    return tokens


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("encoder", NATIVE_ENCODERS)
def test_images_of_different_sizes_are_encoded_as_alone(parts: Parts, encoder: str, connector: str):
    options = {"connector": connector, "options": CONNECTORS[connector]}
    model, processor = parts.model(encoder, "llama", image_mode="native", **options)
    model.eval()
    together = encode(model, processor, SHAPES)
    alone = [encode(model, processor, [shape], seed) for seed, shape in enumerate(SHAPES)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert together.std() > 1e-4


def test_pixel_shuffle_and_pooling_read_a_square_as_they_do_otherwise(parts: Parts):
    for connector in ("pixel_shuffle", "pooling"):
        model, _ = parts.model(
            "siglip", "llama", connector=connector, options=CONNECTORS[connector], image_mode="native"
        )
        features = torch.randn(2 * 16, 32)
        both = model.connector.map_native(features, [(4, 4), (4, 4)])
        torch.testing.assert_close(both, model.connector(features.view(2, 16, 32)).flatten(0, 1))


def test_naflex_is_read_as_its_own_code_does(parts: Parts):
    """Its own image processor, model and padding; the size is the one that both choose."""
    folder = parts.encoder("siglip2_naflex")
    theirs = Siglip2VisionModel.from_pretrained(folder).eval()
    model, processor = parts.model("siglip2_naflex", "llama", connector="identity")
    images = [picture(0, (64, 64)), picture(1, (128, 32))]
    inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    ours = processor.image_inputs(images)
    assert ours["image_grids"].tolist() == inputs["spatial_shapes"].tolist()
    with torch.no_grad():
        states = theirs(**inputs).last_hidden_state[inputs["pixel_attention_mask"].bool()]
        found = model.get_image_features(processor.normalise(ours["pixel_values"]), image_grids=ours["image_grids"])
    torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration), ("qwen3_vl", Qwen3VLForConditionalGeneration)],
)
def test_a_vision_tower_is_that_of_its_whole_model(parts: Parts, name: str, whole: Any):
    """What our encoder and norm give, put through the merger that was left out, is what the whole model gives."""
    folder = parts.encoder(name)
    theirs = whole.from_pretrained(folder).eval()
    model, processor = parts.model(name, "llama", connector="pooling", options={"kernel": 2})
    images = [picture(0, (80, 48)), picture(1, (64, 128))]
    inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    ours = processor.image_inputs(images)
    assert [[1, *grid] for grid in ours["image_grids"].tolist()] == inputs["image_grid_thw"].tolist()
    grids = [(rows, columns) for rows, columns in ours["image_grids"].tolist()]
    assert isinstance(model.visual_encoder.merger, MergerNorm)
    with torch.no_grad():
        pixels = processor.normalise(ours["pixel_values"])
        features = read_native_features(model.visual_encoder, pixels, grids, None, 0)
        merger = theirs.model.visual.merger
        squares = features[square_order(grids, 2)].reshape(-1, 4 * features.shape[1])
        merged = (
            merger.mlp(squares)
            if name == "qwen2_5_vl"
            else merger.linear_fc2(merger.act_fn(merger.linear_fc1(squares)))
        )
        expected = theirs.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)


def test_encoders_without_a_merger_stay_as_they_are(parts: Parts):
    encoder = AutoModel.from_pretrained(parts.encoder("dinov3"))
    before = list(encoder.state_dict())
    remove_merger(encoder)
    assert list(encoder.state_dict()) == before
