"""Images are encoded as they are alone, and a model that takes no mask of positions computes the logits of all."""

from functools import cache
from typing import Any

import pytest
import torch

from vlm.assembly.small_models.image_codes import NUM_CODES
from vlm.assembly.small_models.make import make_small
from vlm.families.meta_model import get_auto_class
from vlm.families.row_by_row import PlaceholdersByType, SizedEncoding, keep_apart

SIZES = torch.tensor([[32, 64], [64, 32], [32, 64]])
"""Heights and widths of images in one batch, which is padded to 64 x 64."""


@cache
def make_model(model_type: str) -> Any:
    """Return the small model of a type with random weights."""
    config = make_small(model_type).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_auto_class(config).from_config(config).eval()


def make_images() -> torch.Tensor:
    """Return noise in images of these sizes, `(3, 3, 64, 64)`, with zeros behind it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(len(SIZES), 3, 64, 64)
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:, :height, :width] = torch.randn(3, int(height), int(width), generator=generator)
    return images


@torch.no_grad()
def test_codes_of_an_image_do_not_depend_on_the_largest_one_of_its_batch():
    model, images = make_model("emu3"), make_images()
    quantizer = model.model.vqmodel
    own = type(quantizer).encode.__get__(quantizer)
    alone = [
        own(image[None, :, :height, :width], torch.tensor([[height, width]])).image_tokens[0]
        for image, (height, width) in zip(images, SIZES.tolist(), strict=True)
    ]
    padded = own(images, SIZES).image_tokens
    assert not all(map(torch.equal, padded, alone)), "its own code no longer sees the padding: SizedEncoding can go"
    keep_apart(model)
    keep_apart(model)
    assert isinstance(quantizer.encode, SizedEncoding)
    assert not isinstance(quantizer.encode.encode, SizedEncoding)
    assert all(map(torch.equal, quantizer.encode(images, SIZES).image_tokens, alone))
    assert len(model.model.get_image_features(images, SIZES).pooler_output) == len(SIZES)


@torch.no_grad()
def test_a_model_that_takes_no_mask_computes_all_logits():
    model, ids = make_model("chameleon"), torch.tensor([[5, 6, 7]])
    keep = torch.tensor([[False, True, True]])
    with pytest.raises(IndexError):
        model(input_ids=ids, logits_to_keep=keep)
    keep_apart(model)
    logits = model(input_ids=ids, logits_to_keep=keep).logits
    assert torch.equal(logits, model(input_ids=ids).logits)
    assert model(input_ids=ids, logits_to_keep=1).logits.shape == (1, 1, logits.shape[-1])


def test_images_and_videos_of_one_id_are_told_apart_by_the_types_of_tokens():
    model = make_model("glm_ocr")
    body, image_id = model.model, model.config.image_token_id
    ids, types = torch.tensor([[5, image_id, image_id, image_id]]), torch.tensor([[0, 1, 2, 2]])
    embeddings, one, two = torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="do not match"):
        body.get_placeholder_mask(ids, embeddings, image_features=one)
    keep_apart(model)
    keep_apart(model)
    masks = body.get_placeholder_mask
    assert not isinstance(masks.find, PlaceholdersByType)
    masks.read_types(body, (), {"mm_token_type_ids": types})
    images, videos = masks(ids, embeddings, image_features=one, video_features=two)
    assert images.flatten().tolist() == [False, True, False, False]
    assert videos.flatten().tolist() == [False, False, True, True]
    for wrong in ({"image_features": two}, {"video_features": one}):
        with pytest.raises(ValueError, match="do not match"):
            masks(ids, embeddings, **wrong)
    masks.read_types(body, (), {})  # as in generation, behind a cache
    assert masks(ids[:, :1], embeddings[:, :1])[0].tolist() == [[[False]]]


def test_other_models_keep_their_own_placeholders():
    model = make_model("qwen2_5_vl")
    keep_apart(model)
    assert not isinstance(model.model.get_placeholder_mask, PlaceholdersByType)


@pytest.mark.parametrize("model_type", ["chameleon", "emu3"])
def test_every_code_of_an_image_is_a_token(model_type: str):
    small = make_small(model_type)
    mapping = make_model(model_type).model.vocabulary_mapping
    assert sorted(mapping.img2bpe) == list(range(NUM_CODES))
    names = small.processor.tokenizer.convert_ids_to_tokens(list(mapping.img2bpe.values()))
    assert len(set(names)) == NUM_CODES
    assert mapping.image_token_id == small.processor.image_token_id == small.config.image_token_id
