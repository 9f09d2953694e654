"""Retrieval of every family: losses behind a cached prompt are those of whole rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.test_families import folders, load, make_images, name, processor
from tests.families.tiny_families import TINY
from tests.logits import supervised_losses
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import encode_sample, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.evaluation.loss import replace_reply, row_losses
from vlm.evaluation.records import InferenceLosses
from vlm.evaluation.retrieval import CandidateDataset, CandidateLosses, choose_trials, make_candidate_collator
from vlm.families.processing import FamilyProcessor
from vlm.inference.generate import VisionLanguageModel
from vlm.models.text_loss import SupervisedScores

FIXTURES = folders, name, processor
"""Of the other file of this folder; pytest finds them by their names."""


@torch.no_grad()
def test_losses_behind_a_cached_prompt_are_those_of_whole_rows(
    name: str, processor: FamilyProcessor, folders: Any, tmp_path: Path
):
    """Images of different sizes, texts of different lengths, and more texts than rows of a batch."""
    records = []
    for number, caption in enumerate(("red", "two cats on a mat", "12")):
        make_images(3)[number].save(tmp_path / f"{number}.png")
        records.append({"id": str(number), "image": f"{number}.png", "caption": caption})
    (tmp_path / "captions.json").write_text(json.dumps(records))
    config = DatasetConfig(path=str(tmp_path / "captions.json"), format="caption", options={"prompt": "what?"})
    dataset = load_dataset(config, SampleEncoder(processor, 2000, truncate=False), evaluates=True)
    model: Any = load(folders(name))
    trials = choose_trials(dataset, 3, None, "")
    losses = CandidateLosses(SupervisedScores(model), 2, lambda rows: rows)
    source = InferenceLosses(VisionLanguageModel(model, processor), 2, 0)
    for trial, batch in zip(
        trials,
        source.batches(CandidateDataset(dataset, trials), "retrieval", make_candidate_collator(processor)),
        strict=True,
    ):
        expected = []
        for text in trial.texts:
            item = encode_sample(dataset.sources[0], replace_reply(dataset.sample(trial.index), text))
            row: Any = Collator.of(processor)([item])
            sums, counts = row_losses(supervised_losses(model, row), row["labels"])
            expected.append(float(sums / counts))
        assert losses(**batch).tolist() == pytest.approx(expected, abs=5e-6), TINY[name].model_type
