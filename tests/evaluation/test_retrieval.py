"""Retrieval: candidates that are fair, losses that are those of whole rows, and ties that are chances."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.logits import supervised_losses
from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset, encode_sample, load_dataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.processor import Processor
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.evaluation.loss import replace_reply, row_losses
from vlm.evaluation.records import InferenceLosses
from vlm.evaluation.retrieval import (
    CandidateDataset,
    CandidateLosses,
    Trial,
    _draw_others,
    _read_reply,
    choose_trials,
    make_candidate_collator,
    make_rows,
    score_own,
)
from vlm.inference.generate import VisionLanguageModel
from vlm.models import VLMForConditionalGeneration
from vlm.models.modeling_vlm import VLMOutput
from vlm.models.text_loss import SupervisedScores

CAPTIONS = ("red", "a blue square", "two cats on a mat", "12", "Red.", "a dog", "red stone")
"""Two that are the same text but for case and a full stop, and one that goes on where another ends."""

MakeData = Callable[..., SampleDataset]


@pytest.fixture
def make_data(parts: Parts, tmp_path: Path) -> MakeData:
    """`make_data(records)`: the samples of LLaVA-like records; images are drawn by their numbers."""

    def make(records: list[dict[str, Any]], processor: Processor | None = None, longest: int = 200) -> SampleDataset:
        for record in records:
            for name in [record.get("image", [])] if isinstance(record.get("image"), str) else record.get("image", []):
                picture(int(name.removesuffix(".png"))).save(tmp_path / name)
        (tmp_path / "records.json").write_text(json.dumps(records))
        config = DatasetConfig(path=str(tmp_path / "records.json"))
        encoder = SampleEncoder(processor or parts.processor(), longest, truncate=False)
        return load_dataset(config, encoder, evaluates=True)

    return make


def make_record(number: int, *replies: str, image: int | None = -1, **more: Any) -> dict[str, Any]:
    """A record with these replies; its image has its own number, another, or there is none."""
    turns = []
    for place, reply in enumerate(replies):
        mark = "<image>\n" if place == 0 and image is not None else ""
        turns += [{"from": "human", "value": f"{mark}what?"}, {"from": "gpt", "value": reply}]
    images = {} if image is None else {"image": f"{number if image == -1 else image}.png"}
    return {"id": str(number), **images, "conversations": turns, **more}


@pytest.fixture
def captioned(make_data: MakeData) -> SampleDataset:
    return make_data([make_record(number, caption) for number, caption in enumerate(CAPTIONS)])


def make_ready(parts: Parts, seed: int = 0) -> VisionLanguageModel:
    """A model with random weights that depends on its images."""
    model, processor = parts.model(seed=seed)
    with torch.no_grad():
        for weight in model.connector.parameters():
            weight.mul_(5)
    return VisionLanguageModel(model.eval(), processor)


def compute(ready: VisionLanguageModel, dataset: SampleDataset, trials: list[Trial], max_rows: int = 3) -> torch.Tensor:
    """The losses of all candidates: `(trials, N)`."""
    losses = CandidateLosses(SupervisedScores(ready.model), max_rows, lambda rows: rows)
    collate = make_candidate_collator(ready.processor)
    batches = InferenceLosses(ready, 1, 0).batches(CandidateDataset(dataset, trials), "retrieval", collate)
    return torch.stack([losses(**batch) for batch in batches])


@torch.no_grad()
def compute_literally(ready: VisionLanguageModel, dataset: SampleDataset, trials: list[Trial]) -> torch.Tensor:
    """The same, one whole row after the other."""
    rows = []
    for trial in trials:
        sample, source = dataset.sample(trial.index), dataset.sources[0]
        row = []
        for text in trial.texts:
            batch: Any = Collator.of(ready.processor)([encode_sample(source, replace_reply(sample, text))])
            batch["pixel_values"] = ready.processor.normalise(batch["pixel_values"])
            sums, counts = row_losses(supervised_losses(ready.model, batch), batch["labels"])
            row.append(float(sums / counts))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_losses_are_those_of_whole_rows(parts: Parts, captioned: SampleDataset, max_rows: int):
    ready = make_ready(parts)
    trials = choose_trials(captioned, 5, None, "")
    assert len(trials) == len(CAPTIONS)
    losses, expected = compute(ready, captioned, trials, max_rows), compute_literally(ready, captioned, trials)
    assert torch.allclose(losses, expected, atol=2e-6, rtol=0)
    assert np.array_equal(score_own(losses), (expected.argmin(dim=1) == 0).double().numpy())


def test_each_image_is_encoded_once(parts: Parts, captioned: SampleDataset, monkeypatch: pytest.MonkeyPatch):
    """And for the first one, whose text is read in one pass and with which the head is proved, its features serve."""
    ready = make_ready(parts)
    encoded: list[int] = []
    encode = VLMForConditionalGeneration.encode_images
    monkeypatch.setattr(
        VLMForConditionalGeneration, "encode_images",
        lambda model, pixels: (encoded.append(len(pixels)), encode(model, pixels))[1],
    )  # fmt: skip
    for feature_cache in (None, VisionLanguageModel(ready.model, ready.processor).feature_cache):
        ready.feature_cache = feature_cache
        encoded.clear()
        compute(ready, captioned, choose_trials(captioned, 4, None, ""))
        assert sum(encoded) == len(CAPTIONS) + 2


def test_a_model_that_sees_nothing_finds_by_chance(parts: Parts, captioned: SampleDataset):
    """All candidates have the same loss up to rounding, whatever their lengths."""
    ready = make_ready(parts)
    ready.model.get_output_embeddings().weight.data.zero_()
    losses = compute(ready, captioned, choose_trials(captioned, 5, None, ""))
    assert len({float(loss) for loss in losses.flatten()}) > 1, "rounded differently"
    assert score_own(losses).tolist() == [0.2] * len(CAPTIONS)


def test_ties_are_chances():
    losses = torch.tensor([
        [1.0, 2.0, 3.0],
        [1.0, 1.0, 3.0],
        [1.0, 1.0, 1.0],
        [2.0, 1.0, 2.0],
        [1.0, 1.0 - 1e-8, 2.0],
        [float("nan"), 1.0, 2.0],
    ], dtype=torch.float64)  # fmt: skip
    assert score_own(losses).tolist() == [1, 1 / 2, pytest.approx(1 / 3), 0, 1 / 2, 0]


def test_rows_tell_what_was_preferred(captioned: SampleDataset):
    """All texts, the likeliest first; files have them as lines."""
    trial = Trial(1, ("own", "b", "c"))
    losses = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)
    (row,) = make_rows(captioned, [trial], losses, score_own(losses))
    assert (row["source"], row["text"], row["found"]) == ("1", "own", 0.0)
    assert row["texts"] == [{"loss": loss, "text": text} for loss, text in ((0.5, "b"), (1.0, "own"), (2.0, "c"))]
    assert json.loads(json.dumps(row)) == row


def test_candidates_are_different_and_none_is_right_too(captioned: SampleDataset):
    for trial in choose_trials(captioned, 6, None, ""):
        texts = [text.lower().rstrip(".") for text in trial.texts]
        assert texts[0] == CAPTIONS[trial.index].lower().rstrip(".")
        assert len(set(texts)) == 6


def test_texts_that_are_right_for_the_same_image_are_no_candidates(make_data: MakeData):
    """Replies of other records with this image, and a record's own references."""
    records = [
        make_record(0, "a dog"), make_record(1, "a puppy", image=0), make_record(2, "a cat", answers=["a kitten"]),
        make_record(3, "a kitten"), make_record(4, "a cow"), make_record(5, "a hen"),
    ]  # fmt: skip
    trials = {trial.index: set(trial.texts) for trial in choose_trials(make_data(records), 4, None, "")}
    assert "a puppy" not in trials[0]
    assert "a dog" not in trials[1]
    assert "a kitten" not in trials[2]
    assert trials[2] == {"a cat"} | trials[2] & {"a dog", "a puppy", "a cow", "a hen"}


