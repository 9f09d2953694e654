"""Vectors of texts and images: `Embedder.load(checkpoint).embed(["a red cup"], side="query")`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.pairs.encoder import DOCUMENT, QUERY, add_prompt
from vlm.data.processor import Processor
from vlm.data.records.members import choose_member
from vlm.data.sample import Sample, Turn
from vlm.data.sources import Source
from vlm.inference.feature_cache import ImageFeatureCache
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.predict import Predictor, load_heads
from vlm.inference.prompts import ImageInput, VideoInput
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.contrastive import shorten_vectors
from vlm.models.head_tasks import EMBEDDING

SIDES = (QUERY, DOCUMENT)
"""What a vector is of: what is searched by, and what is searched for."""


class Embedder:
    """A model with a head that embeds and its processor.

    Args:
        model: a `VLMForPrediction`.
        processor: the model's processor.
        feature_cache: see `VisionLanguageModel`.
    """

    def __init__(self, model: Any, processor: Processor, feature_cache: ImageFeatureCache | None = None):
        self.model, self.processor = model, processor
        self._vlm = VisionLanguageModel(model, processor, feature_cache)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        base: Sequence[str] = (),
        trust_remote_code: bool = False,
        max_image_tokens: int | None = None,
    ) -> Self:
        """Load a checkpoint with a head that embeds; arguments as `VisionLanguageModel.load`.

        Raises:
            ValueError: the checkpoint has no such head.
        """
        embedder = cls(
            *load_heads(checkpoint, device, dtype, base, trust_remote_code, max_image_tokens), ImageFeatureCache()
        )
        if embedder.head.task != EMBEDDING:
            raise ValueError(f"{checkpoint} has prediction heads but no embedding head; use vlm.Predictor")
        return embedder

    @property
    def head(self) -> HeadSettings:
        """The head."""
        return self.model.config.settings[0]

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        return self.head.dim or self.model.config.get_text_config().hidden_size

    def embed(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[ImageInput]] = (),
        videos: Sequence[Sequence[VideoInput]] = (),
        *,
        side: str = DOCUMENT,
        width: int | None = None,
        max_frames: int = DatasetConfig.max_frames,
        system_prompt: str | None = None,
    ) -> np.ndarray:
        """Return vectors of length 1, float32: `(N, width)`. Two are compared by their scalar product.

        Args:
            texts: a text for each; empty for images alone. `<image>` marks the place of an image; without a mark,
                images come first.
            images: the images (paths or Pillow images) of each; empty: none has any.
            videos: the videos (paths) of each, likewise.
            side: `query` for what is searched by, `document` for what is searched for: each has its own system turn.
            width: how many of its first numbers each vector keeps, scaled to length 1; None: all.
            max_frames: the largest number of frames read from a video.
            system_prompt: a system turn in place of the side's.

        Raises:
            ValueError: as `VisionLanguageModel.generate`, or there is no such side or width.
        """
        check_side(side)
        self.check_width(width)
        prompt = self.head.prompts.get(side, "") if system_prompt is None else system_prompt
        turns, media = self._vlm.conversations(list(texts), images, videos, max_frames)
        turns = [_without_empty_text(conversation, text) for conversation, text in zip(turns, texts, strict=True)]
        samples = [add_prompt(Sample("prompt", tuple(conversation)), prompt) for conversation in turns]
        conversations = [sample.turns for sample in samples]
        inputs = self._vlm.inputs(conversations, media, suffix=self.model.config.suffix_ids, left=False)
        return np.stack([vector.numpy() for vector in self.of(inputs, width)])

    def check_width(self, width: int | None) -> None:
        """Raise ValueError where vectors have fewer numbers than they shall keep."""
        if width is not None and not 1 <= width <= self.width:
            raise ValueError(
                f"width={width}: vectors of this model have {self.width} numbers; allowed are 1 to {self.width}"
            )

    @torch.no_grad()
    def of(self, inputs: dict[str, Tensor], width: int | None = None) -> list[Tensor]:
        """Return the vector of each row of a batch of model inputs, `config.suffix_ids` behind each prompt."""
        vectors = self.model(**self._vlm.use_cached_features(inputs)).outputs[self.head.name]
        vectors = vectors if width is None else shorten_vectors(vectors, width)
        return list(vectors.float().cpu())


def load_with_heads(
    checkpoint: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    base: Sequence[str] = (),
    trust_remote_code: bool = False,
    max_image_tokens: int | None = None,
) -> Predictor | Embedder:
    """Load a checkpoint with heads: an `Embedder` where its head embeds, else a `Predictor`.

    Raises:
        ValueError: the checkpoint has no heads.
    """
    model, processor = load_heads(checkpoint, device, dtype, base, trust_remote_code, max_image_tokens)
    kind = Embedder if model.config.settings[0].task == EMBEDDING else Predictor
    return kind(model, processor, ImageFeatureCache())


def check_side(side: str) -> None:
    """Raise ValueError where there is no such side."""
    if side not in SIDES:
        raise ValueError(f"side={side}: allowed are {', '.join(SIDES)}")


def _without_empty_text(turns: Sequence[Turn], text: str) -> list[Turn]:
    """Return the turns of images alone as they are in records: without the line break before a text."""
    if text:
        return list(turns)
    return [replace(turn, content=tuple(part for part in turn.content if part != "\n")) for turn in turns]


@dataclass
class MemberSource(Source):
    """The records of a file, of each the member that is searched by, or searched for.

    Attributes:
        side: `query` or `document`.
        prompt: the system turn of members that have none of their own.
    """

    side: str = DOCUMENT
    prompt: str = ""

    def read(self, record: object) -> Sample:
        """Read a record, and return the chosen member.

        Raises:
            BadSample: it cannot be used.
        """
        return add_prompt(choose_member(super().read(record), is_query=self.side == QUERY), self.prompt)
