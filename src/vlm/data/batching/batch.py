"""Batches from the collator to the model, and what the training loop takes out of them on the way."""

from typing import Required, TypedDict

from torch import Tensor

from vlm.data.batching.stats import BatchStats
from vlm.data.dataset import SampleRef
from vlm.data.skipped import Skipped


class BatchInputs(TypedDict, total=False):
    """What batches for language models and for prediction heads have in common.

    Families have further inputs, under the names that their `forward` takes.

    Attributes:
        input_ids: `(rows, tokens)`.
        attention_mask: `(rows, tokens)`, 1 at tokens of a sample; packed rows have none.
        pixel_values: `(views, 3 * encoders, height, width)` of composed models; families have shapes of their own.
        pixel_values_videos: of families that encode videos separately.
        image_features: `(views, features, dim)`, instead of pixels where features are cached.
        image_index: `(images,)`, for each image its index in `pixel_values` or `image_features`, where equal images
            are there once.
        image_sizes: `(images, 2)`, height and width of images that are cut into tiles.
        image_views: `(images,)`, the number of views of each image.
        image_grids: `(images, 2)`, rows and columns of patches at native resolution; `pixel_values` is then
            `(patches, 3, side, side)`.
        skipped: the records that were left out; the training loop takes them out.
        batch_stats: what throughput is computed from; the training loop takes it out.
        sample_refs: which samples these are; the training loop takes them out.
    """

    input_ids: Required[Tensor]
    attention_mask: Tensor
    pixel_values: Tensor
    pixel_values_videos: Tensor
    image_features: Tensor
    image_index: Tensor
    image_sizes: Tensor
    image_views: Tensor
    image_grids: Tensor
    skipped: list[Skipped]
    batch_stats: BatchStats
    sample_refs: list[SampleRef]


class Batch(BatchInputs, total=False):
    """Samples padded to rows of one length, or concatenated in a single row where they are packed.

    Attributes:
        labels: `(rows, tokens)`, -100 where nothing is supervised.
        position_ids: `(1, tokens)`, of packed rows: they restart with each sample, at 0 or after a shared prompt.
        cu_seq_lens_q: `(samples + 1,)`, of packed rows: where each sample starts, and where the last one ends.
        cu_seq_lens_k: the same tensor; where prompts are shared, the same of the tokens in `key_index`.
        max_length_q: of packed rows: the tokens of the longest sample.
        max_length_k: the same number; where prompts are shared, shared tokens are counted with each sample.
        key_index: `(keys,)`, of packed rows with shared prompts: the places of the tokens that each sample consists of,
            those of its prompt before its own, sample by sample.
        micro_batch: `(1, tokens)`, of packed steps: the micro-batch of each token's sample; the training loop takes
            it out.
        more_rows: further packed rows of the same accumulation step; the training loop takes them out.
        loss_weights: `(rows, tokens)`, the factor of each label's loss: where replies have weights, and of packed steps
            whose micro-batches are averaged.
    """

    labels: Required[Tensor]
    position_ids: Tensor
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    key_index: Tensor
    micro_batch: Tensor
    more_rows: list["Batch"]
    loss_weights: Tensor


class HeadBatch(BatchInputs, total=False):
    """Prompts with the targets of prediction heads, as `VLMForPrediction.forward` takes them.

    Attributes:
        labels: head -> `(rows, width)`, what the head learns, NaN if a sample has no label.
        groups: `(rows,)`, the group within which a ranking compares; -1 for none.
        text_labels: `(rows, tokens)`, -100 outside replies; only where replies are trained on.
        prompt_mask: `(rows, tokens)`, 1 at the tokens of the prompt; as `text_labels`.
    """

    labels: dict[str, Tensor]
    groups: Tensor
    text_labels: Tensor
    prompt_mask: Tensor
