"""Measures of what a model knows about images, from its loss."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vlm.data.batching.collator import Collator
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import IGNORE_INDEX, encode
from vlm.data.sample import Sample, Turn
from vlm.data.vision.images import media_sizes_from_opened, open_media


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and supervised tokens of each row: `(S, vocabulary), (B, T) -> (B,), (B,)`."""
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    rows, columns = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    pieces = zip(logits.split(1024), targets[rows, columns].split(1024), strict=True)  # widened one by one
    losses = torch.cat([F.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in pieces])
    sums = losses.new_zeros(len(labels)).index_add_(0, rows, losses)
    return sums, torch.bincount(rows, minlength=len(labels)).to(sums.dtype)


def supervised_logits(model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """What a model gives at supervised positions, and what they predict: logits `(S, vocabulary)` and `(S,)`."""
    targets = F.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T)
    keep = targets != IGNORE_INDEX
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    return model(**rest, logits_to_keep=keep, use_cache=False), targets[keep]


@torch.no_grad()
def sample_losses(
    model: Any, batches: Iterable[dict[str, Any]], gather: Callable[[Tensor], Tensor] = lambda one: one
) -> tuple[Tensor, Tensor]:
    """Summed loss and supervised tokens of every sample, in order: two `(samples,)` tensors on the CPU.

    Args:
        model: the model, in evaluation mode.
        batches: what it reads, on its device, with labels.
        gather: the numbers of all ranks out of those of one.
    """
    found = []
    for inputs in batches:
        rows = row_losses(supervised_logits(model, inputs)[0].logits, inputs["labels"])
        found.append([gather(one).cpu() for one in rows])
    sums, counts = zip(*found, strict=True)
    return torch.cat(sums), torch.cat(counts)


def loss_metrics(sums: Tensor, counts: Tensor, blank_sums: Tensor | None, with_images: Tensor) -> dict[str, float]:
    """Loss per supervised token, and the same on blank images: does the model use the image at all?

    Args:
        sums: `(samples,)`, the summed loss of each.
        counts: `(samples,)`, its supervised tokens.
        blank_sums: `(samples,)`, the summed loss of each with blank images; None where there are no images.
        with_images: `(samples,)`, which have images.

    Returns:
        `loss`, `blank_loss`, and over the samples with images `image_gain`: the mean of blank minus real loss, each
        the mean over its sample's tokens, with half the width of its 95% interval as `image_gain_ci95`.
    """
    found = {"loss": (sums.sum() / counts.sum()).item()}
    if blank_sums is None:
        return found
    gains = ((blank_sums - sums) / counts)[with_images]
    found |= {"blank_loss": (blank_sums.sum() / counts.sum()).item(), "image_gain": gains.mean().item()}
    if len(gains) > 1:
        found["image_gain_ci95"] = 1.96 * gains.std().item() / math.sqrt(len(gains))
    return found


@torch.no_grad()
def caption_retrieval(
    model: Any, processor: Any, samples: Sequence[Sample], *, ways: int = 10, seed: int = 0
) -> list[bool]:
    """Whether each image's own last reply has the lowest loss among those of other samples.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        samples: one image and one last reply each; replies that read the same are never set against each other.
        ways: candidates for an image, its own included; by chance 1 / ways are found.
        seed: chooses the others.

    Returns:
        One value a sample.
    """
    draw = random.Random(seed)
    collate = Collator.of(processor, deduplicate=processor.deduplicated_inputs)
    texts = [last_reply_text(sample) for sample in samples]
    found = []
    for sample, own in zip(tqdm(samples, "caption retrieval"), texts, strict=True):
        others = draw.sample(sorted({text for text in texts if text != own}), ways - 1)
        pictures = open_media(sample)
        sizes = media_sizes_from_opened(sample.media, pictures, processor)
        encoded = [encode(processor, replace_reply(sample, text), sizes) for text in [own, *others]]
        batch = collate([model_inputs(processor, one, pictures, sizes) for one in encoded])
        if "pixel_values" in batch:
            batch["pixel_values"] = processor.normalise(batch["pixel_values"])
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        sums, counts = row_losses(model(**inputs).logits, inputs["labels"])
        found.append(int((sums / counts).argmin()) == 0)
    return found


def last_reply_text(sample: Sample) -> str:
    """The text of a sample's last reply."""
    return "".join(part for part in sample.turns[-1].content if isinstance(part, str))


def replace_reply(sample: Sample, text: str) -> Sample:
    """The sample with another last reply."""
    return replace(sample, turns=(*sample.turns[:-1], Turn("assistant", (text,))))
