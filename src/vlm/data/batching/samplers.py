"""The order of samples: of like length, pictures and text apart, or by groups; the same on every rank and start."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def group_by_modality_and_length(
    lengths: Sequence[int], num_images: Sequence[int], batch: int, generator: torch.Generator
) -> list[int]:
    """LLaVA's order: global batches of one modality each, samples of like length together, batches shuffled.

    Within a stretch of many batches, samples are sorted by length, so that rows of a batch are alike; samples that
    fill no whole batch come last, mixed.

    Args:
        lengths: tokens of each sample.
        num_images: pictures of each sample; 0 is text only.
        batch: samples of a step, over all ranks and accumulation steps.
        generator: the only source of chance.
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
    """Shuffle, then sort by length (longest first) within stretches of 50 batches."""
    stretch = batch * 50
    order = torch.randperm(len(lengths), generator=generator).tolist()
    stretches = [order[i : i + stretch] for i in range(0, len(order), stretch)]
    return [index for part in stretches for index in sorted(part, key=lambda i: lengths[i], reverse=True)]


class ModalityLengthSampler(Sampler[int]):
    """Iterates in `group_by_modality_and_length`, another one each epoch; resuming an epoch repeats its order.

    Args:
        lengths: tokens of each sample.
        num_images: pictures of each sample.
        batch: samples of a step, over all ranks and accumulation steps.
        seed: with the epoch, all that the order depends on.
    """

    def __init__(self, lengths: Sequence[int], num_images: Sequence[int], batch: int, seed: int):
        self.lengths, self.num_images = list(lengths), list(num_images)
        self.batch, self.seed = batch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The training loop says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(group_by_modality_and_length(self.lengths, self.num_images, self.batch, generator))


class GroupSampler(Sampler[int]):
    """Iterates over groups in a drawn order, the samples of each one after the other, for losses that compare them.

    Resuming an epoch repeats its order.

    Args:
        groups: the number of each sample's group; negative: it has none, and stands by itself.
        seed: with the epoch, all that the order depends on.
    """

    def __init__(self, groups: Sequence[int], seed: int):
        self.groups, self.seed = list(groups), seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The training loop says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        together: dict[int, list[int]] = {}
        for index in torch.randperm(len(self.groups), generator=generator).tolist():
            group = self.groups[index]
            together.setdefault(group if group >= 0 else -1 - index, []).append(index)
        return (index for members in together.values() for index in members)