def test_drawing_depends_on_the_records_alone(captioned: SampleDataset):
    whole = choose_trials(captioned, 4, None, "")
    assert choose_trials(captioned, 4, None, "") == whole
    assert choose_trials(captioned, 4, 3, "") == whole[:3]
    others = [frozenset(trial.texts[1:]) for trial in whole]
    assert len(set(others)) > 1, "each has candidates of its own"


def test_candidates_are_drawn_evenly():
    """Each text that may be one, as often as the others; those that are right never."""
    pool = [(f"t{number}", f"T{number}") for number in range(10)]
    counts = Counter(text for index in range(2000) for text in _draw_others(index, pool, frozenset(["t0", "t9"]), 3))
    assert set(counts) == {f"T{number}" for number in range(1, 9)}
    assert all(counts[text] == pytest.approx(2000 * 3 / 8, rel=0.15) for text in counts)
    assert len(_draw_others(0, pool, frozenset(["t0", "t9"]), 9)) == 8, "no more than there are"


def test_samples_without_images_or_without_a_text_are_left_out(make_data: MakeData):
    records = [make_record(number, f"thing {number}", image=None if number == 1 else -1) for number in range(4)]
    records.append(make_record(4, "."))
    trials = choose_trials(make_data(records), 3, None, "")
    assert [trial.index for trial in trials] == [0, 2, 3]
    assert all("thing 1" not in trial.texts for trial in trials)


