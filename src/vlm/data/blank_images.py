"""Blank images and videos: what a model sees of a sample without its own, and dummies that complete a batch."""

import torch
from PIL import Image

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor
from vlm.data.sample import Clip, MediaSize
from vlm.data.vision.images import upright_size
from vlm.data.vision.video import DecodedVideo


def make_blank_image(processor: Processor, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return an image of the image processor's mean colour; `size` is height and width."""
    means = processor.image_processor.image_mean or [0.5]
    return Image.new("RGB", (size[1], size[0]), tuple(int(mean * 255) for mean in (*means, *means, *means)[:3]))


def make_blank_medium(processor: Processor, size: MediaSize) -> Image.Image | DecodedVideo:
    """Return a blank image or video of this size."""
    if isinstance(size, Clip):
        return DecodedVideo([make_blank_image(processor, (size.height, size.width))] * len(size.frames), size)
    return make_blank_image(processor) if size is None else make_blank_image(processor, size)


def dummy_image(processor: Processor) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return the ids and inputs of a blank image, or of a blank frame where frames of videos take fewer tokens."""
    blank = make_blank_image(processor)
    sizes: list[MediaSize] = [None if processor.pools_video_frames else upright_size(blank)]
    ids, _ = processor.tokenize(processor.image_token, (), sizes)
    images = processor.image_inputs([blank], sizes)
    return ids, images | processor.text_inputs(ids, [IGNORE_INDEX] * len(ids), images)


def dummy_video(processor: Processor) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return the ids and inputs of the shortest blank video; only where the processor has `videos`."""
    assert processor.videos is not None
    clip = processor.videos.minimal_clip
    ids, _ = processor.tokenize(processor.videos.text, (), [clip])
    inputs = processor.image_inputs([make_blank_medium(processor, clip)], [clip])
    return ids, inputs | processor.text_inputs(ids, [IGNORE_INDEX] * len(ids), inputs)
