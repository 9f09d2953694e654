"""Metrics of losses: each of the table is computed on one rank and on two, which share the samples."""

import copy
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.test_retrieval import make_record
from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.processor import Processor
from vlm.evaluation.bootstrap import flatten_scores, mean_score
from vlm.evaluation.loss_metrics import LOSS_METRICS, Collate, LossMetricSettings
from vlm.evaluation.records import InferenceLosses
from vlm.evaluation.retrieval import score_own
from vlm.inference.generate import VisionLanguageModel, on_device
from vlm.models.text_loss import SupervisedScores

SETTINGS = LossMetricSettings(retrieval_candidates=3, max_samples=None, advice="")


@pytest.fixture
def data(parts: Parts, tmp_path: Path) -> SampleDataset:
    """Ten images with texts of different lengths, and a record without an image."""
    records = [make_record(number, f"a thing {number} " * (1 + number % 3)) for number in range(10)]
    records.insert(2, make_record(19, "no image here", image=None))
    for number in range(10):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "records.json").write_text(json.dumps(records))
    config = DatasetConfig(path=str(tmp_path / "records.json"))
    return load_dataset(config, SampleEncoder(parts.processor(), 200, truncate=False), evaluates=True)


class Ranks:
    """Lets two threads, each a rank, exchange tensors as collective operations do."""

    def __init__(self):
        self.barrier, self.sent = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def gather(self, rank: int, tensor: Tensor) -> Tensor:
        self.sent[rank] = tensor
        self.barrier.wait()
        both = torch.cat(self.sent)
        self.barrier.wait()
        return both


@dataclass
class RankLosses:
    """A `LossSource` of one of two ranks: batches by turns, the last ones filled up from the beginning."""

    compute_losses: SupervisedScores
    processor: Processor
    rank: int
    ranks: Ranks
    batch_size: int = 2
    num_batches: list[int] = field(default_factory=list)
    num_rows: int | None = None

    def batches(self, dataset: Any, title: str, collate: Collate | None = None) -> Iterator[dict[str, Any]]:
        size = self.batch_size if collate is None else 1
        steps = -(-len(dataset) // (2 * size))
        self.num_batches.append(steps)
        for step in range(steps):
            self.num_rows = len(dataset) - 2 * size * step if step == steps - 1 else None
            first = (2 * step + self.rank) * size
            items = [dataset[number % len(dataset)] for number in range(first, first + size)]
            if collate is None:
                yield self.prepare(Collator.of(self.processor)(items))
            else:
                yield {name: self.prepare(part) for name, part in collate(items).items()}

    def prepare(self, batch: Any) -> dict[str, Tensor]:
        return {**on_device(batch, self.processor, torch.device("cpu")), "labels": batch["labels"]}

    def gather(self, tensor: Tensor) -> Tensor:
        return self.ranks.gather(self.rank, tensor)[: self.num_rows]


@pytest.mark.parametrize("name", LOSS_METRICS)
def test_two_ranks_find_what_one_finds(parts: Parts, data: SampleDataset, name: str):
    model, processor = parts.model()
    ready = VisionLanguageModel(model.eval(), processor)
    metric = LOSS_METRICS[name](data, SETTINGS)
    single = metric.compute(data, InferenceLosses(ready, 4, 0)).scores
    ranks = Ranks()
    models = [copy.deepcopy(ready.model) for _ in range(2)]
    sources = [RankLosses(SupervisedScores(own), processor, rank, ranks) for rank, own in enumerate(models)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda source: metric.compute(data, source).scores, sources))
    assert both[0] == both[1]
    assert sources[0].num_batches == sources[1].num_batches
    assert flatten_scores(both[0]) == pytest.approx(flatten_scores(single), abs=1e-5)
    assert f"{name}_ci95" in flatten_scores(single)


def test_retrieval_has_the_interval_of_a_mean_and_chance(parts: Parts, data: SampleDataset, monkeypatch: Any):
    """The percentile bootstrap of what each image scores."""
    found: list[Any] = []
    monkeypatch.setattr(
        "vlm.evaluation.loss_metrics.score_own", lambda losses: (found.append(score_own(losses)), found[-1])[1]
    )
    model, processor = parts.model()
    metric = LOSS_METRICS["retrieval"](data, SETTINGS)
    assert metric.num_samples == 10
    scores = metric.compute(data, InferenceLosses(VisionLanguageModel(model.eval(), processor), 4, 0)).scores
    assert scores["retrieval"] == mean_score(found[0], 1000)
    assert scores["retrieval"].value == found[0].mean()
    assert scores["retrieval_chance"].value == pytest.approx(1 / 3)
    assert flatten_scores(scores).keys() <= {"retrieval", "retrieval_ci95", "retrieval_chance"}


def test_only_so_many_samples_are_measured(data: SampleDataset):
    assert LOSS_METRICS["retrieval"](data, LossMetricSettings(3, 2, "")).num_samples == 2
