"""Replies behind a shared prompt: losses and gradients are those of conversations with prompts of their own, padded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tiny_parts import LANGUAGE_MODELS, Parts, picture
from tests.train.step.test_packing import Ready, forward_one_by_one, packed
from vlm.assembly import packed_attention as attention
from vlm.assembly.packed_attention import use_packed_attention
from vlm.assembly.packed_rows import check_shared_prompts
from vlm.data.batching import packing
from vlm.data.batching.packing import BRANCHES, KEY_INDEX
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.encoding.labels import IGNORE_INDEX

RECORDS = (
    ("<image>what is it? ", ("a red circle", "a blue square, and more")),
    ("two: <image> and <image>, which? ", ("the first of both", "none")),
    ("no image here, ", ("yes", "no, or maybe", "perhaps")),
)


def make_sides(processor: Any) -> list[list[dict[str, Any]]]:
    """The conversations of each record; the second token of each reply is not supervised."""
    records, number = [], 0
    for prompt, replies in RECORDS:
        images = [picture(number + index) for index in range(prompt.count("<image>"))]
        number += len(images)
        pixels = {"pixel_values": processor.pixel_values(images)} if images else {}
        start, sides = processor.tokenize(prompt)[0], []
        for reply in replies:
            ids = processor.tokenizer(reply, add_special_tokens=False).input_ids
            labels = [IGNORE_INDEX] * len(start) + [ids[0], IGNORE_INDEX, *ids[2:]]
            sides.append({"input_ids": start + ids, "labels": labels, **pixels})
        records.append(sides)
    return records


def merge(processor: Any) -> list[dict[str, Any]]:
    """Each record as one sample."""
    samples = [BranchMerger.of(processor).merge(sides) for sides in make_sides(processor)]
    assert all(sample is not None and sample[BRANCHES].shared > 3 for sample in samples)
    return samples  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name != "gemma2"])
def test_replies_are_those_of_conversations_one_by_one(parts: Parts, name: str):
    model, processor = parts.model("clip", name)
    model.language_model.set_attn_implementation("sdpa")
    model.train()
    check_shared_prompts(model, processor)
    collate = Ready(processor)
    sides = [side for sides in make_sides(processor) for side in sides]
    expected, wanted = forward_one_by_one(model, sides, collate)
    logits, found = packed(model, merge(processor), collate)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], atol=1e-5, rtol=1e-4, msg=key)


def test_each_image_is_encoded_once(parts: Parts):
    _, processor = parts.model("clip", "llama")
    batch = Ready(processor)(merge(processor), packed=True)
    assert len(batch["pixel_values"]) == 3
    placeholders = int((batch["input_ids"] == processor.image_token_id).sum())
    assert placeholders == 3 * processor.tokens_per_image


def let_replies_see_each_other(layout: dict[str, Any]) -> None:
    """Each sequence behind a prompt sees the first reply in place of the prompt's end."""
    if KEY_INDEX in layout:
        for start, end, own in zip(
            layout["cu_seq_lens_k"], layout["cu_seq_lens_k"][1:], layout["cu_seq_lens_q"].diff(), strict=False
        ):
            if own < end - start:
                layout[KEY_INDEX][start] += end - start - own + 1


def number_on(layout: dict[str, Any]) -> None:
    """Positions do not go back to the end of the prompt."""
    starts, lengths = layout["cu_seq_lens_q"], layout["cu_seq_lens_q"].diff()
    shared = layout["cu_seq_lens_k"].diff() - lengths
    before = lengths.roll(1) * (shared > 0)
    layout["position_ids"] += before.repeat_interleave(lengths)[None]
    assert len(layout["position_ids"][0]) == starts[-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (let_replies_see_each_other, "the logits of a reply depend on the chosen reply in its row"),
        (number_on, "the logits of a reply differ from those without packing"),
    ],
)
def test_the_proof_finds_rows_that_are_laid_out_wrongly(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Any]], None], message: str
):
    model, processor = parts.model("clip", "llama")
    lay_out = packing._lay_out

    def spoilt(sequences: Any) -> dict[str, Any]:
        layout = lay_out(sequences)
        spoil(layout)
        return layout

    monkeypatch.setattr(packing, "_lay_out", spoilt)
    with pytest.raises(ValueError, match=message):
        check_shared_prompts(model, processor)


def test_attention_that_knows_no_shared_prompts_is_refused(parts: Parts):
    model, processor = parts.model("clip", "llama")
    model.language_model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="in a packed row, the logits of a reply differ from those without packing"):
        check_shared_prompts(model, processor)


def test_flash_attention_gives_way_to_kernels_that_take_keys_of_their_own(parts: Parts):
    model, _ = parts.model("clip", "llama")
    config = model.config.get_text_config()
    config._attn_implementation = {"": "flash_attention_2"}
    with use_packed_attention(config):
        assert config._attn_implementation == "flash_attention_2"
    with use_packed_attention(config, shares_prompts=True):
        assert config._attn_implementation == attention.PACKED_ATTENTION
    assert config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("window", [None, 4])
def test_attention_is_that_of_a_mask(window: int | None):
    """Within a window too, which reaches back over the prompt."""
    torch.manual_seed(0)
    layout = packing._lay_out([packing._Sequence(3), packing._Sequence(7), packing._Sequence(4, 5)])
    layer = torch.nn.Module()
    query, key, value = (torch.randn(1, 2, 14, 8) for _ in range(3))
    positions = layout["position_ids"][0]
    sample = torch.tensor([0] * 3 + [1] * 7 + [2] * 4)
    in_prompt = (sample == 1) & (positions < 5)
    mask = (sample[:, None] == sample) | ((sample == 2)[:, None] & in_prompt)
    distance = positions[:, None] - positions
    mask &= (distance >= 0) & (distance < (window or 99))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    arguments = {name: value for name, value in layout.items() if name != "position_ids"}
    output, _ = attention.packed_attention(layer, query, key, value, None, sliding_window=window, **arguments)
    torch.testing.assert_close(output.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


def test_kernels_for_samples_of_different_lengths_get_the_keys_of_each(monkeypatch: pytest.MonkeyPatch):
    layout = packing._lay_out([packing._Sequence(7), packing._Sequence(4, 5)])
    query, key, value = torch.randn(1, 4, 11, 8), *(torch.randn(1, 2, 11, 8) for _ in range(2))
    calls = []

    def kernel(query: Any, key: Any, value: Any, sizes: Any, **options: Any) -> torch.Tensor:
        calls.append((query.shape[2], key.shape[2], value.shape[2], *sizes))
        return query

    monkeypatch.setattr(attention, "_supports_varlen_kernel", lambda query: True)
    monkeypatch.setattr(attention, "_varlen_attention", kernel)
    arguments = {name: value for name, value in layout.items() if name != "position_ids"}
    attention.packed_attention(torch.nn.Module(), query, key, value, None, **arguments)
    ((queries, keys, values, starts, key_starts, longest, most_keys),) = calls
    assert (queries, keys, values, longest, most_keys) == (11, 16, 16, 7, 9)
    assert (starts.tolist(), key_starts.tolist()) == ([0, 7, 11], [0, 7, 16])
