"""The training loss of each source of a mixture: the mean over its supervised tokens since the last log, on all ranks.

These are losses before `loss_weight` and the weights of replies. Nothing waits for the device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlm.data.batching.packing import KEY_INDEX, SEQUENCE_STARTS
from vlm.data.dataset import SampleDataset, SampleRef
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.stream import SampleStream
from vlm.train.objectives.base import Inputs


class SourceLosses:
    """Adds up losses by the source of their samples.

    Args:
        names: path of a source, as in `SampleRef` -> its name.
        get_refs: returns the samples of the model's current batch.
        device: the device of the batches.
    """

    def __init__(self, names: dict[str, str], get_refs: Callable[[], Sequence[SampleRef]], device: torch.device):
        self.names, self.get_refs = list(names.values()), get_refs
        self.numbers = {path: number for number, path in enumerate(names)}
        self.sums = torch.zeros(2, len(names) + 1, device=device)  # losses and tokens; last, what is no sample

    def add(self, losses: Tensor, inputs: Inputs) -> None:
        """Add the losses of a batch at its supervised positions, `(S,)`."""
        if KEY_INDEX in inputs:  # samples that branch
            return
        numbers = [self.numbers.get(ref.source, -1) for ref in self.get_refs()]
        counts = count_supervised(inputs)
        numbers += [-1] * (len(counts) - len(numbers))  # dummies come last
        sources = torch.tensor(numbers).remainder(len(self.names) + 1).to(counts.device, non_blocking=True)
        of_tokens = torch.repeat_interleave(sources, counts, output_size=losses.numel())
        self.sums[0].index_add_(0, of_tokens, losses.detach().float())
        self.sums[1].index_add_(0, of_tokens, torch.ones_like(losses, dtype=torch.float32))

    def pop_metrics(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return `loss/<source>` of each source that had tokens since the last call; every rank calls it."""
        losses, tokens = gather(self.sums[None]).sum(0).tolist()
        self.sums.zero_()
        found = zip(self.names, losses, tokens, strict=False)
        return {f"loss/{name}": loss / number for name, loss, number in found if number}


def count_supervised(inputs: Inputs) -> Tensor:
    """Return the number of supervised positions of each sample of a batch, in their order: `(samples,)`."""
    is_supervised = inputs["labels"][:, 1:] != IGNORE_INDEX
    if SEQUENCE_STARTS not in inputs:
        return is_supervised.sum(1)
    starts = inputs[SEQUENCE_STARTS].to(is_supervised.device)
    before = torch.nn.functional.pad(is_supervised[0].cumsum(0), (1, 0))  # supervised tokens before a position
    return before[(starts - 1).clamp(min=0)].diff()


def make_source_losses(
    dataset: object, get_refs: Callable[[], Sequence[SampleRef]], device: torch.device
) -> SourceLosses | None:
    """Return the `SourceLosses` of a data set, or None if it has only one source, or sources share a path."""
    if not isinstance(dataset, SampleDataset | SampleStream):
        return None
    names = {source.shown_path: source.name for source in dataset.sources}
    return SourceLosses(names, get_refs, device) if 1 < len(names) == len(dataset.sources) else None
