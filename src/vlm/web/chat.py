"""The tab *Chat*: a conversation with a checkpoint about images, answered piece by piece."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from vlm.checks.fields import check_fields
from vlm.config.schema import InferenceConfig
from vlm.web.components import QUIET, RUNS_MODEL, checkpoint_dropdown, heading
from vlm.web.html import chat_text, toast_html
from vlm.web.loading import loading_signs, start_loading
from vlm.web.models import ModelHolder, knows_thinking

if TYPE_CHECKING:
    from PIL import Image

    from vlm.inference.conversation import Conversation, Exchange
    from vlm.inference.generate import VisionLanguageModel

EMPTY_TEXT = "Choose a checkpoint, attach an image and ask about it."
THINKING = {"as trained": None, "yes": True, "no": False}
"""Choices of whether the model thinks before it answers -> `inference.thinking`."""
STOPPED_NOTICE = " … (stopped: the model will not remember this question)"


class Message(TypedDict):
    """The value of the question's field: its text, and the paths of its images."""

    text: str | None
    files: list[str] | None


@dataclass
class ChatState:
    """One visitor's conversation, without its model, so that the page can release the model.

    `stopped` says whether to stop the answer that is being generated.
    """

    exchanges: "tuple[Exchange, ...]" = ()
    stopped: bool = False
    num_resets: int = 0


