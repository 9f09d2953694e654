"""The vocabulary head is found where a class of transformers does not name it, and grows with the embeddings."""

from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vlm.assembly.small_models.defaults import make_default
from vlm.assembly.small_models.shrink import shrink
from vlm.models.vocabulary import find_head_owner, find_vocabulary_head, resize_vocabulary


def build(kind: str) -> PreTrainedModel:
    """A small model with random weights."""
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(shrink(make_default(kind)))


def test_the_head_that_a_model_names_is_taken():
    model = build("llava")
    assert find_head_owner(model) is model
    assert find_vocabulary_head(model) is model.get_output_embeddings()


def test_the_head_of_the_language_model_within_is_found_and_grows():
    model = build("nemotron_h_omni")
    assert model.get_output_embeddings() is None
    head = cast(nn.Linear, find_vocabulary_head(model))
    assert head is model.get_submodule("language_model.lm_head")
    rows = head.weight.shape[0]
    resize_vocabulary(model, rows + 1, multiple=64)
    grown, embeddings = cast(nn.Linear, find_vocabulary_head(model)), cast(nn.Embedding, model.get_input_embeddings())
    assert grown.weight.shape[0] == embeddings.num_embeddings > rows
    assert model.config.get_text_config().vocab_size == grown.weight.shape[0]
    assert torch.equal(grown.weight[:rows], head.weight[:rows])


def test_a_decoder_that_is_no_language_model_on_its_own_gives_no_head():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("blip"))
    assert find_vocabulary_head(model) is None
