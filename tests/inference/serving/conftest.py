"""What the tests of the endpoint share: one small model."""

import pytest

from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts
from vlm.inference.generate import VisionLanguageModel


@pytest.fixture(scope="session")
def model(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")