def test_what_cannot_be_compared_is_refused(make_data: MakeData):
    with pytest.raises(ValueError, match=r"none of the 2 records shows an image .* reply of text.*; do otherwise"):
        choose_trials(
            make_data([make_record(number, "yes", image=None) for number in range(2)]), 2, None, "do otherwise"
        )
    few = make_data([make_record(0, "yes"), make_record(1, "no"), make_record(2, "No.")])
    assert len(choose_trials(few, 2, None, "")) == 3
    with pytest.raises(
        ValueError, match=r"3 different texts are needed, and for record '0' there are 2 .*do otherwise"
    ):
        choose_trials(few, 3, None, "do otherwise")


def test_only_the_last_reply_counts(parts: Parts, make_data: MakeData):
    """Earlier replies stand in the prompt; a candidate's loss is that of its own tokens."""
    data = make_data([make_record(number, "it is a thing", f"thing {number}" * (number + 1)) for number in range(3)])
    ready = make_ready(parts)
    trials = choose_trials(data, 3, None, "")
    for trial, losses in zip(trials, compute(ready, data, trials), strict=True):
        for text, loss in zip(trial.texts, losses.tolist(), strict=True):
            batch: Any = Collator.of(ready.processor)(
                [encode_sample(data.sources[0], replace_reply(data.sample(trial.index), text))]
            )
            batch["pixel_values"] = ready.processor.normalise(batch["pixel_values"])
            row = batch["labels"][0]
            supervised = (row != IGNORE_INDEX).nonzero().flatten()
            first = int(supervised[(supervised.diff() > 1).nonzero().max() + 1])
            row[:first] = IGNORE_INDEX
            with torch.no_grad():
                sums, counts = row_losses(supervised_losses(ready.model, batch), batch["labels"])
            assert loss == pytest.approx(float(sums / counts), abs=2e-6)


def test_a_candidate_that_does_not_fit_is_cut(parts: Parts, make_data: MakeData):
    data = make_data([make_record(0, "a" * 60), make_record(1, "a cat"), make_record(2, "a dog")])
    longest = int(data.lengths[1:].max()) + 4
    short = replace(data.sources[0].encoder, longest=longest)
    data.sources[0].encoder = short
    ready = make_ready(parts)
    trials = choose_trials(data, 3, None, "")[1:]
    items = [CandidateDataset(data, trials)[number] for number in range(2)]
    for prompt, *rows in items:
        assert max(len(prompt["input_ids"]) + len(row["input_ids"]) for row in rows) == longest
    assert compute(ready, data, trials).isfinite().all()


