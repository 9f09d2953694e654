"""Files to look at: plots of loss and speed, the first batch as a page, answers as a list."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vlm.data.batching.collator import IMAGE_INDEX, VIDEO_INPUT
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.pages import render_page, thumbnail, tokens_as_html
from vlm.data.processor import Processor
from vlm.models.native import join_patches
from vlm.models.pixels import ImageProcessor
from vlm.models.processing_vlm import VLMProcessor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = dict[str, float]
"""The logged metrics of a step by name."""

LOSS_CURVES = {"loss": "training", "eval_loss": "evaluation", "eval_blank_loss": "evaluation, blank images"}

THROUGHPUT_CURVES = {
    "tokens_per_second": "tokens",
    "supervised_tokens_per_second": "supervised tokens",
    "samples_per_second": "samples",
}
SHARE_CURVES = {"padding_share": "padding", "data_wait_share": "waiting for data", "mfu": "model FLOPs utilisation"}


MAX_MARKED = 20
"""The maximum number of points of a curve that are marked: without marks, a single one would not be seen."""


def draw_loss(metrics: Sequence[Metrics], path: Path, label: str = "loss") -> None:
    """Plot the losses over the steps as a PNG; `label` names them."""
    from matplotlib.figure import Figure  # slow to import, and not needed before a run ends

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, metrics, LOSS_CURVES)
    axes.set(xlabel="step", ylabel=label)
    figure.savefig(path, dpi=120)


def draw_speed(metrics: Sequence[Metrics], path: Path) -> None:
    """Plot tokens a second (for heads, samples) over the steps, and the shares of padding and waiting, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and not needed before a run ends

    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    _draw_curves(above, metrics, THROUGHPUT_CURVES)
    _draw_curves(below, metrics, SHARE_CURVES)
    above.set(ylim=(0, None), ylabel="a second")
    below.set(ylim=(0, None), xlabel="step")
    figure.savefig(path, dpi=120)


def _draw_curves(axes: "Axes", metrics: Sequence[Metrics], curves: dict[str, str]) -> None:
    """Draw metrics, by name -> label, over the steps; samples a second only if there are no tokens a second."""
    from matplotlib.ticker import MaxNLocator

    for key, label in curves.items():
        points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        if points and (key != "samples_per_second" or not axes.lines):
            is_short = len(points) <= MAX_MARKED or key.startswith("eval_")
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if is_short else "")
    if axes.lines:
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps are whole numbers
    axes.grid(alpha=0.3)


def write_first_batch(batch: dict[str, Tensor], processor: Processor, folder: Path) -> None:
    """Write `first_batch.html`: each row of a batch as the model sees it, with marked supervised tokens and images."""
    (folder / "first_batch").mkdir(parents=True, exist_ok=True)
    names = []
    for index, pixels in enumerate(_normalised_images(batch, processor)):
        names.append(f"first_batch/{index}.png")
        _to_image(pixels, processor.image_processor).save(folder / names[-1])
    waiting = iter(names)
    rows = []
    if processor.needs_image_sizes and names:  # tiles do not say which row they belong to
        rows.append("".join(f'<img src="{name}" alt="">' for name in waiting))
    for ids, labels, mask in _iterate_rows(batch):
        images = ""
        if names and not processor.needs_image_sizes:  # none where features were read instead of images
            number = int((ids == processor.image_token_id).sum()) // cast(VLMProcessor, processor).tokens_per_image
            images = "".join(f'<img src="{next(waiting)}" alt="">' for _ in range(number))
        length, supervised = int(mask.sum()), int((labels != IGNORE_INDEX).sum())
        counts = f"{length} tokens, {supervised} supervised, {len(mask) - length} padding"
        tokens = tokens_as_html(ids.tolist(), labels.tolist(), mask.tolist(), processor)
        rows.append(f"{images}<p><small>{counts}</small></p><p>{tokens}</p>")
    html = render_page("First batch", "As the model sees it. <mark>Marked</mark> tokens are supervised.", rows)
    (folder / "first_batch.html").write_text(html, encoding="utf-8")


def _iterate_rows(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, labels and mask of each row of a batch, or of each sample of a packed batch."""
    if SEQUENCE_STARTS not in batch:
        yield from zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    else:
        for start, end in pairwise(batch[SEQUENCE_STARTS].tolist()):
            ids = batch["input_ids"][0, start:end]
            yield ids, batch["labels"][0, start:end], torch.ones_like(ids)


def _normalised_images(batch: dict[str, Tensor], processor: Processor) -> Sequence[Tensor]:
    """Return images, tiles and frames of a batch `(3, height, width)`, as the first visual encoder sees them.

    There are none if the model reads separate patches.
    """
    if (grids := batch.get("image_grids")) is not None:
        patches = processor.normalise(batch["pixel_values"]).split(grids.prod(1).tolist())
        sizes = [(rows, columns) for rows, columns in grids.tolist()]
        return [join_patches(image, size)[0] for image, size in zip(patches, sizes, strict=True)]
    images: list[Tensor] = []
    for name in ("pixel_values", VIDEO_INPUT):
        pixels = batch.get(name)
        if pixels is not None and pixels.ndim >= 4 and pixels.shape[-3] % 3 == 0:
            normalised = processor.normalise(pixels.reshape(-1, *pixels.shape[-3:]))[:, :3]
            images += normalised[batch[IMAGE_INDEX]] if IMAGE_INDEX in batch else normalised
    return images


def _to_image(pixels: Tensor, image_processor: ImageProcessor) -> Image.Image:
    """Return normalised pixels `(3, height, width)` as an image."""
    mean = pixels.new_tensor(image_processor.image_mean).view(3, 1, 1)
    std = pixels.new_tensor(image_processor.image_std).view(3, 1, 1)
    return to_pil_image((pixels * std + mean).clamp(0, 1).float().cpu())


@dataclass(frozen=True)
class AnsweredSample:
    """A model's answer to a sample; `drawn` is the image with objects drawn on it, if it has any."""

    question: str
    reference: str
    answer: str
    image: Image.Image | None = None
    drawn: Image.Image | None = None


def append_sample_generations(step: int, samples: Iterable[AnsweredSample], folder: Path) -> None:
    """Append the model's answers at a step to `samples.md`; images with drawn objects are kept for each step."""
    (folder / "samples").mkdir(exist_ok=True)
    lines = [f"## Step {step}\n"]
    for index, sample in enumerate(samples):
        if sample.image is not None:
            name = f"{index}.png" if sample.drawn is None else f"{step}-{index}.png"
            shown = thumbnail(sample.image, 224) if sample.drawn is None else sample.drawn
            shown.save(folder / "samples" / name)
            lines.append(f"![sample {index}](samples/{name})\n")
        quoted = {"question": sample.question, "reference": sample.reference, "answer": sample.answer}
        lines += [f"- **{label}**: {' '.join(text.split())}" for label, text in quoted.items()] + [""]
    with (folder / "samples.md").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
