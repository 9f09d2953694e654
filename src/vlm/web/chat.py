"""The tab *Chat*: a conversation with a checkpoint about pictures, answered piece by piece."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.checks.run import check_inference
from vlm.config.schema import InferenceConfig
from vlm.web.models import HeldModel
from vlm.web.runs import checkpoints

EMPTY = "Choose a checkpoint, add a picture, and ask."
STOPPED = " … (stopped: the model does not remember this question)"


@dataclass
class Talk:
    """One visitor's conversation. It holds no model, so that the page can let go of one.

    Attributes:
        exchanges: what was said, as `Conversation` has it.
        stopped: whether the answer that is being given is no longer wanted.
        beginnings: how often it began anew.
    """

    exchanges: tuple[Any, ...] = ()
    stopped: bool = False
    beginnings: int = 0

    def forget(self) -> None:
        """Begin anew with the next question."""
        self.exchanges, self.stopped = (), True
        self.beginnings += 1


def build(outputs: Path, given: list[str], held: HeldModel) -> gr.Dropdown:
    """Lay the tab out; returns the choice of checkpoints."""
    found = checkpoints(outputs, given, heads=False)
    talk = gr.State(Talk())
    checkpoint = gr.Dropdown(
        found, value=next(iter(found), None), allow_custom_value=True, label="Checkpoint", elem_id="chat-checkpoint",
        info="Choose one, or type a folder or a name on the Hub" if found
        else f"No complete run found under {outputs}/ yet: type a folder or a name on the Hub",
    )  # fmt: skip
    shown = gr.Chatbot(
        height="52vh", min_height=260, show_label=False, render_markdown=False, placeholder=EMPTY, buttons=["copy"],
        elem_id="chat-shown", feedback_options=None,
    )  # fmt: skip
    question = gr.MultimodalTextbox(
        file_types=["image"], file_count="multiple", sources=["upload"], show_label=False, elem_id="chat-question",
        placeholder="Your question", max_plain_text_length=100_000,
    )  # fmt: skip
    clear = gr.Button("Clear", size="sm", elem_id="chat-clear")
    settings = _settings()

    def stop(talk: Talk) -> None:
        talk.stopped = True

    def forget(talk: Talk) -> list[Any]:
        talk.forget()
        return []

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    question.submit(
        partial(ask, held), [question, shown, talk, checkpoint, *settings], [shown, question],
        concurrency_id="model", concurrency_limit=1, api_visibility="private", show_progress="minimal",
    )  # fmt: skip
    question.stop(stop, talk, None, **hidden)
    gr.on([clear.click, shown.clear, checkpoint.input], forget, talk, shown, **hidden)
    return checkpoint


def _settings() -> list[gr.Number]:
    """How answers are drawn, in the order of `answers`."""
    with gr.Accordion("Settings", open=False, elem_id="chat-settings"), gr.Row():
        number: dict[str, Any] = {"min_width": 140}
        temperature = gr.Number(
            InferenceConfig.temperature, label="temperature", info="0 is greedy", minimum=0, step=0.1, **number
        )
        top_p = gr.Number(
            InferenceConfig.top_p, label="top_p", info="nucleus sampling", minimum=0, maximum=1, step=0.05, **number
        )
        longest = gr.Number(
            InferenceConfig.max_new_tokens, label="max_new_tokens", info="longest answer", precision=0, minimum=1,
            **number, elem_id="chat-longest",
        )  # fmt: skip
        seed = gr.Number(None, label="seed", info="empty: by chance", precision=0, **number)
    return [temperature, top_p, longest, seed]


def ask(
    held: HeldModel, said: dict[str, Any], turns: list[Any], talk: Talk, path: str | None, *settings: Any
) -> Iterator[tuple[Any, Any]]:
    """What is shown and what the field holds, while a question is answered."""
    before, beginning = list(turns), talk.beginnings
    text, pictures = (said["text"] or "").strip(), list(said["files"] or [])
    if not (text or pictures):
        yield gr.skip(), gr.skip()
        return
    asked = [*before, *({"role": "user", "content": {"path": one}} for one in pictures)]
    asked += [{"role": "user", "content": text}] if text else []
    yield asked, gr.update(value=None, submit_btn=False, stop_btn=True)
    answer = ""
    try:
        for answer in answers(held, talk, path, text, pictures, *settings):
            yield [*asked, {"role": "assistant", "content": answer}], gr.skip()
    except (ValueError, OSError, RuntimeError) as error:  # the last: no memory left on a GPU
        yield before, gr.update(value=said, submit_btn=True, stop_btn=False)  # to be mended and sent again
        raise gr.Error(str(error), duration=None, title="Not asked", print_exception=False) from error
    shown = [*asked, {"role": "assistant", "content": answer + STOPPED * talk.stopped}]
    yield shown if talk.beginnings == beginning else [], gr.update(submit_btn=True, stop_btn=False)


def answers(
    held: HeldModel, talk: Talk, checkpoint: str | None, text: str, pictures: list[str], temperature: float | None,
    top_p: float | None, longest: float | None, seed: float | None,
) -> Iterator[str]:  # fmt: skip
    """The answer to a question, longer each time, until it is complete or stopped.

    Raises:
        ValueError: no checkpoint, settings out of bounds, or what the model refuses.
    """
    settings = InferenceConfig(
        _given("temperature", temperature), _given("top_p", top_p), InferenceConfig.num_beams,
        int(_given("max_new_tokens", longest)),
    )  # fmt: skip
    check_inference(settings, prefix="")
    if not (checkpoint or "").strip():
        raise ValueError("choose a checkpoint")
    talk.stopped = False
    model = held.model(str(checkpoint).strip())
    from transformers import set_seed

    from vlm.inference.conversation import Conversation

    conversation = Conversation(model, settings)
    conversation.exchanges = talk.exchanges
    if seed is not None:
        set_seed(int(seed))
    answer = ""
    with closing(conversation.ask(text, pictures)) as pieces:
        for piece in pieces:
            if talk.stopped:
                return
            answer += piece
            yield answer
    if not talk.stopped:
        talk.exchanges = conversation.exchanges


def _given(name: str, value: float | None) -> float:
    """A number of a field.

    Raises:
        ValueError: the field is empty.
    """
    if value is None:
        raise ValueError(f"{name}: a number is needed")
    return value
