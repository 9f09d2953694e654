"""Families on packed rows: losses and gradients are those of the samples one by one, tiles and several images too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.test_families import make_images, make_sample
from tests.families.tiny_families import TINY, UNPACKED, save_family
from tests.logits import supervised_logits
from vlm.assembly.family import load_family_config, load_family_model
from vlm.assembly.packed_attention import use_packed_attention
from vlm.assembly.packed_rows import add_grid_positions, check_packing, check_shared_prompts
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES
from vlm.models.text_loss import supervised_loss

PACKING = [name for name in TINY if name not in UNPACKED]


def make_rows(processor: Any) -> list[dict[str, Any]]:
    """Samples with one image, with none, with another, larger one, and with two."""
    found = []
    for index, images in enumerate([make_images(1), [], make_images(3)[1:2], make_images(2)]):
        sizes = [image.size[::-1] for image in images]
        encoded = encode(processor, make_sample(len(images), "yes" * (index + 1)), sizes)
        found.append(model_inputs(processor, encoded, images, sizes))
    return found


def backpropagate(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits at supervised positions; the gradients of their summed loss are added to the model's."""
    logits, targets = supervised_logits(model, batch)
    supervised_loss(logits, targets, 1).backward()
    return logits.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKING)
def test_a_packed_row_is_its_samples_one_by_one(name: str, attention: str, tmp_path: Path):
    save_family(name, tmp_path)
    config = load_family_config(str(tmp_path), "model.hf_name")
    model = load_family_model(str(tmp_path), config, dtype=torch.float32, attention=attention)
    model.eval()  # as it trains, but for dropout
    processor = load_family_processor(str(tmp_path), FAMILIES[TINY[name].model_type])
    check_packing(model, processor)
    collate = Collator.of(processor, dummy_image(processor))
    expected = torch.cat([backpropagate(model, collate([row])) for row in make_rows(processor)])
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with use_packed_attention(model.config.get_text_config()):
        logits = backpropagate(model, add_grid_positions(model, PackingCollator(collate)(make_rows(processor))))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for key, parameter in model.named_parameters():
        if key in wanted:
            torch.testing.assert_close(parameter.grad, wanted[key], atol=2e-5, rtol=1e-4, msg=key)


def make_pairs(processor: Any) -> list[list[dict[str, Any]]]:
    """Two replies to a question with one image, with none, and with two."""
    pairs = []
    for images in (make_images(1), [], make_images(2)):
        sizes = [image.size[::-1] for image in images]
        samples = [make_sample(len(images), reply) for reply in ("yes, a cat", "no" * (1 + len(images)))]
        pairs.append([model_inputs(processor, encode(processor, one, sizes), images, sizes) for one in samples])
    return pairs


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl", "smolvlm"])  # tiles, grids of positions, rows of images
def test_replies_behind_a_shared_prompt_are_conversations_one_by_one(name: str, tmp_path: Path):
    save_family(name, tmp_path)
    config = load_family_config(str(tmp_path), "model.hf_name")
    model = load_family_model(str(tmp_path), config, dtype=torch.float32, attention="sdpa")
    model.eval()
    processor = load_family_processor(str(tmp_path), FAMILIES[TINY[name].model_type])
    check_shared_prompts(model, processor)
    collate, merger = Collator.of(processor, dummy_image(processor)), BranchMerger.of(processor)
    samples = [merger.merge(pair) for pair in make_pairs(processor)]
    assert None not in samples
    expected = torch.cat([backpropagate(model, collate([row])) for pair in make_pairs(processor) for row in pair])
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with use_packed_attention(model.config.get_text_config()):
        logits = backpropagate(model, add_grid_positions(model, PackingCollator(collate)(samples)))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for key, parameter in model.named_parameters():
        if key in wanted:
            torch.testing.assert_close(parameter.grad, wanted[key], atol=2e-5, rtol=1e-4, msg=key)
