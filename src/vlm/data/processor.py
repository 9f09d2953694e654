"""The processor as everything but its own file sees it: what turns conversations into ids and images into inputs.

`models.processing_vlm.VLMProcessor` (composed models) and `families.processing.FamilyProcessor` (models of the Hub)
satisfy it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm.data.sample import Clip

ImageSize = tuple[int, int]
"""Height and width in pixels."""

MediaSize = ImageSize | Clip | None
"""Size of an image, what is read of a video, or None for an image that is a frame of a video."""


class Processor(Protocol):
    """Decides every token and every pixel: the same for training, inference and evaluation.

    Attributes:
        tokenizer: the language model's; a fast one.
        image_processor: the visual encoder's, of several the first one's.
        image_token: the text that stands for an image in a rendered conversation.
        special_tokens: matches every special token of the tokenizer.
        chat_template: the Jinja template in use.
        own_template: the template that the tokenizer or the family brought along.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any  # the image processors of transformers share no typed interface
    image_token: str
    special_tokens: re.Pattern[str]
    chat_template: Any
    own_template: str | None

    @property
    def image_token_id(self) -> int:
        """Return the id at which image features are put."""
        ...

    @property
    def video_token(self) -> str | None:
        """Return the text that stands for a video; None: videos are read as images, one a frame."""
        ...

    @property
    def video_token_id(self) -> int | None:
        """Return the id at which features of videos are put."""
        ...

    @property
    def per_sample_inputs(self) -> Sequence[str]:
        """Return the image inputs with one row for each sample; the others have rows for each image."""
        ...

    @property
    def per_token_inputs(self) -> Sequence[str]:
        """Return the inputs with one value for each token, besides ids and mask."""
        ...

    @property
    def needs_image_sizes(self) -> bool:
        """Return whether the number of tokens of an image depends on its size."""
        ...

    @property
    def pools_video_frames(self) -> bool:
        """Return whether frames of videos are read otherwise than images; their sizes are then None."""
        ...

    @property
    def accepts_tensors(self) -> bool:
        """Return whether images may be decoded tensors `(3, height, width)` of whole numbers."""
        ...

    @property
    def encodes_videos_separately(self) -> bool:
        """Return whether the model reads videos through a call of their own."""
        ...

    @property
    def minimal_clip(self) -> Clip:
        """Return the shortest clip that the model reads; only where videos have a token."""
        ...

    def min_frames(self, max_frames: int) -> int:
        """Return how many frames of a video are read at least; only where videos have a token."""
        ...

    def image_token_ids(self) -> list[int]:
        """Return the ids that one small image takes, its start and end tokens included."""
        ...

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool = False) -> str:
        """Return a conversation as text, with a token for each image and video."""
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
        """Return the model's inputs for a sample's images and videos, before `normalise`; empty where it has none."""
        ...

    def text_inputs(self, ids: Sequence[int], labels: Sequence[int], images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs named in `per_token_inputs`: `(tokens, …)` each."""
        ...

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels as the visual encoder reads them, on the device where they are."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's settings."""
        ...

    def save_pretrained(self, folder: str | Path) -> Any:
        """Write the processor's files into a checkpoint's folder."""
        ...


Images = Sequence[Image.Image | Tensor]
"""Images of a sample: Pillow's, or decoded tensors where the processor accepts them."""