def test_a_reply_that_is_cut_off_whole_is_left_out(parts: Parts, make_data: MakeData, caplog: pytest.LogCaptureFixture):
    """Its candidates would all be the same earlier reply, each found with a chance of 1 / N."""
    data = make_data([make_record(0, "a" * 60, "not seen"), make_record(1, "a cat"), make_record(2, "a dog")])
    longest = int(data.lengths[1:].max()) + 4
    data.sources[0].encoder = replace(data.sources[0].encoder, longest=longest, truncate=True)
    with caplog.at_level("INFO", logger="vlm"):
        trials = choose_trials(data, 3, None, "")
    assert [trial.index for trial in trials] == [1, 2]
    assert "retrieval: 1 records are left out, whose last reply is cut off whole" in caplog.text
    assert [trial.index for trial in choose_trials(data, 3, 1, "")] == [1]
    data.sources[0].encoder = replace(data.sources[0].encoder, longest=8)
    with pytest.raises(
        ValueError, match=r"of all 3 records with images are cut off whole .*; raise dataset.max_length"
    ):
        choose_trials(data, 3, None, "lower it")


def test_an_image_that_is_gone_is_told(captioned: SampleDataset, parts: Parts):
    trials = choose_trials(captioned, 3, None, "")
    path = captioned.sample(1).images[0].path
    assert path is not None
    path.unlink()
    with pytest.raises(ValueError, match=r"record '1': image .*1\.png"):
        compute(make_ready(parts), captioned, trials)


class BrokenCache:
    """A model that misreads what stands in the cache, or returns none."""

    def __init__(self, model: Any, *, has_cache: bool):
        self.model, self.has_cache, self.config = model, has_cache, model.config
        self.get_output_embeddings = model.get_output_embeddings

    def __call__(self, past_key_values: Any = None, **inputs: Any):
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.values = layer.values * -1000
        output = self.model(past_key_values=past_key_values, **inputs)
        return output if self.has_cache else VLMOutput(logits=output.logits)


def test_a_model_that_does_not_continue_from_a_prompt_is_refused(parts: Parts, captioned: SampleDataset):
    ready = make_ready(parts)
    trials = choose_trials(captioned, 3, None, "")
    batches = InferenceLosses(ready, 1, 0).batches(
        CandidateDataset(captioned, trials), "retrieval", make_candidate_collator(ready.processor)
    )
    batch = next(batches)

    def make_losses(model: Any) -> CandidateLosses:
        return CandidateLosses(SupervisedScores(model), 3, lambda rows: rows)

    with pytest.raises(ValueError, match=r"behind a cached prompt llama gives a text the loss .*, in one pass"):
        make_losses(BrokenCache(ready.model, has_cache=True))(**batch)
    with pytest.raises(ValueError, match="llama returns no cache of keys and values"):
        make_losses(BrokenCache(ready.model, has_cache=False))(**batch)


def test_images_within_a_table_are_compared_by_their_content():
    """Two records that hold the same bytes show the same image."""

    def encode(colour: str) -> bytes:
        buffer = BytesIO()
        Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
        return buffer.getvalue()

    def read(colour: str):
        turns = Turn("user", (ImageRef(content=encode(colour)), "what?")), Turn("assistant", ("a cat",))
        reply = _read_reply(0, Sample("x", turns))
        assert reply is not None
        return reply.media

    assert read("red") == read("red") != read("blue")


def test_a_reply_that_is_not_supervised_is_left_out():
    """It may be a wrong one."""
    question = Turn("user", (ImageRef(Path("a.png")), "what?"))
    assert _read_reply(0, Sample("x", (question, Turn("assistant", ("a cat",)))))
    assert _read_reply(0, Sample("x", (question, Turn("assistant", ("a cat",), supervised=False)))) is None
