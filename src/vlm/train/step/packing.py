"""Packed rows in a run: their loader, and the check of the model before it trains on them."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from vlm.assembly.model_interface import TrainableModel
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import SEQUENCE_STARTS, PackingCollator, PackSampler, pack_lengths, resolve_pack_capacity
from vlm.data.dataset import SampleDataset, Skipped
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample
from vlm.data.stream import SampleStream
from vlm.data.vision.images import read_media_sizes
from vlm.families.table import FAMILIES
from vlm.train.arguments import sampler_seed
from vlm.train.objectives.base import Inputs
from vlm.train.step.packed_attention import use_packed_attention

LOOKAHEAD_PACKS = 8
"""Samples of a stream are chosen from as many as fill this number of packs."""

NUM_PROBED_SAMPLES = 64
"""Samples of a stream that are read to find how many tokens a batch has, where no key says so."""


class PackedStream(IterableDataset[list[SampleInputs | Skipped]]):
    """Packs of at most `capacity` tokens of a stream: each time, the fullest pack that the pending samples make."""

    def __init__(self, stream: SampleStream, capacity: int):
        self.stream, self.capacity = stream, capacity

    def __iter__(self) -> Iterator[list[SampleInputs | Skipped]]:
        """Yield one pack after the other, without end."""
        pending: list[SampleInputs] = []
        left_out: list[Skipped] = []
        total = 0
        for item in self.stream:
            if isinstance(item, Skipped):
                left_out.append(item)
                continue
            pending.append(item)
            total += len(item["input_ids"])
            if total < LOOKAHEAD_PACKS * self.capacity:
                continue
            lengths = [len(sample["input_ids"]) for sample in pending]
            packs = pack_lengths(lengths, self.capacity)
            sizes = [sum(lengths[index] for index in pack) for pack in packs]
            fullest = packs[sizes.index(max(sizes))]
            total -= max(sizes)
            yield [*(pending[index] for index in fullest), *left_out]
            pending = [sample for index, sample in enumerate(pending) if index not in set(fullest)]
            left_out = []


def make_packed_loader(
    dataset: SampleDataset | SampleStream, collate: Collator, max_tokens: int | None, args: TrainingArguments
) -> tuple[DataLoader, PackSampler | None]:
    """Return the loader of this rank's packs, and the sampler that orders them; packs of a stream have none.

    A pack has at most `max_tokens` tokens, `trainer.max_tokens_per_batch`; `collate` makes padded batches.
    """
    size, collate_packs = args.per_device_train_batch_size, PackingCollator(collate)
    if isinstance(dataset, SampleStream):
        packs = PackedStream(dataset, stream_capacity(dataset, max_tokens, size))
        return DataLoader(packs, batch_size=None, collate_fn=collate_packs, **loader_options(args)), None
    capacity = resolve_pack_capacity(max_tokens, size, dataset.lengths)
    sampler = PackSampler(dataset.lengths, capacity, sampler_seed(args), args.process_index, args.world_size)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_packs, **loader_options(args)), sampler


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that `Trainer` gives its own loaders: data workers and pinned memory."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "in_order": args.dataloader_in_order,
    }


def stream_capacity(stream: SampleStream, max_tokens: int | None, batch_size: int) -> int:
    """Return the tokens of a stream's packs: as given, or as many as padded batches of its first samples really have.

    Raises:
        ValueError: a sample may be longer than `max_tokens`.
    """
    longest = max(source.encoder.longest for source in stream.sources)
    if max_tokens is None:
        return resolve_pack_capacity(None, batch_size, _read_first_lengths(stream) or [longest], longest)
    if max_tokens < longest:
        raise ValueError(
            f"trainer.max_tokens_per_batch={max_tokens}: a sample of the stream may have {longest:,} tokens; raise it, "
            "or lower dataset.max_length"
        )
    return max_tokens


def _read_first_lengths(stream: SampleStream) -> list[int]:
    """Return the lengths of a stream's first samples; training reads unusable ones again, and reports them."""
    encode = stream.sources[0].encoder
    lengths = []
    for sample in stream.samples(NUM_PROBED_SAMPLES):
        with suppress(BadSample):
            lengths.append(len(encode(sample, read_media_sizes(sample, stream.processor)).input_ids))
    return lengths


def check_packing_support(model_type: str) -> None:
    """Refuse families that see more of a row than restarted positions keep apart.

    Raises:
        ValueError: a model of this type cannot be trained on packed rows.
    """
    if model_type in FAMILIES and not FAMILIES[model_type].supports_packing:
        can = ", ".join(name for name, family in FAMILIES.items() if family.supports_packing)
        raise ValueError(
            f"trainer.packing=true: {FAMILIES[model_type].name} ({model_type}) cannot keep the samples of a row apart; "
            f"composed models can, and {can}. trainer.packing=false pads batches instead, and "
            "trainer.train_sampling_strategy=group_by_modality_blocks pads them least"
        )


def add_grid_positions(model: Any, batch: Inputs) -> Inputs:
    """Return a packed batch with the positions that its model uses: in some families four per token, `(4, 1, T)`.

    The first of the four is the position in the text, which keeps samples apart; the model's own code computes the
    others, sample by sample.
    """
    kind = model.config.model_type
    if kind not in FAMILIES or not FAMILIES[kind].grid_positions:
        return batch
    lengths = batch[SEQUENCE_STARTS].diff().tolist()
    rows = {
        name: pad_sequence(list(batch[name][0].split(lengths)), batch_first=True)
        for name in ("input_ids", "mm_token_type_ids")
    }
    mask = pad_sequence([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True)
    grids = {name: batch[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in batch}
    positions, _ = model.model.get_rope_index(**rows, **grids, attention_mask=mask)
    text = batch["position_ids"]
    return batch | {"position_ids": torch.cat([text, positions[:, mask.bool()]])[:, None]}


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
        packed = [_packed_row_logits(model, [before[:size], last]) for before in (first, other)]
        alone = model(input_ids=torch.tensor([last], device=model.device), use_cache=False).logits[0]
    finally:
        model.train(was_training)
    after_first, after_other = (logits[size:] for logits in packed)
    tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
    tolerance *= float(alone.abs().max())
    if float((after_first - after_other).abs().max()) > tolerance * 1e-2:
        problem = "a sample's logits depend on the sample before it"
    elif float((after_first - alone).abs().max()) > tolerance:
        problem = "a sample's logits are not those that it has alone"
    else:
        return
    text = model.config.get_text_config()
    raise ValueError(
        f"trainer.packing=true: {problem} in a packed row, with {text.model_type} and attention "
        f"{text._attn_implementation}. Try another model.attn_implementation, or trainer.packing=false"
    )


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
