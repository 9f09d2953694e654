"""The tab *Predict*: predictions of a checkpoint's heads for images and a prompt."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from vlm.web.components import RUNS_MODEL, checkpoint_dropdown, heading
from vlm.web.html import bars_html, error_html, loading_html, note_html
from vlm.web.loading import loading_signs, start_loading
from vlm.web.models import ModelHolder

if TYPE_CHECKING:
    from vlm.inference.predict import Predictor

EMPTY_TEXT = "Predictions appear here, with a bar for each label."


def build(outputs: Path, holder: ModelHolder, names: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    heading("Predict", "Ask a checkpoint with prediction heads for labels or numbers.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            checkpoint = checkpoint_dropdown(
                names, "Checkpoint with heads", "finished run with heads", outputs, "predict-checkpoint"
            )
            images = gr.Gallery(
                label="Images",
                type="filepath",
                file_types=["image"],
                interactive=True,
                columns=3,
                height=220,
                object_fit="contain",
                elem_id="predict-images",
                buttons=[],
            )
            info = "Use the same prompt as in training"
            prompt = gr.Textbox(label="Prompt", info=info, lines=2, elem_id="predict-prompt")
            button = gr.Button("Predict", variant="primary", elem_id="predict-go")
        with gr.Column(scale=3, min_width=300):
            result = gr.HTML(note_html(EMPTY_TEXT), elem_id="predict-result")
    fields = [checkpoint, images, prompt]
    gr.on([button.click, prompt.submit], partial(predict, holder), fields, result, **RUNS_MODEL)
    return checkpoint


def predict(
    holder: ModelHolder, checkpoint: str | None, gallery: list[tuple[str, str | None]] | None, prompt: str
) -> Iterator[str]:
    """Yield that the model loads, and then the predictions of its heads as bars, or what has to be fixed."""
    try:
        checkpoint = (checkpoint or "").strip()
        if not checkpoint:
            raise ValueError("Choose a checkpoint with heads first.")
        loading = start_loading(lambda: _load(holder, checkpoint))
        yield from map(loading_html, loading_signs(loading, checkpoint))
        predictor = loading.result()
        result = predictor.predict(prompt, [image for image, _ in gallery or []])
        predictions = result if isinstance(result, dict) else {predictor.heads[0].name: result}
        yield "".join(
            bars_html(name, _format_prediction(head.prediction), {str(k): p for k, p in head.probabilities.items()})
            for name, head in predictions.items()
        )
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a GPU is out of memory
        yield error_html(str(error))


def _load(holder: ModelHolder, checkpoint: str) -> "Predictor":
    from vlm.inference.predict import Predictor

    return holder.load(Predictor, checkpoint)


def _format_prediction(prediction: object) -> str:
    if isinstance(prediction, float):
        return f"{prediction:.4g}"
    if isinstance(prediction, list | tuple):
        return ", ".join(map(str, prediction)) or "none of the labels"
    return str(prediction)
