"""`model.processor`: what each family's classes take, the refusals, and that it is saved and seen."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedConfig

from tests.families.tiny_families import TINY, save_family
from tests.fixtures import compose_config
from vlm.assembly.processor_options import (
    apply_processor_options,
    check_no_processor_options,
    describe_options,
    describe_processor,
)
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES

EXPECTED = {
    "llava-1.5": set(),
    "llava-next": {"image_grid_pinpoints"},
    "llava-onevision": {"image_grid_pinpoints"},
    "qwen2.5-vl": {"size.longest_edge", "size.shortest_edge", "video.size.longest_edge", "video.size.shortest_edge"},
    "idefics3": {"size.longest_edge", "do_image_splitting"},
    "smolvlm": {"size.longest_edge", "do_image_splitting", "video.size.longest_edge"},
    "internvl": {"max_patches", "min_patches"},
    "phi4-multimodal": {"dynamic_hd"},
    "mllama": set(),
    "gemma3": set(),
}
"""Row of `TINY` -> options that change sizes or numbers of tokens."""
OF_COLOURS = {"do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample"}


def make_processor(name: str) -> FamilyProcessor:
    return FamilyProcessor(TINY[name].processor(), FAMILIES[TINY[name].model_type])


def apply(name: str, **options: object) -> FamilyProcessor:
    """A row's processor with options."""
    processor = make_processor(name)
    apply_processor_options(processor, PreTrainedConfig(), options)
    return processor


@pytest.mark.parametrize("name", EXPECTED)
def test_the_options_are_those_that_the_classes_read(name: str):
    options = describe_options(make_processor(name))
    own = {option for option in options if option.rpartition(".")[2] not in OF_COLOURS}
    assert own - {"video.max_video_tokens"} == EXPECTED[name]


def test_an_option_changes_what_the_processor_makes_and_what_is_saved(tmp_path: Path):
    image = Image.new("RGB", (200, 100))
    before, after = make_processor("qwen2.5-vl"), apply("qwen2.5-vl", max_pixels=256, min_pixels=64)
    rows = [processor.image_inputs([image])["image_grid_thw"].prod() for processor in (before, after)]
    assert rows[1] * 16 <= 256 < rows[0] * 16
    after.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    theirs = plain.image_processor([image], return_tensors="pt")
    assert torch.equal(theirs["image_grid_thw"], after.image_inputs([image])["image_grid_thw"])
    assert dict(plain.image_processor.size) == {"shortest_edge": 64, "longest_edge": 256}


def test_entries_of_a_size_leave_the_others(tmp_path: Path):
    processor = apply("qwen2.5-vl", size={"longest_edge": 512}, video={"size": {"longest_edge": 256}})
    assert dict(processor.native.image_processor.size) == {"shortest_edge": 64, "longest_edge": 512}
    assert dict(processor.native.video_processor.size) == {"shortest_edge": 64, "longest_edge": 256}
    assert "size.longest_edge=512" in describe_processor(processor)


def test_null_leaves_an_option_and_the_background_stays():
    processor = make_processor("internvl")
    processor.alpha_background = "black"
    apply_processor_options(processor, PreTrainedConfig(), {"max_patches": 2, "min_patches": None, "video": None})
    assert processor.native.image_processor.max_patches == 2
    assert processor.native.image_processor.min_patches == 1
    assert processor.alpha_background == "black"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen2.5-vl", {"max_pixel": 3}, r"model\.processor\.max_pixel: it is no option of Qwen2VLImageProcessor\. Did "
         r"you mean model\.processor\.max_pixels\? Allowed are .*max_pixels, .*size\.longest_edge"),
        ("qwen2.5-vl", {"do_center_crop": True}, "the weights of the visual encoder fix it"),
        ("qwen2.5-vl", {"pad_size": {"height": 3, "width": 3}}, "fix it"),
        ("qwen2.5-vl", {"patch_size": 7}, r"model\.processor\.patch_size: the weights of the visual encoder fix it"),
        ("qwen2.5-vl", {"size": {"height": 7}}, r"set model\.processor\.size\.(longest|shortest)_edge"),
        ("qwen2.5-vl", {"size": {"longest_edge": 0}}, r"size\.longest_edge=0: a whole number above 0 is needed"),
        ("qwen2.5-vl", {"size": 7}, r"set model\.processor\.size\.\w+"),
        ("qwen2.5-vl", {"max_pixels": "many"}, r"model\.processor\.max_pixels=many: .*expected int"),
        ("qwen2.5-vl", {"max_pixels": True}, r"model\.processor\.max_pixels=True: int is needed"),
        ("qwen2.5-vl", {"fps": 2}, r"model\.processor\.fps: dataset\.max_frames says"),
        ("qwen2.5-vl", {"video": {"num_frames": 2}}, r"model\.processor\.video\.num_frames: dataset\.max_frames says"),
        ("qwen2.5-vl", {"max_video_tokens": 2}, r"set model\.processor\.video\.max_video_tokens"),
        ("qwen2.5-vl", {"video": 3}, r"model\.processor\.video=3: it is a section"),
        ("qwen2.5-vl", {"device": "cpu"}, "no option of"),
        ("idefics3", {"video": {"size": {"longest_edge": 3}}}, "Idefics3Processor has no videos"),
        ("internvl", {"crop_to_patches": False}, "InternVLProcessor sets crop_to_patches=True in every call"),
        ("internvl", {"max_patches": 0}, r"max_patches=0: a whole number above 0 is needed"),
        ("gemma3", {"do_pan_and_scan": True}, "Gemma3Processor sets do_pan_and_scan=False in every call"),
        ("llava-interleave", {"size": {"height": 3}}, "the weights of the visual encoder fix it"),
        ("mllama", {"max_image_tiles": 2}, "the weights of the visual encoder fix it"),
        ("llava-next", {"image_grid_pinpoints": []}, "LlavaNextImageProcessor does not prepare images with it"),
        ("llava-1.5", {"image_mean": [0.5, 0.5, 0.5], "do_normalize": False}, "no effect while do_normalize is false"),
    ],
)  # fmt: skip
def test_what_a_processor_does_not_take_is_refused(name: str, options: dict[str, object], message: str):
    processor = make_processor(name)
    settings = processor.to_dict()
    with pytest.raises(ValueError, match=message):
        apply_processor_options(processor, PreTrainedConfig(), options)
    assert processor.to_dict() == settings


def test_a_composed_model_is_told_its_own_keys():
    check_no_processor_options({"max_pixels": None})
    with pytest.raises(ValueError, match=r"model\.processor\.max_pixels: .* model\.anyres\.grids"):
        check_no_processor_options({"max_pixels": 3})


def test_grids_change_in_the_model_too(tmp_path: Path):
    """LLaVA-NeXT counts the features of an image by its configuration."""
    save_family("llava-next", tmp_path)
    words = ["dataset.path=x", f"model.hf_name={tmp_path}", "model.processor.image_grid_pinpoints=[[16,32],[32,16]]"]
    config = compose_config("finetune-llava-onevision", words)
    model_config, processor = resolve_model(config, ["model.hf_name", "model.processor.image_grid_pinpoints"])
    assert model_config.image_grid_pinpoints == [[16, 32], [32, 16]]
    model = load_weights(config, model_config, processor, torch.float32, 0)
    ids, _ = processor.tokenize("<image>", (), [(300, 300)])
    inputs = processor.image_inputs([Image.new("RGB", (300, 300))])
    assert model(input_ids=torch.tensor([ids]), **inputs).logits.shape[1] == len(ids)
