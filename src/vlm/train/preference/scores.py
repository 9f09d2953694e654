"""Log-probabilities of the sides of preferences: of a batch, for the loss, and of whole data sets.

Shapes: R rows, N records, S supervised positions.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Dataset
from transformers.utils import ModelOutput

from vlm.assembly.packed_attention import use_packed_attention
from vlm.data.batching.packing import KEY_INDEX
from vlm.data.dataset import SampleRef
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.preference.collator import PREFERENCE_KEYS, RECORD_INDEX, RECORDS, ROLES, SEQUENCES
from vlm.data.preference.dataset import PreferenceDataset, PreferenceItem
from vlm.data.skipped import Skipped
from vlm.models.text_loss import SupervisedScores
from vlm.train.objectives.base import Inputs, ObjectiveTrainer
from vlm.train.preference.losses import NUM_ROLES, SideScores


def score_batch(
    scores: SupervisedScores, inputs: Inputs, model: Module | None = None
) -> tuple[SideScores, Tensor, ModelOutput]:
    """Run a model over a batch of preferences; vocabulary logits are computed at supervised positions alone.

    Args:
        scores: computes the loss of each supervised token, its cross-entropy.
        inputs: the batch, as `PreferenceCollator` or `PackedPreferenceCollator` made it.
        model: the model as it is called, such as DDP around it; None: as `scores` has it.

    Returns:
        The scores of its records, the mean loss of the tokens as a number that depends on every parameter, and the
        model's output without logits.
    """
    read = {name: value for name, value in inputs.items() if name not in PREFERENCE_KEYS}
    config = scores.model.config.get_text_config()
    is_packed = SEQUENCES in inputs
    with use_packed_attention(config, shares_prompts=KEY_INDEX in inputs) if is_packed else nullcontext():
        losses, _, outputs = scores(read, model)
    is_supervised = F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:] != IGNORE_INDEX
    # (S,), in the order of the losses: the row of each, or the number of its conversation in a packed one
    rows = inputs[SEQUENCES][is_supervised] if is_packed else is_supervised.nonzero()[:, 0]
    size = max(len(inputs[ROLES]), len(is_supervised))
    sums = losses.new_zeros(size).index_add(0, rows.to(losses.device), -losses)  # (R,)
    tokens = rows.bincount(minlength=size).to(losses)
    places = inputs[RECORDS], inputs[ROLES]
    shape = len(inputs[RECORD_INDEX]), NUM_ROLES
    number = len(inputs[ROLES])  # 0 where every record was left out: the one row is of none
    tables = [values.new_zeros(shape).index_put(places, values[:number]) for values in (sums, tokens)]
    return SideScores(*tables), losses.sum() / max(losses.numel(), 1), outputs


class WholeDataset(Dataset[PreferenceItem]):
    """A data set with an empty item for each record that cannot be used, so that no index is missing."""

    def __init__(self, dataset: PreferenceDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreferenceItem:
        """Return the sides of a record; none of one that cannot be used."""
        item = self.dataset[index]
        if not isinstance(item, Skipped):
            return item
        source, record = self.dataset.dataset.places[index].tolist()
        ref = self.dataset.dataset.sources[source].shown_path
        return {"sides": [], "roles": [], "index": index, "ref": SampleRef(ref, record, item.id)}


@torch.no_grad()
def score_dataset(
    trainer: ObjectiveTrainer,
    dataset: PreferenceDataset | WholeDataset,
    title: str,
    score: Callable[[Inputs], SideScores],
) -> SideScores:
    """Return the scores of all records of a data set, in its order, on the CPU; every rank computes its share.

    Args:
        trainer: the run's.
        dataset: the records.
        title: what the progress bar says.
        score: scores a batch.
    """
    parts: list[Tensor] = []
    with trainer.compute_loss_context_manager():
        for inputs in trainer.evaluation_batches(dataset, title):
            sides = score(inputs)
            columns = [sides.log_probs, sides.tokens]
            if sides.reference is not None:
                columns.append(sides.reference)
            gathered = trainer.accelerator.gather_for_metrics(torch.stack(columns, dim=1).contiguous())
            parts.append(gathered.float().cpu())
    table = torch.cat(parts)  # (N, 2 or 3, 3)
    assert len(table) == len(dataset), "each record once"
    return SideScores(*table.unbind(dim=1))
