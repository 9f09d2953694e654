"""Positions in rows and columns of images: the language model gets them in training, packed rows and answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.small_language_models import small_config
from tests.tiny_parts import Parts, byte_tokenizer, picture
from vlm.assembly.compose import build_model, compose
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models import VLMForConditionalGeneration
from vlm.models.language_inputs import grid_positions

NUM_TOKENS = 4


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3.5 with its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen3.5")
    tokenizer = byte_tokenizer("chatml")
    tokenizer.save_pretrained(folder)
    config = small_config("qwen3_5_text", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build(parts: Parts, folder: Path, positions: str, encoder: str, **recipe: Any) -> VisionLanguageModel:
    wanted = parts.recipe(encoder, **recipe)
    wanted.language_model.hf_name = str(folder)
    wanted.language_model.positions = positions
    config, processor = compose(wanted, "chatml", None)
    return VisionLanguageModel(build_model(wanted, config, processor, torch.float32, 0).eval(), processor)


@pytest.mark.parametrize(
    ("encoder", "recipe"), [("qwen2_5_vl", {"connector": "pixel_shuffle"}), ("siglip", {}), ("siglip2_naflex", {})]
)
def test_logits_and_answers_are_those_of_the_positions(
    parts: Parts, language_model: Path, tmp_path: Path, encoder: str, recipe: dict[str, Any]
):
    ours = build(parts, language_model, "mrope", encoder, **recipe)
    model: Any = ours.model
    turns = [[user_turn(text, 1)] for text in ("<image> what?", "a longer question about <image>: what is it?")]
    images = [[picture(0, (64, 40))], [picture(1, (32, 80))]]
    inputs = dict(ours.inputs(turns, images))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = model._token_grids(ids, inputs.get("image_grids"))
    assert sum(rows * columns for rows, columns in grids) == int((ids == model.config.image_token_id).sum())
    positions = grid_positions(ids, grids, model.config.image_token_id, mask)
    with torch.no_grad():
        embeddings = model.merge_images(ids, inputs["pixel_values"], image_grids=inputs.get("image_grids"))
        arguments = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": False}
        expected = model.language_model(**arguments, position_ids=positions).logits
        found = model(**inputs, use_cache=False).logits
        plain = model.language_model(**arguments).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    assert not torch.allclose(found[mask.bool()], plain[mask.bool()], atol=1e-4)
    answers = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    for row, answer in enumerate(answers[:, -NUM_TOKENS:]):
        alone = dict(ours.inputs([turns[row]], [images[row]]))
        ids = alone["input_ids"]
        for token in answer:  # without a cache
            passed = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**passed, use_cache=False).logits[0, -1]
            assert logits.max() - logits[token] <= 1e-4 * logits.abs().max()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    model.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.positions == "mrope"
    with torch.no_grad():
        assert torch.equal(again(**inputs, use_cache=False).logits, found)


def test_what_has_no_rows_and_columns_is_refused(parts: Parts, language_model: Path):
    with pytest.raises(ValueError, match=r"positions=mrope: .*\(model_type=llama\) has positions in one dimension"):
        build(parts, parts.language_model("llama"), "mrope", "siglip")
    queries = {"connector": "resampler", "options": {"num_queries": 4, "num_heads": 2}}
    for encoder in ("siglip", "siglip2_naflex"):
        with pytest.raises(ValueError, match=r"positions=mrope: the tokens of an image form no grid"):
            build(parts, language_model, "mrope", encoder, **queries)
