"""What the tests of runs that learn vectors share: their records, and overrides for tiny parts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlm.train.embeddings import vectors

WORDS = [
    "dataset.format=pair", "dataset.template=chatml", "dataset.eval_split=0.25", "trainer.max_steps=4",
    "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.logging_steps=1",
    "model.head.loss_options.widths=[8,32]", "trainer.learning_rate.language_model_learning_rate=1e-3",
]  # fmt: skip
"""Overrides for `embed-smol`."""


def write_pairs(labelled: Path, path: Path) -> list[str]:
    """Write a pair of each labelled image and what it shows; return the overrides that read them."""
    records = [
        {
            "id": record["id"], "query": {"image": record["image"]},
            "positive": f"{record['colour']} of level {record['level']}", "negatives": ["nothing"],
        }
        for record in json.loads(labelled.read_text())
    ]  # fmt: skip
    path.write_text(json.dumps(records))
    return [f"dataset.path={path}", f"dataset.image_folder={labelled.parent}"]


FEW = {"num_resamples": 5}


@contextmanager
def few_resamples() -> Iterator[None]:
    """Intervals of reports, of which only the form is looked at, from few resamples."""
    original = vectors.embedding_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "embedding_scores", lambda *given, **named: original(*given, **(named | FEW)))
        yield
