"""The Protocol of processors. basedpyright holds both implementations against its types in `families.processing`."""

import inspect

import pytest
from transformers import PreTrainedTokenizerFast

from tests.families.tiny_families import TINY
from tests.tiny_parts import Parts
from vlm.data.processor import Processor, VideoSupport
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES


def declared_names(protocol: type) -> set[str]:
    """The public attributes and methods of a Protocol."""
    return {name for name in {*vars(protocol), *inspect.get_annotations(protocol)} if not name.startswith("_")}


def check_processor(processor: Processor) -> None:
    missing = [name for name in declared_names(Processor) if not hasattr(processor, name)]
    assert not missing
    if processor.videos is None:
        assert (processor.video_token, processor.video_token_id) == (None, None)
        assert not processor.encodes_videos_separately
    else:
        assert not [name for name in declared_names(VideoSupport) if not hasattr(processor.videos, name)]
        assert processor.videos.min_frames(8) >= len(processor.videos.minimal_clip.frames) > 0
        assert isinstance(processor.video_token, str)
        assert isinstance(processor.video_token_id, int)
    assert isinstance(processor.tokenizer, PreTrainedTokenizerFast)
    assert processor.image_token_id in processor.image_token_ids()


def test_the_protocol_declares_what_is_used():
    assert {"tokenizer", "image_token_id", "videos", "tokenize", "image_inputs", "normalise"} < declared_names(
        Processor
    )


def test_the_processor_of_composed_models_satisfies_it(parts: Parts):
    check_processor(parts.processor())


@pytest.mark.parametrize("name", TINY)
def test_the_processor_of_families_satisfies_it(name: str):
    check_processor(FamilyProcessor(TINY[name].processor(), FAMILIES[TINY[name].model_type]))
