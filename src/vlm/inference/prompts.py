"""What a caller gives with a prompt: images and videos, and the turn that they become."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.records.marks import MarkError, Slot, join_texts, split_at_marks
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, ContentPart, ImageRef, Turn
from vlm.data.surrogates import HALF_PAIR, has_surrogate
from vlm.data.vision.images import open_image
from vlm.data.vision.video import num_frames

ImageInput = str | Path | Image.Image
"""An image as a caller gives it: a path, or an opened image."""

VideoInput = str | Path
"""A video as a caller gives it."""

STAND_IN_IMAGE = ImageRef(Path())
"""Stands for an image that the caller passes beside the prompt."""


def user_turn(
    prompt: str, num_images: int, videos: Sequence[Sequence[ContentPart]] = (), *, every_mark: bool = False
) -> Turn:
    """Return a question as a turn: its images and videos stand at their marks, else before the text.

    Which `<image>` and `<video>` are marks, and which are words, is as in records, see `records.marks`.

    Args:
        prompt: the question.
        num_images: the number of its images.
        videos: the content parts of each video.
        every_mark: whether the mark of a single image or video stands for it within a sentence too.

    Raises:
        ValueError: the prompt has marks, but not as many as there are images or videos.
    """
    if has_surrogate(prompt):
        raise ValueError(f"the prompt {HALF_PAIR}")
    numbers = {VIDEO_PLACEHOLDER: len(videos), PLACEHOLDER: num_images}  # without marks in this order, as in records
    try:
        (pieces,), leading = split_at_marks([prompt], numbers, lead=True, every_mark=every_mark)
    except MarkError as error:
        raise ValueError(
            f"the prompt has {error.found} {error.mark}, but {error.number} {error.name}s were given"
        ) from None
    first = [Slot(kind, kind) for kind in leading for _ in range(numbers[kind])]
    if first:
        pieces = [*first, "\n", *pieces]
    remaining_videos = iter(videos)
    content: list[ContentPart] = []
    for piece in pieces:
        if isinstance(piece, str):
            content.append(piece)
        else:
            content += [STAND_IN_IMAGE] if piece.kind == PLACEHOLDER else next(remaining_videos)
    return Turn("user", tuple(join_texts(content)))


def media_per_prompt(given: Sequence[Any], number: int, kind: str) -> list[Sequence[Any]]:
    """Return a list of images or videos for each prompt; empty lists where nothing is given.

    Raises:
        ValueError: there are lists, but not one for each prompt.
    """
    media = list(given) or [()] * number
    if len(media) != number:
        raise ValueError(f"{number} prompts need as many lists of {kind}, got {len(media)}")
    return media


def check_videos(videos: Sequence[VideoInput], max_frames: int) -> None:
    """Raise ValueError where a path is no video, or `max_frames` allows no frame."""
    if max_frames < 1:
        raise ValueError(f"max_frames={max_frames}: at least 1 is needed")
    with errors_without_record():
        for path in videos:
            _refuse_address("video", path)
            num_frames(Path(path), str(path))


def load_images(images: Sequence[ImageInput]) -> list[Image.Image]:
    """Return images, opened where they are paths; raise ValueError where one does not open."""
    for image in images:
        if not isinstance(image, Image.Image):
            _refuse_address("image", image)
    with errors_without_record():
        return [
            image if isinstance(image, Image.Image) else open_image(ImageRef(Path(image)), str(image))
            for image in images
        ]


def _refuse_address(kind: str, path: str | Path) -> None:
    """Raise ValueError where a path is an address."""
    if re.match(r"\w{2,}:/", str(path)):
        raise ValueError(f"{kind} {path}: web addresses are not downloaded; save the {kind} to a file and name that")


@contextmanager
def errors_without_record() -> Iterator[None]:
    """Raise the reason of a `BadSample` as a ValueError: a prompt has no record that the message could name."""
    try:
        yield
    except BadSample as error:
        raise ValueError(error.reason) from error
