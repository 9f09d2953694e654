"""The tab *Chat*: a conversation with a checkpoint about images, answered piece by piece."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.checks.run import check_inference
from vlm.config.schema import InferenceConfig
from vlm.web.models import ModelHolder
from vlm.web.runs import checkpoints

EMPTY_TEXT = "Choose a checkpoint, add an image, and ask."
STOPPED_NOTICE = " … (stopped: the model does not remember this question)"


@dataclass
class ChatState:
    """One visitor's conversation. It holds no model, so that the page can let go of one.

    Attributes:
        exchanges: what was said, as `Conversation` has it.
        stopped: whether the answer that is being given is no longer wanted.
        beginnings: how often it began anew.
    """

    exchanges: tuple[Any, ...] = ()
    stopped: bool = False
    num_resets: int = 0

    def reset(self) -> None:
        """Begin anew with the next question."""
        self.exchanges, self.stopped = (), True
        self.num_resets += 1


def build(outputs: Path, extra_checkpoints: list[str], model_holder: ModelHolder) -> gr.Dropdown:
    """Lay the tab out; returns the choice of checkpoints."""
    found = checkpoints(outputs, extra_checkpoints, heads=False)
    state = gr.State(ChatState())
    checkpoint = gr.Dropdown(
        found, value=next(iter(found), None), allow_custom_value=True, label="Checkpoint", elem_id="chat-checkpoint",
        info="Choose one, or type a folder or a name on the Hub" if found
        else f"No complete run found under {outputs}/ yet: type a folder or a name on the Hub",
    )  # fmt: skip
    shown = gr.Chatbot(
        height="52vh", min_height=260, show_label=False, render_markdown=False, placeholder=EMPTY_TEXT, buttons=["copy"],
        elem_id="chat-shown", feedback_options=None,
    )  # fmt: skip
    question = gr.MultimodalTextbox(
        file_types=["image"], file_count="multiple", sources=["upload"], show_label=False, elem_id="chat-question",
        placeholder="Your question", max_plain_text_length=100_000,
    )  # fmt: skip
    clear = gr.Button("Clear", size="sm", elem_id="chat-clear")
    settings = _build_settings()

    def stop(state: ChatState) -> None:
        state.stopped = True

    def reset(state: ChatState) -> list[Any]:
        state.reset()
        return []

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    question.submit(
        partial(ask, model_holder), [question, shown, state, checkpoint, *settings], [shown, question],
        concurrency_id="model", concurrency_limit=1, api_visibility="private", show_progress="minimal",
    )  # fmt: skip
    question.stop(stop, state, None, **hidden)
    gr.on([clear.click, shown.clear, checkpoint.input], reset, state, shown, **hidden)
    return checkpoint


def _build_settings() -> list[gr.Number]:
    """How answers are drawn, in the order of `answers`."""
    with gr.Accordion("Settings", open=False, elem_id="chat-settings"), gr.Row():
        number: dict[str, Any] = {"min_width": 140}
        temperature = gr.Number(
            InferenceConfig.temperature, label="temperature", info="0 is greedy", minimum=0, step=0.1, **number
        )
        top_p = gr.Number(
            InferenceConfig.top_p, label="top_p", info="nucleus sampling", minimum=0, maximum=1, step=0.05, **number
        )
        max_answer_tokens = gr.Number(
            InferenceConfig.max_new_tokens, label="max_new_tokens", info="longest answer", precision=0, minimum=1,
            **number, elem_id="chat-longest",
        )  # fmt: skip
        seed = gr.Number(None, label="seed", info="empty: by chance", precision=0, **number)
    return [temperature, top_p, max_answer_tokens, seed]


def ask(
    model_holder: ModelHolder,
    message: dict[str, Any],
    turns: list[Any],
    state: ChatState,
    path: str | None,
    *settings: Any,
) -> Iterator[tuple[Any, Any]]:
    """What is shown and what the field holds, while a question is answered."""
    before, num_resets_before = list(turns), state.num_resets
    text, images = (message["text"] or "").strip(), list(message["files"] or [])
    if not (text or images):
        yield gr.skip(), gr.skip()
        return
    asked = [*before, *({"role": "user", "content": {"path": one}} for one in images)]
    asked += [{"role": "user", "content": text}] if text else []
    yield asked, gr.update(value=None, submit_btn=False, stop_btn=True)
    answer = ""
    try:
        for answer in stream_answer(model_holder, state, path, text, images, *settings):
            yield [*asked, {"role": "assistant", "content": answer}], gr.skip()
    except (ValueError, OSError, RuntimeError) as error:  # the last: no memory left on a GPU
        yield before, gr.update(value=message, submit_btn=True, stop_btn=False)  # to be mended and sent again
        raise gr.Error(str(error), duration=None, title="Not asked", print_exception=False) from error
    shown = [*asked, {"role": "assistant", "content": answer + STOPPED_NOTICE * state.stopped}]
    yield shown if state.num_resets == num_resets_before else [], gr.update(submit_btn=True, stop_btn=False)


def stream_answer(
    model_holder: ModelHolder, state: ChatState, checkpoint: str | None, text: str, images: list[str], temperature: float | None,
    top_p: float | None, max_answer_tokens: float | None, seed: float | None,
) -> Iterator[str]:  # fmt: skip
    """The answer to a question, longer each time, until it is complete or stopped.

    Raises:
        ValueError: no checkpoint, settings out of bounds, or what the model refuses.
    """
    settings = InferenceConfig(
        _require_number("temperature", temperature), _require_number("top_p", top_p), InferenceConfig.num_beams,
        int(_require_number("max_new_tokens", max_answer_tokens)),
    )  # fmt: skip
    check_inference(settings, prefix="")
    if not (checkpoint or "").strip():
        raise ValueError("choose a checkpoint")
    state.stopped = False
    model = model_holder.model(str(checkpoint).strip())
    from transformers import set_seed

    from vlm.inference.conversation import Conversation

    conversation = Conversation(model, settings)
    conversation.exchanges = state.exchanges
    if seed is not None:
        set_seed(int(seed))
    answer = ""
    with closing(conversation.ask(text, images)) as pieces:
        for piece in pieces:
            if state.stopped:
                return
            answer += piece
            yield answer
    if not state.stopped:
        state.exchanges = conversation.exchanges


def _require_number(name: str, value: float | None) -> float:
    """A number of a field.

    Raises:
        ValueError: the field is empty.
    """
    if value is None:
        raise ValueError(f"{name}: a number is needed")
    return value
