"""The tab *Predict*: what a checkpoint's heads say of images and a prompt."""

from pathlib import Path
from typing import Any

import gradio as gr

from vlm.web.html import bars_html, error_html, note_html
from vlm.web.models import ModelHolder
from vlm.web.runs import checkpoints

EMPTY_TEXT = "Scores of every label appear here."


def build(outputs: Path, extra_checkpoints: list[str], model_holder: ModelHolder) -> gr.Dropdown:
    """Lay the tab out; returns the choice of checkpoints."""
    found = checkpoints(outputs, extra_checkpoints, heads=True)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            checkpoint = gr.Dropdown(
                found, value=next(iter(found), None), allow_custom_value=True, label="Checkpoint with heads",
                info="Choose one, or type a folder or a name on the Hub" if found
                else f"No run with heads found under {outputs}/ yet: type a folder or a name on the Hub",
                elem_id="predict-checkpoint",
            )  # fmt: skip
            images = gr.Gallery(
                label="Images", type="filepath", file_types=["image"], interactive=True, columns=3, height=220,
                object_fit="contain", elem_id="predict-images", buttons=[],
            )  # fmt: skip
            prompt = gr.Textbox(label="Prompt", info="As it was asked in training", lines=2, elem_id="predict-prompt")
            button = gr.Button("Predict", variant="primary", elem_id="predict-go")
        with gr.Column(scale=3, min_width=300):
            result = gr.HTML(note_html(EMPTY_TEXT), elem_id="predict-result")

    def ask(path: str | None, gallery: list[Any] | None, text: str) -> str:
        try:
            return predict_as_html(model_holder, path, [one[0] for one in gallery or []], text)
        except (ValueError, OSError, RuntimeError) as error:  # the last: no memory left on a GPU
            return error_html(str(error))

    gr.on(
        [button.click, prompt.submit], ask, [checkpoint, images, prompt], result, concurrency_id="model",
        concurrency_limit=1, api_visibility="private",
    )  # fmt: skip
    return checkpoint


def predict_as_html(model_holder: ModelHolder, checkpoint: str | None, images: list[str], prompt: str) -> str:
    """What every head of a checkpoint says, as bars.

    Raises:
        ValueError: no checkpoint, or what `Predictor.predict` refuses.
    """
    if not (checkpoint or "").strip():
        raise ValueError("choose a checkpoint with heads")
    predictor = model_holder.predictor(str(checkpoint).strip())
    found = predictor.predict(prompt, images)
    predictions = found if isinstance(found, dict) else {predictor.heads[0].name: found}
    return "".join(bars_html(name, _format_prediction(one), one.probabilities) for name, one in predictions.items())


def _format_prediction(one: Any) -> str:
    """What a head decided, in words."""
    if isinstance(one.prediction, float):
        return f"{one.prediction:.4g}"
    if isinstance(one.prediction, list | tuple):
        return ", ".join(map(str, one.prediction)) or "none of the labels"
    return str(one.prediction)
