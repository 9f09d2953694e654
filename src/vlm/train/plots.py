"""What people look at: the loss as a picture, the first batch as a page, answers as a list."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vlm.data.encode import IGNORED

CURVES = {"loss": "training", "eval_loss": "evaluation", "eval_blank_loss": "evaluation, blank pictures"}
STYLE = (
    "body{font:15px/1.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "mark{background:#b7ebc0}.pad{color:#bbb}.image{color:#06c}img{height:96px;margin:2px}"
    "section{border-top:1px solid #ccc;padding:1em 0;overflow-wrap:anywhere}"
)


def draw_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """The losses over the steps, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in CURVES.items():
        points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="" if key == "loss" else "o")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per supervised token")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_first_batch(batch: dict[str, Tensor], processor: Any, folder: Path) -> None:
    """`first_batch.html`: each row of a batch as the model sees it, supervised tokens marked, with its pictures."""
    pictures = folder / "first_batch"
    pictures.mkdir(parents=True, exist_ok=True)
    names = []
    for index, pixels in enumerate(processor.normalise(batch["pixel_values"]) if "pixel_values" in batch else []):
        names.append(f"first_batch/{index}.png")
        picture_of(pixels, processor.image_processor).save(folder / names[-1])
    waiting = iter(names)
    rows = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        number = int((ids == processor.image_token_id).sum()) // processor.tokens_per_image
        images = "".join(f'<img src="{next(waiting)}" alt="">' for _ in range(number))
        supervised = int((labels != IGNORED).sum())
        facts = f"{int(mask.sum())} tokens, {supervised} supervised, {len(mask) - int(mask.sum())} padding"
        rows.append(
            f"<section>{images}<p><small>{facts}</small></p><p>{_tokens(ids, labels, mask, processor)}</p></section>"
        )
    page = (
        f"<!doctype html><meta charset=utf-8><title>First batch</title><style>{STYLE}</style><h1>First batch</h1>"
        f"<p>As the model sees it. <mark>Marked</mark> tokens are supervised.</p>{''.join(rows)}"
    )
    (folder / "first_batch.html").write_text(page, encoding="utf-8")


def _tokens(ids: Tensor, labels: Tensor, mask: Tensor, processor: Any) -> str:
    """A row's tokens as HTML; runs of the image token and of padding as counts."""
    pieces: list[tuple[str, list[int]]] = []
    for token, label, attended in zip(ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        kind = "pad" if not attended else "image" if token == processor.image_token_id else ""
        kind = kind or ("mark" if label != IGNORED else "text")
        if not pieces or pieces[-1][0] != kind:
            pieces.append((kind, []))
        pieces[-1][1].append(token)
    html = []
    for kind, run in pieces:
        if kind in ("pad", "image"):
            html.append(f'<span class="{kind}">[{len(run)} × {"padding" if kind == "pad" else "image token"}]</span>')
        else:
            text = escape(processor.tokenizer.decode(run)).replace("\n", "⏎<br>")
            html.append(f"<mark>{text}</mark>" if kind == "mark" else text)
    return "".join(html)


def picture_of(pixels: Tensor, image_processor: Any) -> Image.Image:
    """Normalised pixels `(3, height, width)` as a picture again."""
    mean, std = (
        pixels.new_tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    return to_pil_image((pixels * std + mean).clamp(0, 1).float().cpu())


def write_answers(step: int, rows: Sequence[tuple[str, str, str, Image.Image | None]], folder: Path) -> None:
    """Append to `samples.md` what the model answered at a step.

    Args:
        step: the training step.
        rows: (question, reference, answer, picture) of each sample.
        folder: the run directory.
    """
    (folder / "samples").mkdir(exist_ok=True)
    lines = [f"## Step {step}\n"]
    for index, (question, reference, answer, picture) in enumerate(rows):
        if picture is not None:
            small = picture.convert("RGB")
            small.thumbnail((224, 224))
            small.save(folder / "samples" / f"{index}.png")
            lines.append(f"![sample {index}](samples/{index}.png)\n")
        quoted = {"question": question, "reference": reference, "answer": answer}
        lines += [f"- **{label}**: {' '.join(text.split())}" for label, text in quoted.items()] + [""]
    with (folder / "samples.md").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
