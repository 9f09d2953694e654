"""The interface of processors, which turn conversations into ids, and images into model inputs.

`models.processing_vlm.VLMProcessor` (composed models) and `families.processing.FamilyProcessor` (Hub families)
satisfy the Protocol.
"""

from __future__ import annotations  # the types of libraries are needed by checkers only, and slow to import

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from vlm.data.sample import Clip
    from vlm.models.anyres import AnyRes
    from vlm.models.pixels import ImageProcessor
    from vlm.models.processing_messages import Message

Tools = Sequence[Mapping[str, object]]
"""The tools that a model may call, as chat templates read them: JSON objects."""
SampleInputs = dict[str, Any]
"""An encoded sample: `input_ids` and `labels` (lists of ids), and tensors under the names that the model takes.

Prompts for prediction heads have `targets` (head -> list of numbers) and `group` (an int) besides.
"""


RowIndex = tuple[str, int]
"""An input whose rows another one's numbers are indices of, and how many of its leading dimensions make a row."""


class VideoSupport(Protocol):
    """Properties of a model that reads videos through a token of their own."""

    @property
    def minimal_clip(self) -> Clip:
        """Return the shortest clip that the model reads."""
        ...

    @property
    def text(self) -> str:
        """Return what stands for a video by itself: its token, between those that begin and end one."""
        ...

    def min_frames(self, max_frames: int) -> int:
        """Return how many frames are read of even the shortest video, where at most `max_frames` are read of any."""
        ...


class Processor(Protocol):
    """Decides every token and every pixel: the same for training, inference and evaluation.

    Attributes:
        tokenizer: the language model's; a fast one.
        image_processor: the visual encoder's; of several encoders, the first one's.
        image_token: the text that stands for an image in a rendered conversation.
        special_tokens: matches every special token of the tokenizer.
        chat_template: the Jinja template in use.
        own_template: the template that came with the language model or the family.
        coordinate_tokens: matches the tokens of the convention of coordinates, which are tokens in the texts of users,
            too; None: it has none.
    """

    tokenizer: PreTrainedTokenizerFast
    image_processor: ImageProcessor
    image_token: str
    special_tokens: re.Pattern[str]
    chat_template: str | None
    own_template: str | None
    coordinate_tokens: re.Pattern[str] | None

    @property
    def coordinates(self) -> str | None:
        """Return the convention of boxes, points and time spans, see `vlm.data.coordinates`; None: none was chosen."""
        ...

    def use_coordinates(self, name: str, tokens: re.Pattern[str] | None) -> None:
        """Set that convention, which is saved with the processor, and its `coordinate_tokens`."""
        ...

    @property
    def alpha_background(self) -> str:
        """Return what shows through transparent images, see `vlm.models.pixels`; it can be set."""
        ...

    @alpha_background.setter
    def alpha_background(self, name: str) -> None:
        """Set what shows through transparent images."""
        ...

    def as_rgb(self, image: Image.Image) -> Image.Image:
        """Return an image upright, in RGB, without transparency: what is seen of it before it is resized."""
        ...

    @property
    def image_token_id(self) -> int:
        """Return the id at whose positions image features are placed."""
        ...

    @property
    def videos(self) -> VideoSupport | None:
        """Return how videos are read; None if each of their frames is read as an image."""
        ...

    @property
    def video_token(self) -> str | None:
        """Return the text that stands for a video; None if there is none, as `videos`."""
        ...

    @property
    def video_token_id(self) -> int | None:
        """Return the id at whose positions features of videos are placed; None as `videos`."""
        ...

    @property
    def encodes_videos_separately(self) -> bool:
        """Return whether the model encodes videos in a call of their own, in addition to the one for images."""
        ...

    @property
    def per_sample_inputs(self) -> Sequence[str]:
        """Return the names of image inputs that have one row for each sample; the others have one for each image."""
        ...

    @property
    def concatenation_dims(self) -> Mapping[str, int]:
        """Return image input -> the dimension along which those of samples are concatenated; 0 for all others."""
        ...

    @property
    def row_indices(self) -> Mapping[str, RowIndex]:
        """Return image input -> the input whose rows its numbers are indices of; none for most."""
        ...

    @property
    def sees_media_together(self) -> bool:
        """Return whether each image and video of a conversation sees all others, those that come later too."""
        ...

    @property
    def per_token_inputs(self) -> Sequence[str]:
        """Return the names of inputs that have one value for each token, besides ids and mask."""
        ...

    @property
    def deduplicated_inputs(self) -> Sequence[str]:
        """Return the names of image inputs in which equal images may stand once, with an index; none for families."""
        ...

    @property
    def needs_image_sizes(self) -> bool:
        """Return whether the number of tokens of an image depends on its size."""
        ...

    @property
    def pools_video_frames(self) -> bool:
        """Return whether frames of videos are encoded otherwise than images; their sizes are then None."""
        ...

    @property
    def tiling(self) -> AnyRes | None:
        """Return how a composed model cuts images into tiles; None if it does not, and for families."""
        ...

    @property
    def accepts_tensors(self) -> bool:
        """Return whether `image_inputs` takes decoded images as `(3, height, width)` uint8 tensors too."""
        ...

    def image_token_ids(self) -> list[int]:
        """Return the ids that one small image takes, its start and end tokens included."""
        ...

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        enable_thinking: bool | None = None,
    ) -> str:
        """Return a conversation as text, with a token for each image and video.

        Args:
            conversation: messages with `role` and `content`, a string or a list of items.
            add_generation_prompt: whether the text ends where a reply begins.
            tools: the tools that the model may call, for templates that list them.
            enable_thinking: whether the model is to think before its reply, for templates that ask; None: what its
                tokenizer says, see `models.processing_messages.thinks`.
        """
        ...

    def tokenize(
        self, text: str, user_spans: Sequence[tuple[int, int]] = (), sizes: Sequence[Any] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a rendered conversation, and the character span that each id comes from.

        Args:
            text: a rendered conversation.
            user_spans: the character spans that users wrote; special tokens spelled there are plain text.
            sizes: the `MediaSize` of each image and video, in order.

        Raises:
            ValueError: the text has more or fewer media tokens than there are sizes.
        """
        ...

    def image_inputs(self, images: Sequence[Any], sizes: Sequence[Any] = ()) -> dict[str, Tensor]:
        """Return the model's inputs for a sample's images and videos, before `normalise`; empty without any.

        Args:
            images: the `Medium` of each image and video, in order.
            sizes: the `MediaSize` of each, as `tokenize` takes them.
        """
        ...

    def text_inputs(self, ids: Sequence[int], labels: Sequence[int], images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs named in `per_token_inputs`: `(tokens, …)` each."""
        ...

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels of `image_inputs` as the visual encoder reads them, of the same shape and on their device."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return the processor's settings."""
        ...

    def save_pretrained(self, save_directory: str | Path, /) -> object:
        """Write the processor's files into a checkpoint's folder."""
        ...
