"""What is found of inputs by calling a processor on blank images and videos agrees with what was written by hand."""

import pickle

import pytest
import torch
from transformers.models.qwen2_vl import Qwen2VLProcessor

from tests.families.tiny_families import TINY, qwen
from vlm.assembly.small_models.make import make_small
from vlm.data.batching.collator import Collator
from vlm.families.derive_inputs import derive_inputs
from vlm.families.native import CallForm, NativeProcessor, ProcessorMismatchError
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES, Family, get_family

ROWS = {
    "idefics3": ("pixel_values", "pixel_attention_mask"),
    "smolvlm": ("pixel_values", "pixel_attention_mask"),
    "mllama": ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
}
TOKENS = {
    **dict.fromkeys(("qwen2-vl", "qwen2.5-vl", "qwen3-vl"), ("mm_token_type_ids",)),
    **dict.fromkeys(("paligemma", "gemma3"), ("token_type_ids",)),
    "mllama": ("cross_attention_mask",),
}
FRAMES = {
    **dict.fromkeys(("llava-next-video", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "smolvlm", "internvl"), 1),
    "qwen3-vl": 2,
}


@pytest.mark.parametrize("name", TINY)
def test_inputs_are_those_that_were_written_by_hand(name: str):
    processor = FamilyProcessor(TINY[name].processor(), FAMILIES[TINY[name].model_type])
    inputs = processor.inputs
    assert inputs.per_sample == ROWS.get(name, ())
    assert inputs.per_token == TOKENS.get(name, ())
    assert inputs.min_frames == FRAMES.get(name, 0)
    assert inputs.joined == (name in ("smolvlm", "internvl"))
    assert inputs.equal_num_frames == (name in ("llava-next-video", "llava-onevision"))
    assert inputs.dims == {}
    assert inputs.form == CallForm(inputs.form.frame)
    again = pickle.loads(pickle.dumps(processor))
    assert again.inputs == inputs or name == "paligemma" or inputs.per_token
    assert (again.per_sample_inputs, again.per_token_inputs) == (inputs.per_sample, inputs.per_token)


class Odd(Qwen2VLProcessor):
    """A processor with an input for each token that nothing here makes, and pixels of all samples in one row."""

    def __call__(self, *args: object, **options: object) -> object:
        """The outputs, with what is odd about them."""
        outputs = super().__call__(*args, **options)  # pyright: ignore[reportArgumentType]
        outputs["pixel_values"] = outputs["pixel_values"].T[None]
        if self.counts:
            outputs["positions"] = torch.arange(outputs["input_ids"].shape[1])[None]
        return outputs

    counts = False


def make_odd(*, counts: bool) -> NativeProcessor:
    """Calls of it."""
    native = qwen(Odd)
    native.counts = counts
    return NativeProcessor(native, native.image_token, CallForm(native.image_token))


def test_an_input_that_cannot_be_made_is_refused_by_name():
    with pytest.raises(ProcessorMismatchError, match="Odd makes the input positions for each token"):
        derive_inputs(make_odd(counts=True), Family("odd", videos=False))


def test_inputs_are_concatenated_along_the_dimension_that_grows():
    inputs = derive_inputs(make_odd(counts=False), Family("odd", videos=False))
    assert inputs.per_sample == ()
    assert inputs.dims == {"pixel_values": 2}
    rows = [{"input_ids": [1], "labels": [1], "pixel_values": torch.ones(1, 2, size)} for size in (3, 4)]
    batch = Collator(0, dims=inputs.dims)(rows)
    assert batch.get("pixel_values", torch.empty(0)).shape == (1, 2, 7)


def test_indices_of_rows_are_told_from_other_numbers():
    molmo2, qwen2_vl = (
        FamilyProcessor(make_small(kind).processor, get_family(kind)) for kind in ("molmo2", "qwen2_vl")
    )
    assert molmo2.row_indices == {
        "image_token_pooling": ("pixel_values", 2), "video_token_pooling": ("pixel_values_videos", 2)
    }  # fmt: skip
    assert not qwen2_vl.row_indices
