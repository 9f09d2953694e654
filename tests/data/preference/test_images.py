"""Images of the rejected side: of the same size, with less to see."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_parts import Parts
from vlm.data.preference.images import MAX_AREA, perturb_media
from vlm.data.sample import Clip
from vlm.data.vision.video import DecodedVideo


@pytest.fixture(scope="module")
def processor(parts: Parts) -> Any:
    return parts.model("clip", "llama")[1]


def gradient(height: int = 30, width: int = 40) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 8, columns * 6, rows * 0], axis=-1).astype(np.uint8))


def test_crops_are_small_parts_in_the_size_of_the_image(processor: Any):
    image = gradient()
    areas = []
    for seed in "abcdefgh":
        (cropped,) = perturb_media([image], "cropped", processor, seed)
        assert isinstance(cropped, Image.Image)
        assert cropped.size == image.size
        rows, columns, _ = np.array(cropped).reshape(-1, 3).max(axis=0) - np.array(cropped).reshape(-1, 3).min(axis=0)
        areas.append(float(rows / (29 * 8) * columns / (39 * 6)))
    assert max(areas) < MAX_AREA + 0.05
    assert len(set(areas)) > 4


def test_tensors_and_images_are_cropped_alike(processor: Any):
    image = gradient(32, 32)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pillow, other = (
        perturb_media([image], "cropped", processor, "s"),
        perturb_media([tensor], "cropped", processor, "s"),
    )
    assert isinstance(other[0], torch.Tensor)
    assert other[0].dtype == torch.uint8
    difference = np.array(pillow[0]).astype(int) - other[0].permute(1, 2, 0).numpy()
    assert abs(difference).mean() < 3


def test_blank_images_have_the_mean_colour_and_videos_keep_their_clip(processor: Any):
    clip = Clip((0, 1), 2, 30, 40, 1.0)
    video = DecodedVideo([gradient(), gradient()], clip)
    blank, film = perturb_media([gradient(), video], "blank", processor, "s")
    assert isinstance(blank, Image.Image)
    assert blank.size == (40, 30)
    assert len(set(blank.get_flattened_data())) == 1
    assert isinstance(film, DecodedVideo)
    assert film.clip == clip
    assert film.frames[0].size == (40, 30)
    (film,) = perturb_media([video], "cropped", processor, "s")
    assert isinstance(film, DecodedVideo)
    assert film.frames[0] == film.frames[1] != gradient()


def test_an_image_that_is_stored_rotated_stays_so(processor: Any):
    image = gradient()
    exif = image.getexif()
    exif[0x0112] = 6
    (cropped,) = perturb_media([image], "cropped", processor, "s")
    assert isinstance(cropped, Image.Image)
    assert cropped.getexif()[0x0112] == 6
