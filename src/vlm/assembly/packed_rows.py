"""Packed rows and the model: the positions that it uses, and the proof that the samples of a row stay apart."""

import inspect
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.numbers import bound_infinite
from vlm.assembly.opening import shorten
from vlm.assembly.packed_attention import use_packed_attention
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import SEQUENCE_STARTS, PackingCollator
from vlm.data.dataset import Skipped
from vlm.data.processor import Processor, SampleInputs
from vlm.families.grid_positions import NUM_AXES, has_grid_positions

PACKING_KEY = "trainer.packing=true:"
"""How a message begins that says why samples cannot be packed."""


def add_grid_positions(model: Any, batch: SampleInputs) -> SampleInputs:
    """Return a packed batch with the positions that its model uses: in some families four per token, `(4, 1, T)`.

    The first of the four is the position in the text, which keeps samples apart; the model's own code computes the
    others, or all four, sample by sample.
    """
    if not has_grid_positions(model):
        return batch
    lengths = batch[SEQUENCE_STARTS].diff().tolist()
    rows = {
        name: pad_sequence(list(batch[name][0].split(lengths)), batch_first=True)
        for name in ("input_ids", "mm_token_type_ids")
    }
    mask = pad_sequence([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True)
    compute = model.model.get_rope_index
    known = inspect.signature(compute).parameters.keys() - {*rows, "attention_mask"}
    positions, _ = compute(**rows, **{name: batch[name] for name in known if name in batch}, attention_mask=mask)
    kept = positions[:, mask.bool()]
    if len(kept) == NUM_AXES:
        kept = torch.cat([batch["position_ids"], kept])
    return batch | {"position_ids": kept[:, None]}


@torch.no_grad()
def check_packing(model: TrainableModel, processor: Processor) -> None:
    """Check on a few tokens in packed rows that no sample sees another, and that each sees what it sees alone.

    Raises:
        ValueError: the model does not keep samples apart.
    """
    tokenizer = processor.tokenizer
    words = [tokenizer(text, add_special_tokens=False).input_ids[:4] for text in ("one two", "red blue", "a dog runs")]
    first, other, last = words
    size = min(len(first), len(other))
    was_training = model.training
    model.eval()
    try:
        packed = [_try_packed_row(model, [before[:size], last]) for before in (first, other)]
        alone = model(input_ids=torch.tensor([last], device=model.device), use_cache=False).logits[0]
    finally:
        model.train(was_training)
    tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
    after_first, after_other, alone = map(bound_infinite, (*(logits[size:] for logits in packed), alone))
    tolerance *= float(alone.abs().max())
    if not float((after_first - after_other).abs().max()) <= tolerance * 1e-2:
        problem = "a sample's logits depend on the sample before it"
    elif not float((after_first - alone).abs().max()) <= tolerance:
        problem = "a sample's logits are not those that it has alone"
    else:
        return
    text = model.config.get_text_config()
    raise ValueError(
        f"{PACKING_KEY} {problem} in a packed row, with {text.model_type} and attention "
        f"{text._attn_implementation}. Try another model.attn_implementation, or trainer.packing=false"
    )


def _try_packed_row(model: TrainableModel, samples: list[list[int]]) -> Tensor:
    """Return `_packed_row_logits`; raise ValueError with the key where the model's code has no packed rows."""
    try:
        return _packed_row_logits(model, samples)
    except (AttributeError, TypeError, LookupError, ValueError, NotImplementedError) as error:
        if str(error).startswith(PACKING_KEY):
            raise
        kind = model.config.get_text_config().model_type
        raise ValueError(
            f"{PACKING_KEY} the code of {kind} fails on a packed row, {type(error).__name__}: {shorten(str(error))}. "
            "trainer.packing=false pads batches instead"
        ) from error


def _packed_row_logits(model: TrainableModel, samples: list[list[int]]) -> Tensor:
    """Return logits `(T, vocabulary)` of samples in one row."""
    items: list[SampleInputs | Skipped] = [
        {"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros(len(ids), dtype=torch.long)}
        for ids in samples
    ]
    collate = PackingCollator(Collator(0, tokens=("mm_token_type_ids",)))
    batch = add_grid_positions(model, {**collate(items)})
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "mm_token_type_ids")}
    with use_packed_attention(model.config.get_text_config()):
        return model(**send_to_device(inputs, model.device), use_cache=False).logits[0]
