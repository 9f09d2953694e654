"""`dataset.max_image_tokens` on every proved type: no image takes more, or the number is refused with the least.

The processors are those of the small models on which types are proved, with the options of their classes.
"""

import re
from contextlib import suppress

import pytest
from transformers import PreTrainedConfig

from vlm.assembly.image_budget import limit_image_tokens
from vlm.assembly.small_models.make import make_small
from vlm.data.encoding.processor_errors import ProcessorRefusalError
from vlm.families.processing import FamilyProcessor
from vlm.families.proved import UNKNOWN, read_proved
from vlm.families.table import get_family

PROVED = read_proved()
TYPES = [name for name in PROVED.types if PROVED.summarise(name) not in ("none", UNKNOWN)]
SIZES = [(480, 640), (900, 100), (64, 64), (300, 1200), (1000, 1000)]
"""Heights and widths."""


def count_tokens(processor: FamilyProcessor, size: tuple[int, int]) -> int:
    """The ids that the processor writes for an image, with those that it puts around it."""
    before = len(processor.tokenize("", (), ())[0])
    return len(processor.tokenize(processor.image_token, (), [size])[0]) - before


def refusal(processor: FamilyProcessor, budget: int) -> str:
    """Limit the tokens of an image; the message where that is refused, else nothing."""
    try:
        limit_image_tokens(processor, PreTrainedConfig(), budget)
    except ValueError as error:
        return str(error)
    return ""


def test_types_are_those_of_the_table():
    assert len(TYPES) > 50


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_no_image_takes_more_than_the_budget(model_type: str):
    made = make_small(model_type)
    processor = FamilyProcessor(made.processor, get_family(model_type))
    counts = [count_tokens(processor, size) for size in SIZES]
    budget = max(max(counts) // 2, 1)
    if problem := refusal(processor, budget):
        least = r"\w+ needs at least (\d+) tokens per image; give (\d+) or more, or null"
        found = re.fullmatch(rf"dataset.max_image_tokens={budget}: {least}", problem)
        assert found is not None, problem
        assert found[1] == found[2]
        assert [count_tokens(processor, size) for size in SIZES] == counts, "a refusal changes nothing"
        budget = int(found[1])
        assert not refusal(processor, budget)
    for size in SIZES:
        with suppress(ProcessorRefusalError):  # an image whose sides are too unequal, with its number of tokens
            assert 0 < count_tokens(processor, size) <= budget, size
