"""Answers of rows that join and leave a batch are those of each alone, for every kind of model and cache."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.assembly import test_language_models as unusual
from tests.families.tiny_families import TINY, save_family
from tests.inference.engine.asking import QUESTIONS, Question, answer_alone, ask_all, ids_of, running, text_of
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts
from vlm.inference.engine.batch import DecodingBatch
from vlm.inference.generate import VisionLanguageModel

QUICK = ("qwen2-vl", "gemma3", "mllama", "recurrent_gemma")
"""Positions in three directions, a sliding window, cross-attention, a state within the model's modules."""
ALONE = ("mllama",)
"""Families whose rows cannot share a pass."""


def liven(model: VisionLanguageModel) -> VisionLanguageModel:
    """Scale random weights, so that answers depend on what is asked."""
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.ndim > 1 and "vis" not in name:
                parameter.mul_(6)
    return model


def check_as_alone(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare all answers; return the largest number of rows of a step."""
    sizes: list[int] = []
    step = DecodingBatch.step
    monkeypatch.setattr(DecodingBatch, "step", lambda batch: (sizes.append(len(batch.rows)), step(batch)))
    expected = [answer_alone(model, question) for question in QUESTIONS]
    assert len({tuple(ids) for ids, _ in expected}) == len(QUESTIONS)  # or the test would prove little
    with running(model) as engine:
        answers = ask_all(engine, QUESTIONS)
    for answer, question, (ids, text) in zip(answers, QUESTIONS, expected, strict=True):
        assert ids_of(answer) == ids
        assert text_of(answer) == text
        assert answer[-1].finish_reason == ("length" if len(ids) == question.max_new_tokens else "stop")
        assert all(piece.finish_reason is None for piece in answer[:-1])
    return max(sizes)


@pytest.mark.parametrize("language_model", ["llama", "qwen2", "gemma3"])
def test_composed_models_answer_together_as_alone(parts: Parts, monkeypatch: pytest.MonkeyPatch, language_model: str):
    assert check_as_alone(make_random_model(parts, language_model), monkeypatch) > 1


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_families_answer_together_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    save_family(name, tmp_path)
    model = liven(VisionLanguageModel.load(tmp_path, device="cpu", dtype="float32"))
    assert (check_as_alone(model, monkeypatch) > 1) == (name not in ALONE)


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in unusual.UNUSUAL]
)
def test_unusual_language_models_answer_together_as_alone(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    model = liven(unusual.build(parts, unusual.save(tmp_path, kind)))
    assert (check_as_alone(model, monkeypatch) > 1) == (kind not in ("minimax", "recurrent_gemma"))


def test_a_longer_row_that_leaves_takes_its_padding_along(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    widths: list[tuple[int, int]] = []
    step: Callable[[DecodingBatch], None] = DecodingBatch.step

    def note(batch: DecodingBatch) -> None:
        step(batch)
        if batch.rows:
            widths.append((batch.ids.shape[1], max(row.length for row in batch.rows)))

    monkeypatch.setattr(DecodingBatch, "step", note)
    long, short = Question(QUESTIONS[1].text, (1,), 4), Question("what?", (), 12)
    with running(make_random_model(parts, "llama")) as engine:
        no_end = dict.fromkeys(engine.constraints.ends, -1e9)
        ask_all(engine, [long, short], logit_bias=no_end)
    assert all(width == longest for width, longest in widths)
    assert any(later < earlier for (earlier, _), (later, _) in pairwise(widths))
