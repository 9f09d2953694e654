"""Builds the small untrained parts that the demo and the examples train, without a network."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from vlm.cli.collection import hush_device_notes
from vlm.data.encoding.labels import read_template
from vlm.demo import scenes

WIDTH = 128
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def build_tiny_parts(folder: Path, *, width: int = WIDTH) -> None:
    """Write `folder/visual_encoder` and `folder/language_model`, of about a million parameters in total.

    The encoder's patches are the cells of `scenes.py`; the tokenizer has a token for each word of its texts, and bytes
    for all other words. Hidden states are `width` wide, a multiple of 8.
    """
    hush_device_notes()
    disable_progress_bar()
    torch.manual_seed(0)
    side = scenes.CELLS * scenes.CELL
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=scenes.CELL,
    )
    encoder = CLIPVisionModel(vision)
    for name, parameter in encoder.named_parameters():
        if "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # positions are distinguishable from the first step on
        elif "patch_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    encoder.save_pretrained(folder / "visual_encoder")
    size = {"height": side, "width": side}
    processor = CLIPImageProcessor(
        size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor.save_pretrained(folder / "visual_encoder")
    tokenizer = make_word_tokenizer()
    tokenizer.save_pretrained(folder / "language_model")
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 1,  # room for the image token
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[str(tokenizer.eos_token)],
        pad_token_id=tokenizer.get_vocab()[str(tokenizer.pad_token)],
    )
    LlamaForCausalLM(text).save_pretrained(folder / "language_model")


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token for each word of the scenes' texts."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(generate_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = read_template("chatml")
    return tokenizer


def generate_texts() -> Iterator[str]:
    """Yield texts with all words of captions, questions and answers."""
    rng = random.Random(0)
    for number in range(300):
        scene = scenes.random_scene(rng, held_out=number % 2 == 0)
        yield scenes.caption(scene, rng)
        for question, answer in scenes.questions(scene).values():
            yield f"{question}\n{answer}\nuser\nassistant\nsystem\n{scenes.CAPTION_PROMPT}"
