"""The tab *Predict*: predictions of a checkpoint's heads for images and a prompt."""

from functools import partial
from pathlib import Path

import gradio as gr

from vlm.web.components import RUNS_MODEL, checkpoint_dropdown
from vlm.web.html import bars_html, error_html, note_html
from vlm.web.models import ModelHolder

EMPTY_TEXT = "Scores of every label appear here."


def build(outputs: Path, holder: ModelHolder, names: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            checkpoint = checkpoint_dropdown(
                names, "Checkpoint with heads", "No run with heads", outputs, "predict-checkpoint"
            )
            images = gr.Gallery(
                label="Images", type="filepath", file_types=["image"], interactive=True, columns=3, height=220,
                object_fit="contain", elem_id="predict-images", buttons=[],
            )  # fmt: skip
            prompt = gr.Textbox(label="Prompt", info="As it was asked in training", lines=2, elem_id="predict-prompt")
            button = gr.Button("Predict", variant="primary", elem_id="predict-go")
        with gr.Column(scale=3, min_width=300):
            result = gr.HTML(note_html(EMPTY_TEXT), elem_id="predict-result")
    fields = [checkpoint, images, prompt]
    gr.on([button.click, prompt.submit], partial(predict, holder), fields, result, **RUNS_MODEL)
    return checkpoint


def predict(
    holder: ModelHolder, checkpoint: str | None, gallery: list[tuple[str, str | None]] | None, prompt: str
) -> str:
    """Return the predictions of a checkpoint's heads as bars, or what has to be fixed."""
    try:
        checkpoint = (checkpoint or "").strip()
        if not checkpoint:
            raise ValueError("choose a checkpoint with heads")
        from vlm.inference.predict import Predictor

        predictor = holder.load(Predictor, checkpoint)
        result = predictor.predict(prompt, [image for image, _ in gallery or []])
        predictions = result if isinstance(result, dict) else {predictor.heads[0].name: result}
        return "".join(
            bars_html(name, _format_prediction(head.prediction), {str(k): p for k, p in head.probabilities.items()})
            for name, head in predictions.items()
        )
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a GPU is out of memory
        return error_html(str(error))


def _format_prediction(prediction: object) -> str:
    if isinstance(prediction, float):
        return f"{prediction:.4g}"
    if isinstance(prediction, list | tuple):
        return ", ".join(map(str, prediction)) or "none of the labels"
    return str(prediction)
