"""Positions for packed rows, and the proof that the samples of a row do not affect each other."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.assembly.logit_proofs import choose_tokens, dropout_off
from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.numbers import bound_infinite
from vlm.assembly.opening import shorten
from vlm.assembly.packed_attention import use_packed_attention
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import KEY_INDEX, SEQUENCE_STARTS, PackingCollator
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor, SampleInputs
from vlm.families.grid_positions import NUM_AXES, TYPES_INPUT, has_grid_positions

PACKING_KEY = "trainer.packing=true:"
"""The beginning of messages on why samples cannot be packed."""


def add_grid_positions(model: Any, batch: SampleInputs) -> SampleInputs:
    """Return a packed batch with the positions that its model uses: in some families four per token, `(4, 1, T)`.

    The first of the four is the position in the text, which keeps samples apart; the model's own code computes the
    others, or all four, sample by sample. Those of a sample after a shared prompt resume from where the prompt ends.
    """
    if not has_grid_positions(model):
        return batch
    lengths = batch[SEQUENCE_STARTS].diff().tolist()
    rows = {
        name: pad_sequence(list(batch[name][0].split(lengths)), batch_first=True) for name in ("input_ids", TYPES_INPUT)
    }
    mask = pad_sequence([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True)
    compute = model.model.get_rope_index
    known = inspect.signature(compute).parameters.keys() - {*rows, "attention_mask"}
    positions, _ = compute(**rows, **{name: batch[name] for name in known if name in batch}, attention_mask=mask)
    positions = positions[:, mask.bool()]  # (3 or 4, T)
    if KEY_INDEX in batch:
        positions = positions + _find_prompt_ends(batch, positions).repeat_interleave(torch.tensor(lengths), dim=1)
    if len(positions) == NUM_AXES:
        positions = torch.cat([batch["position_ids"], positions])
    return batch | {"position_ids": positions[:, None]}


def _find_prompt_ends(batch: SampleInputs, positions: Tensor) -> Tensor:
    """Return for each sample the positions after the prompt that it shares, 0 if it shares none: `(axes, samples)`.

    The last sample before it that shares none has the prompt, and continues there.
    """
    starts = batch[SEQUENCE_STARTS].long()
    shared = batch["cu_seq_lens_k"].long().diff() - starts.diff()
    with_prompt = torch.where(shared == 0, starts[:-1], 0).cummax(0).values
    return positions[:, with_prompt + shared] * (shared > 0)


@torch.no_grad()
def check_packing(model: TrainableModel, processor: Processor) -> None:
    """Check on a few tokens in packed rows that samples do not affect each other, and have the same logits as alone.

    Raises:
        ValueError: samples affect each other.
    """
    tokenizer = processor.tokenizer
    words = [tokenizer(text, add_special_tokens=False).input_ids[:4] for text in ("one two", "red blue", "a dog runs")]
    first, other, last = words
    size = min(len(first), len(other))
    with dropout_off(model):
        packed = [_try_packed_row(model, [_make_item(before[:size]), _make_item(last)]) for before in (first, other)]
        alone = model(input_ids=torch.tensor([last], device=model.device), use_cache=False).logits[0]
    _compare_packed(model, "a sample", "the sample before it", [logits[size:] for logits in packed], alone)


@torch.no_grad()
def check_shared_prompts(model: TrainableModel, processor: Processor) -> None:
    """Check on a few tokens that a rejected reply after a shared prompt sees the prompt, but not the chosen reply.

    Its logits must equal those after a prompt of its own; the row has two pairs.

    Raises:
        ValueError: replies affect each other.
    """
    ids = choose_tokens(processor, 13)
    prompt, chosen, rejected = ids[:4], ids[4:7], ids[7:9]
    other_pair = _make_pair(ids[9:12], ids[12:], chosen)
    start = len(prompt + chosen)
    with dropout_off(model):
        packed = [
            _try_packed_row(model, [_make_pair(prompt, own, rejected), other_pair]) for own in (chosen, ids[10:13])
        ]
        rows = [prompt + rejected, ids[9:], ids[9:12] + chosen]
        alone = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0] for row in rows]
    expected = torch.cat([alone[0][len(prompt) - 1 :], alone[1], alone[2][2:]])
    _compare_packed(model, "a reply", "the chosen reply in its row", [logits[start:] for logits in packed], expected)


def _compare_packed(model: TrainableModel, kind: str, other: str, packed: Sequence[Tensor], alone: Tensor) -> None:
    """Compare logits of samples in two packed rows that differ in `other` with those that they have alone.

    Raises:
        ValueError: they differ; `kind` says what a sample is.
    """
    tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
    first, second, alone = map(bound_infinite, (*packed, alone))
    tolerance *= float(alone.abs().max())
    if not float((first - second).abs().max()) <= tolerance * 1e-2:
        problem = f"the logits of {kind} depend on {other}"
    elif not float((first - alone).abs().max()) <= tolerance:
        problem = f"the logits of {kind} differ from those without packing"
    else:
        return
    text = model.config.get_text_config()
    raise ValueError(
        f"{PACKING_KEY} in a packed row, {problem}, with {text.model_type} and attention "
        f"{text._attn_implementation}. Try another model.attn_implementation, or trainer.packing=false"
    )


def _make_item(ids: list[int], num_unsupervised: int = 1) -> SampleInputs:
    """Return ids as a sample, the last of them supervised."""
    labels = [IGNORE_INDEX] * num_unsupervised + ids[num_unsupervised:]
    return {"input_ids": ids, "labels": labels, TYPES_INPUT: torch.zeros(len(ids), dtype=torch.long)}


def _make_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> SampleInputs:
    """Return a prompt with two replies as one sample."""
    sides = (_make_item(prompt + reply, len(prompt)) for reply in (chosen, rejected))
    merged = BranchMerger(tokens=(TYPES_INPUT,)).merge(list(sides))
    assert merged is not None, "they share all tokens of the prompt but the last"
    return merged


def _try_packed_row(model: TrainableModel, items: list[SampleInputs]) -> Tensor:
    """Return `_packed_row_logits`; raise ValueError with the key where the model's code has no packed rows."""
    try:
        return _packed_row_logits(model, items)
    except (AttributeError, TypeError, LookupError, ValueError, NotImplementedError) as error:
        if str(error).startswith(PACKING_KEY):
            raise
        kind = model.config.get_text_config().model_type
        raise ValueError(
            f"{PACKING_KEY} the code of {kind} fails on a packed row, {type(error).__name__}: {shorten(str(error))}. "
            "trainer.packing=false pads batches instead"
        ) from error


def _packed_row_logits(model: TrainableModel, items: list[SampleInputs]) -> Tensor:
    """Return logits `(T, vocabulary)` of samples in one row."""
    collate = PackingCollator(Collator(0, tokens=(TYPES_INPUT,)))
    batch = add_grid_positions(model, {**collate(items)})
    inputs = {name: value for name, value in batch.items() if name not in ("labels", TYPES_INPUT)}
    with use_packed_attention(model.config.get_text_config(), shares_prompts=KEY_INDEX in batch):
        return model(**send_to_device(inputs, model.device), use_cache=False).logits[0]
