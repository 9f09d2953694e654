"""A tiny checkpoint, its export to LLaVA, and a reader of exports that runs in the tests' own process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.hub.test_exporting import saved
from tests.tiny_parts import Parts
from vlm.hub.exporting import export_checkpoint
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.verify import plain_reader
from vlm.inference.verify.reading_job import ReadingJob


class Served(NamedTuple):
    """A checkpoint, its export, and the model as training has it."""

    final: Path
    export: Path
    model: VisionLanguageModel


def make_served(parts: Parts, folder: Path, **options: object) -> Served:
    torch.manual_seed(0)
    model, processor = saved(parts, folder / "final", "clip", "llama", layer=-2, template="chatml", **options)
    export_checkpoint(str(folder / "final"), folder / "export", "llava")
    return Served(folder / "final", folder / "export", VisionLanguageModel(model, processor))


@pytest.fixture(scope="package")
def served(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """What no test changes."""
    return make_served(parts, tmp_path_factory.mktemp("served"), image_mode="pad")


@pytest.fixture
def read_here() -> Iterator[None]:
    """Exports are read in this process: another one imports torch for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ReadingJob, "_start", lambda self, job: plain_reader.observe(json.loads(job.read_text(encoding="utf-8")))
        )
        yield
