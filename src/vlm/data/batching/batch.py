"""Batches from the collator to the model, and what the training loop takes out of them on the way."""

from typing import TypedDict

from torch import Tensor

from vlm.data.batching.stats import BatchStats
from vlm.data.dataset import Skipped


class Batch(TypedDict, total=False):
    """Samples side by side, or one behind the other where they are packed.

    Families have inputs of their own beside these, under the names that their `forward` takes.

    Attributes:
        input_ids: `(rows, tokens)`.
        attention_mask: `(rows, tokens)`, 1 at tokens of a sample; packed rows have none.
        labels: `(rows, tokens)`, -100 where nothing is supervised.
        position_ids: `(rows, tokens)`, of packed rows: they begin anew with each sample.
        pixel_values: `(views, 3 * encoders, height, width)` of composed models; families have shapes of their own.
        image_features: `(views, features, dim)`, in place of pixels where features are cached.
        image_index: `(images,)`, for each image its index among those that differ.
        image_sizes: `(images, 2)`, height and width of images that are seen in tiles.
        image_views: `(images,)`, how many views each image has.
        skipped: the records that were left out; the training loop takes them out.
        facts: what throughput is computed from; the training loop takes it out.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_features: Tensor
    image_index: Tensor
    image_sizes: Tensor
    image_views: Tensor
    skipped: list[Skipped]
    facts: BatchStats


class HeadBatch(Batch, total=False):
    """A batch of samples with labels for prediction heads.

    Attributes:
        targets: `(samples, width)`, what the heads learn, NaN where a sample has no label.
        groups: `(samples,)`, the group within which a ranking compares; -1 for none.
        prompt_mask: `(samples, tokens)`, 1 at the tokens of the prompt.
    """

    targets: dict[str, Tensor]
    groups: Tensor
    prompt_mask: Tensor
