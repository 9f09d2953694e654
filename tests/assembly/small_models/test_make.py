"""Small models of types of transformers, with processors of their own classes."""

import pytest
import torch
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlm.assembly.small_models.defaults import UNSUPPORTED
from vlm.assembly.small_models.make import find_token_id, make_small
from vlm.assembly.small_models.tokenizers import read_special_tokens
from vlm.families.meta_model import get_auto_class

TYPES = ("gemma3", "gemma4", "idefics2", "llava_onevision", "minimax_m3_vl", "molmo2", "perception_lm", "qwen3_5")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_small_model_reads_an_image(model_type: str):
    small = make_small(model_type)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = small.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = small.processor(
        text=[text], images=[Image.new("RGB", (60, 48), "red")], return_tensors="pt", return_mm_token_type_ids=True
    )
    model = get_auto_class(small.config).from_config(small.config, dtype=torch.float32).eval()
    assert sum(weight.numel() for weight in model.parameters()) < 10_000_000
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    assert logits.isfinite().all()
    assert logits.shape[1] == inputs["input_ids"].shape[1]


def test_token_ids_are_those_of_the_tokenizer():
    small = make_small("qwen3_vl")
    words = small.processor.tokenizer
    assert small.config.image_token_id == words.convert_tokens_to_ids("<|image_pad|>")
    assert small.config.text_config.pad_token_id == words.pad_token_id
    assert small.config.text_config.vocab_size == len(words)
    assert find_token_id(small.processor, "vision_start") == small.config.vision_start_token_id
    assert find_token_id(small.processor, "nothing") is None


def test_special_tokens_are_read_from_the_source_of_a_class():
    class Made:
        """A docstring that says "<nothing>"."""

        def __init__(self, tokenizer: object):
            self.tokens = ["<start>", f"{self}<|end|>", "[IMG]", "< no >"]
            self.needed = tokenizer.boi_token
            self.optional = tokenizer.image_token if hasattr(tokenizer, "image_token") else "<image>"
            self.standard = tokenizer.eos_token

    assert read_special_tokens(Made) == (["<start>", "<|end|>", "[IMG]", "<image>"], ["boi_token"])


def test_what_is_not_supported_says_why():
    assert set(UNSUPPORTED) < set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - len(UNSUPPORTED) >= 74
    with pytest.raises(ValueError, match="model_type=evolla: no small model is made of it: it reads proteins"):
        make_small("evolla")
