"""Positions in rows and columns of images are those of Qwen's own models; ids are looked up as Gemma's do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model

from vlm.models.language_inputs import grid_positions, look_up_ids, looks_up_ids

IMAGE = 7
GRIDS = [(2, 3), (4, 1), (1, 5), (3, 3)]
"""Rows and columns of tokens of the images of the batch."""


def row(*pieces: int | tuple[int, int]) -> list[int]:
    """Ids of a row: a number is that many tokens of text, a grid is an image."""
    return [
        token
        for piece in pieces
        for token in ([1] * piece if isinstance(piece, int) else [IMAGE] * (piece[0] * piece[1]))
    ]


ROWS = [row(3, GRIDS[0], 2, GRIDS[1], 4), row(GRIDS[2], 1), row(5), row(1, GRIDS[3], 3)]
LENGTH = max(map(len, ROWS))


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and mask of all rows."""
    ids, mask = torch.zeros(2, len(ROWS), LENGTH, dtype=torch.long)
    for number, tokens in enumerate(ROWS):
        place = slice(LENGTH - len(tokens), LENGTH) if left else slice(0, len(tokens))
        ids[number, place], mask[number, place] = torch.tensor(tokens), 1
    return ids, mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("theirs", [Qwen2_5_VLModel, Qwen3_5Model])
def test_positions_are_those_of_qwen(theirs: Any, left: bool):
    """Their function, of a model without weights; their grids are of patches, of which 2 x 2 are a token."""
    ids, mask = padded(left)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *args, **kwargs: theirs.get_vision_position_ids(model, *args, **kwargs)
    thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in GRIDS])
    kinds = (ids == IMAGE).int()
    expected, _ = theirs.get_rope_index(model, ids, mm_token_type_ids=kinds, image_grid_thw=thw, attention_mask=mask)
    positions = grid_positions(ids, GRIDS, IMAGE, mask)
    assert positions.shape == (4, len(ROWS), LENGTH)
    real = mask.bool()
    assert torch.equal(positions[1:, real], expected[:, real])
    assert torch.equal(positions[0][real], ((mask.cumsum(1) - 1).clamp(min=0))[real])


def test_samples_of_a_packed_row_have_the_positions_that_they_have_alone():
    text = torch.cat([torch.arange(len(tokens)) for tokens in ROWS])[None]
    packed = grid_positions(torch.tensor([[token for tokens in ROWS for token in tokens]]), GRIDS, IMAGE, None, text)
    grids = iter(GRIDS)
    alone = [
        grid_positions(torch.tensor([tokens]), [next(grids) for _ in range(number)], IMAGE)
        for tokens, number in zip(ROWS, (2, 1, 0, 1), strict=True)
    ]
    assert torch.equal(packed, torch.cat(alone, dim=2))


def test_replies_behind_a_shared_prompt_have_the_positions_that_they_have_alone():
    prompts, replies = (ROWS[0], ROWS[2]), (2, 4, 3)
    packed, text, alone = [], [], []
    for prompt, grids in zip(prompts, (GRIDS[:2], []), strict=True):
        for number, reply in enumerate(replies):
            start = len(prompt) if number else 0
            packed += (prompt + [1] * reply)[start:]
            text.append(torch.arange(start, len(prompt) + reply))
            alone.append(grid_positions(torch.tensor([prompt + [1] * reply]), grids, IMAGE)[:, :, start:])
    positions = grid_positions(torch.tensor([packed]), GRIDS[:2], IMAGE, None, torch.cat(text)[None])
    assert torch.equal(positions, torch.cat(alone, dim=2))


def test_images_side_by_side_are_told_apart():
    ids = torch.tensor([row((2, 2), (2, 2))])
    positions = grid_positions(ids, [(2, 2), (2, 2)], IMAGE)
    assert positions[1, 0].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert positions[2, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert positions[3, 0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
}  # fmt: skip
NARROW = {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("kind", "config"),
    [(Gemma4ForCausalLM, Gemma4TextConfig(**SHAPE)), (Gemma3nForCausalLM, Gemma3nTextConfig(**SHAPE, **NARROW))],
)
def test_what_is_looked_up_beside_embeddings_gives_the_logits_of_ids(kind: Any, config: PreTrainedConfig):
    torch.manual_seed(0)
    model = kind(config).eval()
    decoder = model.get_decoder()
    assert looks_up_ids(decoder)
    ids = torch.arange(5, 15).view(2, 5)
    with torch.no_grad():
        inputs = look_up_ids(decoder, ids, image_token_id=IMAGE, pad_token_id=config.pad_token_id)
        as_padding = look_up_ids(decoder, ids.masked_fill(ids == IMAGE, 0), IMAGE, 0)
        assert torch.equal(inputs, as_padding)
        text = ids.masked_fill(ids == IMAGE, 0)
        logits = model(inputs_embeds=model.get_input_embeddings()(text), per_layer_inputs=inputs).logits
        torch.testing.assert_close(logits, model(input_ids=text).logits)


def test_others_look_nothing_up():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    assert not looks_up_ids(LlamaForCausalLM(config).get_decoder())
