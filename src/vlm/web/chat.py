"""The tab *Chat*: a conversation with a checkpoint about pictures, answered piece by piece."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.config.check import check_inference
from vlm.config.schema import InferenceConfig
from vlm.web.models import HeldModel
from vlm.web.runs import checkpoints

EMPTY = "Choose a checkpoint, add a picture, and ask."
STOPPED = " … (stopped: the model does not remember this question)"


@dataclass
class Talk:
    """One visitor's conversation.

    Attributes:
        conversation: with the model of `checkpoint`; None before the first question.
        checkpoint: with which model.
        stopped: whether the answer that is being given is no longer wanted.
    """

    conversation: Any = None
    checkpoint: str | None = None
    stopped: bool = False

    def forget(self) -> None:
        """Begin anew with the next question."""
        self.conversation, self.checkpoint, self.stopped = None, None, True


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
    with gr.Row():
        clear = gr.Button("Clear", size="sm", elem_id="chat-clear")
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

    def ask(
        said: dict[str, Any], turns: list[Any], talk: Talk, path: str | None, *settings: Any
    ) -> Iterator[tuple[Any, Any]]:
        before = list(turns)
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
        except (ValueError, OSError) as error:
            yield before, gr.update(value=said, submit_btn=True, stop_btn=False)  # to be mended and sent again
            raise gr.Error(str(error), duration=None, title="Not asked", print_exception=False) from error
        if talk.stopped:
            answer += STOPPED
        yield [*asked, {"role": "assistant", "content": answer}], gr.update(submit_btn=True, stop_btn=False)

    def stop(talk: Talk) -> None:
        talk.stopped = True

    def forget(talk: Talk) -> list[Any]:
        talk.forget()
        return []

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    question.submit(
        ask, [question, shown, talk, checkpoint, temperature, top_p, longest, seed], [shown, question],
        concurrency_id="model", concurrency_limit=1, api_visibility="private", show_progress="minimal",
    )  # fmt: skip
    question.stop(stop, talk, None, **hidden)
    gr.on([clear.click, shown.clear, checkpoint.change], forget, talk, shown, **hidden)
    return checkpoint


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
    path = str(checkpoint).strip()
    model = held.model(path)
    from transformers import set_seed

    from vlm.inference.conversation import Conversation

    if talk.conversation is None or talk.checkpoint != path:
        talk.conversation, talk.checkpoint = Conversation(model), path
    talk.conversation.settings = settings
    if seed is not None:
        set_seed(int(seed))
    talk.stopped = False
    answer = ""
    pieces = talk.conversation.ask(text, pictures)
    for piece in pieces:
        answer += piece
        yield answer
        if talk.stopped:
            pieces.close()
            return


def _given(name: str, value: float | None) -> float:
    """A number of a field.

    Raises:
        ValueError: the field is empty.
    """
    if value is None:
        raise ValueError(f"{name}: a number is needed")
    return value
