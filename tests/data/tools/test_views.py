"""What `vlm data show` tells of images: their sizes as the model sees them, and their tokens."""

from PIL import Image

from tests.families.tiny_families import TINY
from vlm.data.sample import Clip
from vlm.data.tools.views import count_media_tokens, describe_views
from vlm.data.vision.video import DecodedVideo
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES


def make_processor(name: str) -> FamilyProcessor:
    return FamilyProcessor(TINY[name].processor(), FAMILIES[TINY[name].model_type])


def describe(name: str, *sizes: tuple[int, int]) -> list[str]:
    """What a family sees of images of these heights and widths."""
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    return describe_views(make_processor(name), images, sizes)


def test_a_patched_image_has_its_size_after_resizing():
    assert describe("qwen2.5-vl", (16, 24), (100, 300)) == ["24×16, 6 tokens", "48×16, 12 tokens"]
    assert describe("qwen2.5-vl") == []


def test_tiles_are_counted_and_a_single_view_is_not():
    assert describe("internvl", (64, 16), (16, 16)) == ["5 views of 16×16, 22 tokens", "16×16, 6 tokens"]
    assert describe("paligemma", (64, 16)) == ["16×16, 16 tokens"]
    assert describe("idefics3", (30, 30))[0].startswith("5 views of 16×16, ")


def test_a_video_has_a_size_and_tokens_of_its_own():
    processor = make_processor("qwen2.5-vl")
    clip = Clip((0, 1, 2, 3), 4, 16, 24, 1.0)
    video = DecodedVideo([Image.new("RGB", (24, 16))] * 4, clip)
    image = Image.new("RGB", (16, 16))
    shown = describe_views(processor, [image, video], [(16, 16), clip])
    assert shown == ["16×16, 4 tokens", "2 × 24×16, 12 tokens"]
    assert count_media_tokens(processor, 2, [clip, (16, 16)]) == [12, 4]
