"""One preflight of a tiny run, shared by the tests of its pieces."""

import pytest

from tests.fixtures import compose_config
from vlm.config.schema import RunConfig
from vlm.train.preflight.findings import Findings
from vlm.train.preflight.inspect import inspect_run

WORDS = ("trainer.packing=true", "trainer.learning_rate.language_model_learning_rate=1e-3", "trainer.num_samples=0")


@pytest.fixture(scope="session")
def config(common: list[str]) -> RunConfig:
    """The configuration of a tiny second stage, on purpose from a random connector."""
    return compose_config("finetune-smol", [*common, *WORDS])


@pytest.fixture(scope="session")
def findings(config: RunConfig) -> Findings:
    """What a preflight of it finds."""
    return inspect_run(config, "finetune-smol")
