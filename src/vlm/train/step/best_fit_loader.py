"""Loaders of rows of about equal length, filled out of all samples: `trainer.packing_strategy=best_fit`."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from vlm.data.batching.best_fit import PackSampler, pack_lengths, resolve_pack_capacity
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.data.dataset import SampleDataset
from vlm.data.processor import SampleInputs
from vlm.data.sample import BadSample
from vlm.data.skipped import Skipped
from vlm.data.stream import Draw, Positioned, PositionedCollator, ReaderPosition, SampleStream
from vlm.data.vision.images import read_media_sizes
from vlm.train.arguments import loader_options, sampler_seed
from vlm.train.step.step_packing import check_stream_capacity

LOOKAHEAD_PACKS = 8
"""Samples of a stream are chosen from as many as fill this number of packs."""

LONGEST_WAIT = 1000
"""Number of samples after which one that fits badly gets a pack; a resumed run reads again from the oldest on."""

NUM_PROBED_SAMPLES = 64
"""Samples of a stream that are read to find how many tokens a batch has, where no key says so."""


Pack = list[SampleInputs | Skipped]
"""The samples of a row."""


class PackedStream(IterableDataset[Positioned[Pack]]):
    """Packs of at most `capacity` tokens of a stream: each time, the fullest pack that the pending samples make.

    Its position is before the oldest pending sample: what came in between and is not pending is read again where a run
    is resumed, but not decoded.
    """

    def __init__(self, stream: SampleStream, capacity: int):
        self.stream, self.capacity = stream, capacity

    def __iter__(self) -> Iterator[Positioned[Pack]]:
        """Yield one pack after the other, without end."""
        pending: list[tuple[Draw, SampleInputs]] = []
        left_out: list[tuple[Draw, Skipped]] = []
        for draw in self.stream.draws():
            item = draw.encode()
            if isinstance(item, Skipped):
                left_out.append((draw, item))
                continue
            pending.append((draw, item))
            lengths = [len(sample["input_ids"]) for _, sample in pending]
            if draw.is_repeated or sum(lengths) < LOOKAHEAD_PACKS * self.capacity:
                continue
            chosen = self._choose(lengths, waits_long=draw.number - pending[0][0].number > LONGEST_WAIT)
            pack = [*(pending[index][1] for index in chosen), *(skipped for _, skipped in left_out)]
            pending = [sample for index, sample in enumerate(pending) if index not in set(chosen)]
            left_out = []
            yield Positioned(pack, position_of([sample_draw for sample_draw, _ in pending], draw))

    def _choose(self, lengths: list[int], *, waits_long: bool) -> list[int]:
        """Return the fullest pack of samples of these lengths, or the first one's where it has waited for long."""
        packs = pack_lengths(lengths, self.capacity)
        if waits_long:
            return next(pack for pack in packs if 0 in pack)
        return max(packs, key=lambda pack: sum(lengths[index] for index in pack))


def position_of(pending: Sequence[Draw], last: Draw) -> ReaderPosition:
    """Return where a reader goes on that has drawn up to `last`, and of whose draws some are in no batch yet."""
    if not pending:
        return last.behind
    numbers = tuple(draw.number for draw in pending)
    return pending[0].before._replace(until=last.behind.drawn, pending=numbers)


def make_best_fit_loader(
    dataset: SampleDataset | SampleStream, collate: Collator, max_tokens: int | None, args: TrainingArguments
) -> tuple[DataLoader, PackSampler | None]:
    """Return the loader of this rank's packs, and the sampler that orders them; packs of a stream have none.

    A pack has at most `max_tokens` tokens, `trainer.max_tokens_per_batch`; `collate` makes padded batches.
    """
    size, collate_packs = args.per_device_train_batch_size, PackingCollator(collate)
    if isinstance(dataset, SampleStream):
        packs = PackedStream(dataset, stream_capacity(dataset, max_tokens, size))
        collate_positioned = PositionedCollator(collate_packs)
        return DataLoader(packs, batch_size=None, collate_fn=collate_positioned, **loader_options(args)), None
    capacity = resolve_pack_capacity(max_tokens, size, dataset.lengths)
    sampler = PackSampler(dataset.lengths, capacity, sampler_seed(args), args.process_index, args.world_size)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_packs, **loader_options(args)), sampler


def stream_capacity(stream: SampleStream, max_tokens: int | None, batch_size: int) -> int:
    """Return the tokens of a stream's packs: as given, or as many as padded batches of its first samples really have.

    Raises:
        ValueError: a sample may be longer than `max_tokens`.
    """
    if max_tokens is None:
        longest = max(source.encoder.longest for source in stream.sources)
        return resolve_pack_capacity(None, batch_size, _read_first_lengths(stream) or [longest], longest)
    check_stream_capacity(stream, max_tokens)
    return max_tokens


def _read_first_lengths(stream: SampleStream) -> list[int]:
    """Return the lengths of a stream's first samples; training reads unusable ones again, and reports them."""
    encode = stream.sources[0].encoder
    lengths = []
    for sample in stream.samples(NUM_PROBED_SAMPLES):
        with suppress(BadSample):
            lengths.append(len(encode(sample, read_media_sizes(sample, stream.processor)).input_ids))
    return lengths
