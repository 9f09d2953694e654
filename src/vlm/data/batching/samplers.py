"""Orders of samples: by modality and length, or by groups; the same on every rank and at every start."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Sampler

Item_co = TypeVar("Item_co", covariant=True)


class EpochSampler(Sampler[Item_co]):
    """An order that is another one each epoch; a resumed epoch repeats its order.

    Args:
        seed: determines the order, together with the epoch.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that begins."""
        self.epoch = epoch


def group_by_modality_and_length(
    lengths: Sequence[int], num_images: Sequence[int], batch: int, generator: torch.Generator
) -> list[int]:
    """Return LLaVA's order: each global batch of one modality and of similar lengths, batches shuffled.

    Within blocks of many batches, samples are sorted by length, so that the rows of a batch are similar; samples that
    fill no whole batch come last, mixed.

    Args:
        lengths: number of tokens of each sample.
        num_images: number of images of each sample; 0 is text only.
        batch: samples of a step, over all ranks and accumulation steps.
        generator: the only source of randomness.
    """
    batches: list[list[int]] = []
    rest: list[int] = []
    for with_images in (True, False):
        chosen = [i for i, number in enumerate(num_images) if (number > 0) == with_images]
        grouped = [chosen[i] for i in _group_by_length([lengths[i] for i in chosen], batch, generator)]
        whole = len(grouped) // batch * batch
        batches += [grouped[i : i + batch] for i in range(0, whole, batch)]
        rest += grouped[whole:]
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [index for number in order for index in batches[number]] + rest


def _group_by_length(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """Shuffle, then sort by length (longest first) within blocks of 50 batches."""
    block = batch * 50
    order = torch.randperm(len(lengths), generator=generator).tolist()
    blocks = [order[i : i + block] for i in range(0, len(order), block)]
    return [index for indices in blocks for index in sorted(indices, key=lambda i: lengths[i], reverse=True)]


class ModalityLengthSampler(EpochSampler[int]):
    """Iterates in the order of `group_by_modality_and_length`, which has the same arguments, save for the seed."""

    def __init__(self, lengths: Sequence[int], num_images: Sequence[int], batch: int, seed: int):
        super().__init__(seed)
        self.lengths, self.num_images, self.batch = list(lengths), list(num_images), batch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(group_by_modality_and_length(self.lengths, self.num_images, self.batch, generator))


class GroupSampler(EpochSampler[int]):
    """Iterates over groups in random order, the samples of a group in sequence, for losses that compare them.

    Args:
        groups: the index of each sample's group; negative for a sample that has none and is a group by itself.
        seed: see `EpochSampler`.
    """

    def __init__(self, groups: Sequence[int], seed: int):
        super().__init__(seed)
        self.groups = list(groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        members_by_group: dict[int, list[int]] = {}
        for index in torch.randperm(len(self.groups), generator=generator).tolist():
            group = self.groups[index]
            members_by_group.setdefault(group if group >= 0 else -1 - index, []).append(index)
        return (index for members in members_by_group.values() for index in members)