def build(outputs: Path, holder: ModelHolder, names: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    heading("Chat", "Ask a checkpoint about images. It remembers the conversation until you clear it.")
    state = gr.State(ChatState())
    checkpoint = checkpoint_dropdown(names, "Checkpoint", "finished run", outputs, "chat-checkpoint")
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            chatbot = gr.Chatbot(
                height="52vh",
                min_height=260,
                show_label=False,
                render_markdown=False,
                latex_delimiters=[],
                placeholder=EMPTY_TEXT,
                buttons=[],  # what it copied would be HTML
                elem_id="chat-shown",
                feedback_options=None,
            )
            question = gr.MultimodalTextbox(
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                show_label=False,
                elem_id="chat-question",
                placeholder="Your question",
                max_plain_text_length=100_000,
            )
        with gr.Column(scale=1, min_width=240, elem_id="chat-settings"):
            settings, thinking = _build_settings(names)
            clear = gr.Button("Clear conversation", size="sm", elem_id="chat-clear")

    def show_thinking(checkpoint: str | None) -> object:
        """Show the choice of thinking where the checkpoint's template has one."""
        return gr.update(visible=knows_thinking(checkpoint))

    def stop(state: ChatState) -> None:
        """End the answer that is being generated."""
        state.stopped = True

    def reset(state: ChatState) -> list[object]:
        """Forget the conversation; return an empty one to show."""
        state.exchanges, state.stopped = (), True
        state.num_resets += 1
        return []

    inputs = [question, chatbot, state, checkpoint, thinking, *settings]
    checkpoint.change(show_thinking, checkpoint, thinking, **QUIET)
    question.submit(partial(ask, holder), inputs, [chatbot, question], show_progress="minimal", **RUNS_MODEL)
    question.stop(stop, state, None, concurrency_limit=None, **QUIET)
    gr.on([clear.click, chatbot.clear, checkpoint.input], reset, state, chatbot, concurrency_limit=None, **QUIET)
    return checkpoint


def _build_settings(names: list[str]) -> tuple[list[gr.Number | gr.Textbox], gr.Radio]:
    """Build the generation settings: temperature, top_p, longest answer and seed; and whether the model thinks.

    They are always shown: Gradio makes the fields of a closed section when it is opened, and loses what is typed into
    them at once. The seed is a text, since Gradio turns an empty number into 0.
    """
    defaults = InferenceConfig()
    number = partial(gr.Number, min_width=110)
    with gr.Row():
        settings = [
            number(defaults.temperature, label="Temperature", info="0: no sampling", minimum=0, step=0.1),
            number(defaults.top_p, label="Top-p", info="1: off", minimum=0, maximum=1, step=0.05),
        ]
    with gr.Row():
        settings += [
            number(
                defaults.max_new_tokens,
                label="Longest answer",
                info="in tokens",
                precision=0,
                minimum=1,
                elem_id="chat-longest",
            ),
        ]
        seed = gr.Textbox(label="Seed", info="empty: random", min_width=110, max_lines=1, elem_id="chat-seed")
    thinking = gr.Radio(
        list(THINKING),
        value=next(iter(THINKING)),
        label="Thinking",
        info="before the answer",
        min_width=220,
        visible=knows_thinking(next(iter(names), None)),
        elem_id="chat-thinking",
    )
    return [*settings, seed], thinking


def ask(
    holder: ModelHolder,
    message: Message,
    earlier: list[dict[str, object]],
    state: ChatState,
    checkpoint: str | None,
    thinking: str,
    *settings: float | str | None,
) -> Iterator[tuple[object, object]]:
    """Yield the conversation to show and the state of the question's field, while a question is answered."""
    num_resets = state.num_resets
    text, images = (message["text"] or "").strip(), list(message["files"] or [])
    if not (text or images):
        yield gr.skip(), gr.skip()
        return
    turns = [*earlier, *({"role": "user", "content": {"path": image}} for image in images)]
    turns += [{"role": "user", "content": chat_text(text)}] if text else []
    yield turns, gr.update(value=None, submit_btn=False, stop_btn=True)
    answer, conversation = "", None
    state.stopped = False
    try:
        config, seed = read_settings(settings, THINKING.get(thinking))
        name = (checkpoint or "").strip()
        if not name:
            raise ValueError("Choose a checkpoint first.")
        loading = start_loading(lambda: _load(holder, name))
        for sign in loading_signs(loading, name):
            if state.stopped:
                break
            yield [*turns, {"role": "assistant", "content": chat_text(sign)}], gr.skip()
        if not state.stopped:
            conversation = open_conversation(loading.result(), config, seed)
            conversation.exchanges = state.exchanges
            with closing(conversation.ask(text, images)) as pieces:
                for piece in pieces:
                    if state.stopped:
                        break
                    answer += piece
                    yield [*turns, {"role": "assistant", "content": chat_text(answer)}], gr.skip()
        if conversation is not None and not state.stopped:
            state.exchanges = conversation.exchanges
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a GPU is out of memory
        yield earlier, gr.update(value=message, submit_btn=True, stop_btn=False)  # to be corrected and sent again
        raise gr.Error(toast_html(str(error)), duration=None, title="Not asked", print_exception=False) from error
    turns.append({"role": "assistant", "content": chat_text(answer) + STOPPED_NOTICE * state.stopped})
    if conversation is not None and not state.stopped and (drawn := conversation.draw_last_answer()) is not None:
        alt = "the image with the places that the answer names"
        turns.append({"role": "assistant", "content": {"path": save_drawn(drawn), "alt_text": alt}})
    yield turns if state.num_resets == num_resets else [], gr.update(submit_btn=True, stop_btn=False)


def save_drawn(image: "Image.Image") -> str:
    """Save an image where Gradio serves files that it made itself; return its path."""
    return save_pil_to_cache(image, get_upload_folder(), "answer", "png")


def read_settings(
    settings: Sequence[float | str | None], thinking: bool | None = None
) -> tuple[InferenceConfig, int | None]:
    """Return the generation settings and the seed; ValueError if a field has to be corrected.

    `settings` are temperature, top_p, max_new_tokens and the text of the seed, which may be empty. `thinking` is that
    of `InferenceConfig`.
    """
    temperature, top_p, max_new_tokens, seed = settings
    temperature, top_p = _require_number("Temperature", temperature), _require_number("Top-p", top_p)
    max_new_tokens = int(_require_number("Longest answer", max_new_tokens))
    config = InferenceConfig(temperature, top_p, max_new_tokens=max_new_tokens, thinking=thinking)
    check_fields(config)
    return config, _read_seed(str(seed or ""))


def open_conversation(model: "VisionLanguageModel", config: InferenceConfig, seed: int | None) -> "Conversation":
    """Return a new conversation with a model."""
    from transformers import set_seed

    from vlm.inference.conversation import Conversation

    if seed is not None:
        set_seed(seed)
    return Conversation(model, config)


def _load(holder: ModelHolder, checkpoint: str) -> "VisionLanguageModel":
    from vlm.inference.generate import VisionLanguageModel

    return holder.load(VisionLanguageModel, checkpoint)


def _require_number(name: str, value: float | str | None) -> float:
    if value is None:
        raise ValueError(f"{name} is empty; enter a number")
    return float(value)


def _read_seed(text: str) -> int | None:
    """Return the seed of a text; None if it is empty."""
    if not text.strip():
        return None
    if not text.strip().isdecimal() or int(text) >= 2**32:
        raise ValueError(f"Seed: got {text!r}; enter a whole number from 0 to 2^32 - 1, or leave it empty")
    return int(text)
