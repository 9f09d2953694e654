"""The engine: seeds, cancellation, failures of single rows and of whole steps, and its end."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from threading import Event
from typing import Any

import pytest
import torch

from tests.inference.engine.asking import (
    QUESTIONS,
    Question,
    answer_alone,
    ask,
    ask_all,
    ids_of,
    prepare,
    running,
    text_of,
)
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts
from tests.waiting import HANG, wait_until
from vlm.inference.engine.batch import DecodingBatch
from vlm.inference.engine.engine import Engine
from vlm.inference.engine.options import SamplingOptions
from vlm.inference.generate import VisionLanguageModel

LONG = Question("say", (), 80)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(scope="module")
def model(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


@pytest.fixture(scope="module")
def engine(model: VisionLanguageModel) -> Iterator[Engine]:
    with running(model) as engine:
        yield engine


class Gate:
    """Holds the engine's thread before a step that a condition holds for, until the gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, condition: Callable[[DecodingBatch], bool]):
        self.opened = Event()
        step = DecodingBatch.step

        def wait(batch: DecodingBatch) -> None:
            if condition(batch):
                assert self.opened.wait(HANG)
            step(batch)

        monkeypatch.setattr(DecodingBatch, "step", wait)


def test_a_seed_gives_the_same_answer_alone_and_among_others(engine: Engine):
    sampling = {"temperature": 1.5, "top_p": 0.95}
    alone = ids_of(ask_all(engine, QUESTIONS[1:2], **sampling, seed=7)[0])

    async def among_others() -> list[list[int]]:
        first = asyncio.gather(*(ask(engine, question, **sampling, seed=None) for question in QUESTIONS))
        seeded = await asyncio.gather(*(ask(engine, QUESTIONS[1], **sampling, seed=seed) for seed in (7, 8, 7)))
        await first
        return [ids_of(pieces) for pieces in seeded]

    first, other, second = asyncio.run(among_others())
    assert first == second == alone != other


def test_rows_with_other_settings_do_not_change_a_greedy_answer(model: VisionLanguageModel, engine: Engine):
    expected, _ = answer_alone(model, QUESTIONS[1])

    async def mixed() -> list[int]:
        options: list[dict[str, Any]] = [
            {"temperature": 2.0}, {"frequency_penalty": 1.5, "logit_bias": {65: 50.0}}, {"top_logprobs": 2},
        ]  # fmt: skip
        others = [ask(engine, QUESTIONS[0], max_new_tokens=30, **wanted) for wanted in options]
        answers = await asyncio.gather(ask(engine, QUESTIONS[1]), *others)
        return ids_of(answers[0])

    assert asyncio.run(mixed()) == expected


def test_a_short_answer_comes_back_before_a_long_one_and_a_new_question_does_not_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    ended: list[str] = []
    gate = Gate(monkeypatch, lambda batch: any(len(row.answer) == 60 for row in batch.rows))

    async def note(name: str, tokens: int) -> None:
        await ask(engine, LONG, max_new_tokens=tokens, logit_bias=no_end(engine))
        ended.append(name)

    async def main() -> None:
        long = asyncio.create_task(note("long", 120))
        await asyncio.gather(*(note(name, 3) for name in ("a", "b", "c", "d", "e", "f")))
        late = asyncio.create_task(note("late", 2))
        while engine.num_running + engine.num_waiting < 2:
            await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(long, late)

    asyncio.run(main())
    assert sorted(ended[:6]) == ["a", "b", "c", "d", "e", "f"]
    assert ended[6:] == ["late", "long"]


def no_end(engine: Engine) -> dict[int, float]:
    """A bias with which no answer ends before its tokens are used up."""
    return dict.fromkeys(engine.constraints.ends, -1e9)


def test_a_closed_generator_frees_its_row(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch, lambda batch: len(batch.rows[0].answer) >= 20)

    async def leave() -> None:
        pieces = engine.generate(prepare(engine, LONG), SamplingOptions(300, logit_bias=no_end(engine)))
        async with aclosing(pieces):
            async for _ in pieces:
                assert engine.num_running == 1
                break

    asyncio.run(leave())
    gate.opened.set()
    wait_until(lambda: engine.num_running == 0)


def test_a_cancelled_task_leaves_the_queue_and_the_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch, lambda batch: len(batch.rows) == 4)

    async def leave() -> None:
        tasks = [asyncio.create_task(ask(engine, LONG, max_new_tokens=300, logit_bias=no_end(engine)))
                 for _ in range(6)]  # fmt: skip
        while engine.num_running < 4 or engine.num_waiting < 2:
            await asyncio.sleep(0)
        for task in reversed(tasks):
            task.cancel()
        assert all(isinstance(result, asyncio.CancelledError)
                   for result in await asyncio.gather(*tasks, return_exceptions=True))  # fmt: skip
        assert engine.num_waiting == 0

    asyncio.run(leave())
    gate.opened.set()
    wait_until(lambda: engine.num_running == 0)
    assert ids_of(ask_all(engine, QUESTIONS[:1])[0])


