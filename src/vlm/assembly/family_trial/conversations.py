"""What a family is tried on: short conversations with images of noise, and what its own processor makes of them.

`read_natively` is the independent side of the proofs about ids and labels: it asks transformers' processor for a whole
conversation, without the markers, spans and expansions of `FamilyProcessor`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from torch import Tensor

from vlm.assembly.family_trial.verdicts import NotProvableError
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode
from vlm.data.encoding.processor_errors import describe_error
from vlm.data.processor import SampleInputs
from vlm.data.sample import Clip, ContentPart, ImageRef, MediaSize, Sample, Turn, VideoRef
from vlm.data.vision.images import Medium, upright_size
from vlm.data.vision.video import DecodedVideo
from vlm.families.native import call_options
from vlm.families.processing import FamilyProcessor
from vlm.families.videos import make_metadata
from vlm.models.processing_messages import FIXED_CLOCK, FIXED_DATE

SIZES = ((64, 96), (160, 64), (64, 64))
"""Heights and widths of the images: wide, tall and square, so that tiles and grids differ."""
QUESTION, OTHER_QUESTION = "Which animal is it?", "And what does it do?"
REPLIES = ("A red fox", "It sleeps in the snow")
SYSTEM = "Answer in a few words."
VIDEO_SIDE = 64
MIN_FRAMES = 2
"""Frames of the video: at least so many, since one is an image to some families."""


@lru_cache(64)
def draw_image(seed: int, size: tuple[int, int] = SIZES[0]) -> Image.Image:
    """Return an image of coarse noise, whose neighbouring patches differ; `size` is height and width in pixels.

    Equal arguments give one object, by which rows that are made already are found.
    """
    cells = np.random.default_rng(seed).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((size[1], size[0]), Image.Resampling.NEAREST)


def draw_video(seed: int, processor: FamilyProcessor) -> DecodedVideo:
    """Return a video of coarse noise, as short as the family reads."""
    assert processor.videos is not None
    number = max(MIN_FRAMES, len(processor.videos.minimal_clip.frames))
    frames = [draw_image(seed + place, (VIDEO_SIDE, VIDEO_SIDE)) for place in range(number)]
    return DecodedVideo(frames, Clip(tuple(range(number)), number, VIDEO_SIDE, VIDEO_SIDE, 1.0))


@dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation with its images and videos, in order."""

    turns: tuple[Turn, ...]
    media: tuple[Medium, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Return what conversations of the same turns and the very same images have in common."""
        return self.turns, *map(id, self.media)

    @property
    def sizes(self) -> list[MediaSize]:
        """Return height and width of each image, and the clip of each video."""
        return [
            medium.clip if isinstance(medium, DecodedVideo) else upright_size(cast(Image.Image, medium))
            for medium in self.media
        ]

    @property
    def replies(self) -> list[str]:
        """Return the texts of the assistant."""
        return ["".join(map(str, turn.content)) for turn in self.turns if turn.role == "assistant"]


@dataclass
class Builder:
    """Builds a conversation turn by turn."""

    turns: list[Turn] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)

    def system(self, text: str) -> "Builder":
        """Add a system turn."""
        self.turns.append(Turn("system", (text,)))
        return self

    def ask(self, text: str, *media: Medium) -> "Builder":
        """Add a question after its images and videos."""
        parts: list[ContentPart] = [
            VideoRef(Path("video"), medium.clip) if isinstance(medium, DecodedVideo) else ImageRef(Path("image"))
            for medium in media
        ]
        self.turns.append(Turn("user", (*parts, text)))
        self.media += media
        return self

    def reply(self, text: str) -> "Builder":
        """Add a reply."""
        self.turns.append(Turn("assistant", (text,)))
        return self

    def done(self) -> Conversation:
        """Return the conversation."""
        return Conversation(tuple(self.turns), tuple(self.media))


def one_turn(*media: Medium, question: str = QUESTION, reply: str = REPLIES[0]) -> Conversation:
    """Return a question about images or videos with its reply."""
    return Builder().ask(question, *media).reply(reply).done()


def two_turns(first: Sequence[Medium], second: Sequence[Medium] = ()) -> Conversation:
    """Return two questions with their replies, and the images of each."""
    return Builder().ask(QUESTION, *first).reply(REPLIES[0]).ask(OTHER_QUESTION, *second).reply(REPLIES[1]).done()


def make_row(processor: FamilyProcessor, conversation: Conversation) -> SampleInputs:
    """Return a conversation as a data worker hands it on: ids, labels and inputs of images."""
    sample, sizes = Sample("trial", conversation.turns), conversation.sizes
    return model_inputs(processor, encode(processor, sample, sizes), conversation.media, sizes, sample)


def read_natively(
    processor: FamilyProcessor, conversation: Conversation, *, prompt: bool = False
) -> Mapping[str, Tensor]:
    """Return what transformers' own processor makes of a whole conversation: `input_ids` `(1, T)` and inputs of images.

    With `prompt`, it waits for a reply.

    Raises:
        NotProvableError: the processor or its template refuses the conversation.
    """
    native = processor.native
    try:
        if processor.own_template == processor.family.template:
            return _read_without_template(processor, conversation, prompt)
        media = iter(conversation.media)
        takes_lists = takes_lists_of_parts(processor)
        messages = [_to_message(processor, turn, media, takes_lists) for turn in conversation.turns]
        template = str(processor.chat_template)
        if processor.chat_template == processor.own_template and any(map(_is_video, conversation.media)):
            template = processor.family.video_template or template
        clips = [medium.clip for medium in conversation.media if isinstance(medium, DecodedVideo)]
        options: dict[str, object] = {**call_options(native)}
        if clips:
            options |= {"do_sample_frames": False, "video_metadata": [make_metadata(clip) for clip in clips]}
            options["return_metadata"] = True  # some write the times of frames from it, and do not ask for it
        if not takes_lists and conversation.media:
            options["images"] = list(conversation.media)
        variables = {"date_string": FIXED_DATE, "enable_thinking": False}
        render = partial(
            native.apply_chat_template,
            messages,
            add_generation_prompt=prompt,
            chat_template=FIXED_CLOCK + template if "strftime_now" in template else template,
            **{name: value for name, value in variables.items() if name in template},
        )
        if conversation.media and not clips and not processor.inputs.form.nests_images:
            text = render(tokenize=False)  # it nests images, which this processor's own call refuses
            return native(text=[text], images=list(conversation.media), return_tensors="pt", **options)
        return render(tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options)
    except Exception as error:  # templates and processors refuse by any error
        reason = f"the family's own processor refuses {describe(conversation)}: {describe_error(error)}"
        raise NotProvableError(reason) from error


def takes_lists_of_parts(processor: FamilyProcessor) -> bool:
    """Return whether the template in use reads contents as lists of text and images; others read strings."""
    if processor.chat_template != processor.own_template:
        return False
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    try:
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=str(processor.own_template), tokenize=False
        )
    except Exception:  # a template may do anything with a list that it does not expect
        return False
    return QUESTION in text and "'type'" not in text and processor.image_token in text


def describe(conversation: Conversation) -> str:
    """Return what a conversation is, in words, for messages."""
    roles = [turn.role for turn in conversation.turns]
    videos = sum(map(_is_video, conversation.media))
    told = [f"{roles.count('user')} question(s)"]
    told += ["a system turn"] if "system" in roles else []
    told += [f"{len(conversation.media) - videos} image(s)"] if len(conversation.media) > videos else []
    told += [f"{videos} video(s)"] if videos else []
    return "a conversation of " + ", ".join(told)


def _is_video(medium: Medium) -> bool:
    return isinstance(medium, DecodedVideo)


def _to_message(
    processor: FamilyProcessor, turn: Turn, media: Iterator[Medium], takes_lists: bool
) -> dict[str, object]:
    """Return a turn as transformers reads it, with its images themselves."""
    if not takes_lists:
        return turn.as_message(processor.image_token, processor.video_token)
    content = []
    for part in turn.content:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, VideoRef):
            video = cast(DecodedVideo, next(media))
            content.append({"type": "video", "video": np.stack([np.asarray(frame) for frame in video.frames])})
        else:
            content.append({"type": "image", "image": next(media)})
    return {"role": turn.role, "content": content}


def _read_without_template(
    processor: FamilyProcessor, conversation: Conversation, prompt: bool
) -> Mapping[str, Tensor]:
    """Read a question and its reply with a processor that lays out prefix and suffix itself (PaliGemma)."""
    if [turn.role for turn in conversation.turns] != ["user", "assistant"][: 1 if prompt else 2]:
        raise ValueError("its processor takes one question and one reply")
    texts = [part for part in conversation.turns[0].content if isinstance(part, str)]
    text = processor.image_token * len(conversation.media) + "".join(texts)
    suffix = {} if prompt else {"suffix": conversation.replies}
    images = {"images": [list(conversation.media)]} if conversation.media else {}
    return processor.native(text=[text], return_tensors="pt", **images, **suffix)