def test_an_answer_ends_at_a_stop_string_over_several_tokens(model: VisionLanguageModel, engine: Engine):
    _, whole = answer_alone(model, QUESTIONS[1])
    stop = whole[len(whole) // 2 :][:4]
    pieces = ask_all(engine, QUESTIONS[1:2], stop=(stop, "never to be seen"))[0]
    assert text_of(pieces) == whole[: whole.index(stop)].strip()
    assert pieces[-1].finish_reason == "stop"
    assert len(ids_of(pieces)) < QUESTIONS[1].max_new_tokens


def test_a_row_that_fails_ends_alone(model: VisionLanguageModel, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    expected = [ids for ids, _ in (answer_alone(model, question) for question in QUESTIONS)]
    broken = engine.constraints.lark('start: "yes" | "no"')

    def fail(self: object, token: int) -> bool:
        raise ValueError("the answer cannot keep to it")

    monkeypatch.setattr("vlm.inference.engine.constraints.ConstraintProcessor.accept", fail)

    async def main() -> tuple[Any, ...]:
        failing = ask(engine, LONG, constraint=broken)
        return await asyncio.gather(failing, *(ask(engine, q) for q in QUESTIONS), return_exceptions=True)

    failed, *answers = asyncio.run(main())
    assert isinstance(failed, ValueError)
    assert [ids_of(answer) for answer in answers] == expected


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("a kernel failed")])
def test_a_step_that_fails_is_tried_again_in_halves(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """No answer changes, though its rows run their prompts again in its middle."""
    expected = [ids for ids, _ in (answer_alone(model, question) for question in QUESTIONS)]
    sizes: list[int] = []
    step = DecodingBatch.step

    def fail(batch: DecodingBatch) -> None:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 2:
            raise error
        step(batch)

    monkeypatch.setattr(DecodingBatch, "step", fail)
    with running(model) as engine:
        assert [ids_of(pieces) for pieces in ask_all(engine, QUESTIONS)] == expected
    assert {1, 2, 3} <= set(sizes)


def test_a_row_that_exceeds_the_memory_alone_ends_with_the_error(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
):
    expected, _ = answer_alone(model, QUESTIONS[0])
    step = DecodingBatch.step

    def fail(batch: DecodingBatch) -> None:
        if any(row.options.max_new_tokens == LONG.max_new_tokens for row in batch.rows):
            raise OUT_OF_MEMORY
        step(batch)

    monkeypatch.setattr(DecodingBatch, "step", fail)

    async def main(engine: Engine) -> tuple[Any, ...]:
        asked = [ask(engine, question) for question in (QUESTIONS[0], LONG, QUESTIONS[0])]
        return await asyncio.gather(*asked, return_exceptions=True)

    with running(model) as engine:
        first, long, last = asyncio.run(main(engine))
    assert isinstance(long, torch.OutOfMemoryError)
    assert ids_of(first) == ids_of(last) == expected


def test_an_answer_that_keeps_to_a_grammar(engine: Engine):
    constraint = engine.constraints.lark('start: "yes" | "no"')
    pieces = ask_all(engine, QUESTIONS[:3], constraint=constraint)
    assert all(text_of(answer) in ("yes", "no") for answer in pieces)
    assert all(answer[-1].finish_reason == "stop" for answer in pieces)


def test_what_does_not_fit_the_model_is_refused(engine: Engine):
    for options, words in (
        ({"max_new_tokens": 10**9}, "the model reads at most"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias: 1000000 is not a token id"),
        ({"temperature": -1}, "temperature=-1: 0, or from 0.001 on, is needed"),
        ({"top_p": 0}, "top_p=0"),
        ({"stop": ("",)}, "stop="),
    ):
        with pytest.raises(ValueError, match=words):
            ask_all(engine, QUESTIONS[:1], **options)
    with pytest.raises(ValueError, match=r"tokens .* but the model reads at most"):
        prepare(engine, Question("word " * 4000))
    with pytest.raises(ValueError, match="max_batch=0"):
        Engine(engine.model, 0)


def test_closing_ends_every_answer(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(model, 2)
    gate = Gate(monkeypatch, lambda batch: len(batch.rows) == 2)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(ask(engine, LONG, max_new_tokens=300, logit_bias=no_end(engine)))
                 for _ in range(3)]  # fmt: skip
        while engine.num_running < 2:
            await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while not engine._is_closed:
            await asyncio.sleep(0)
        gate.opened.set()
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(error) for error in asyncio.run(main())] == ["the engine is closed"] * 3
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        ask_all(engine, QUESTIONS[:1])


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: object, batch: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(Engine, "_step", fail)
    with running(model) as engine, pytest.raises(KeyError, match="a fault"):
        ask_all(engine, QUESTIONS[:1])
    with pytest.raises(RuntimeError, match="the engine is closed"):
        ask_all(engine, QUESTIONS[:1])
