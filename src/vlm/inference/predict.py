"""Predictions of a model with prediction heads: `Predictor.load(checkpoint).predict("Is it broken?", ["cup.png"])`."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.assembly.checkpoint import open_checkpoint
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.processor import Processor
from vlm.data.sample import Turn
from vlm.inference.feature_cache import ImageFeatureCache
from vlm.inference.generate import VisionLanguageModel
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_tasks import CLASSIFICATION_TASKS, EMBEDDING
from vlm.models.modeling_prediction import interpret_outputs


@dataclass(frozen=True)
class Prediction:
    """The prediction of a head for one prompt.

    Attributes:
        prediction: the label; the list of labels that apply (`multilabel`); the number (`regression`, `pairwise`).
        score: the probability of the positive label (`binary`) or the predicted one (`multiclass`, `ordinal`), the
            highest probability (`multilabel`), or the number.
        probabilities: label -> probability; empty where the head has no labels.
        outputs: the head's raw outputs, before temperature.
    """

    prediction: object
    score: float
    probabilities: dict[Hashable, float]
    outputs: tuple[float, ...]


def load_heads(
    checkpoint: str | Path,
    device: str | None,
    dtype: str,
    base: Sequence[str],
    trust_remote_code: bool,
    max_image_tokens: int | None,
) -> tuple[PreTrainedModel, Processor]:
    """Load a checkpoint with heads of any kind and its processor; arguments as `VisionLanguageModel.load`.

    Raises:
        ValueError: the checkpoint has no heads.
    """
    opened = open_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    opened.check_heads(expected=True)
    return opened.load_for_inference(device=device, dtype=dtype, base=base, max_image_tokens=max_image_tokens)


class Predictor:
    """A model with prediction heads and its processor, ready to predict.

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
        """Load a checkpoint with prediction heads, from a folder or the Hub; arguments as `VisionLanguageModel.load`.

        Raises:
            ValueError: the checkpoint has no prediction heads, or one that embeds.
        """
        predictor = cls(
            *load_heads(checkpoint, device, dtype, base, trust_remote_code, max_image_tokens), ImageFeatureCache()
        )
        if predictor.heads[0].task == EMBEDDING:
            raise ValueError(
                f"{checkpoint} has an embedding head, which predicts nothing; use vlm predict or vlm.Embedder"
            )
        return predictor

    @property
    def heads(self) -> list[HeadSettings]:
        """The model's heads."""
        return self.model.config.settings

    def predict(
        self,
        prompt: str | Sequence[str],
        images: Sequence[object] = (),
        videos: Sequence[object] = (),
        *,
        max_frames: int = DatasetConfig.max_frames,
        system_prompt: str | None = None,
    ) -> Any:
        """Predict for one prompt, or for several at once.

        Args:
            prompt: the question as it was asked in training, or a list of questions. `<image>` marks the place of an
                image; without a mark, images come first.
            images: the images (paths or Pillow images) of the prompt; for several prompts, a list for each.
            videos: the videos (paths), likewise.
            max_frames: the largest number of frames read from a video.
            system_prompt: the system turn, as `dataset.system_prompt` in training; None: no system turn.

        Returns:
            A `Prediction`, or head -> `Prediction` where there are several heads; for several prompts a list of these.

        Raises:
            ValueError: as `VisionLanguageModel.generate`.
        """
        turns, media = self._vlm.conversations(prompt, images, videos, max_frames)
        if system_prompt is not None:
            turns = [[Turn("system", (system_prompt,)), *conversation] for conversation in turns]
        inputs = self._vlm.inputs(turns, media, suffix=self.model.config.suffix_ids, left=False)
        rows = [row if len(row) > 1 else next(iter(row.values())) for row in self.of(inputs)]
        return rows[0] if isinstance(prompt, str) else rows

    @torch.no_grad()
    def of(self, inputs: dict[str, Tensor]) -> list[dict[str, Prediction]]:
        """Return, for each row of a batch of model inputs, the prediction of each head.

        Args:
            inputs: as `VisionLanguageModel.inputs` returns them, `config.suffix_ids` behind each prompt.
        """
        outputs = self.model(**self._vlm.use_cached_features(inputs)).outputs
        columns = {head.name: _make_predictions(head, outputs[head.name]) for head in self.heads}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _make_predictions(head: HeadSettings, outputs: Tensor) -> list[Prediction]:
    """Return the predictions of a head from its outputs `(B, K)`."""
    result = interpret_outputs(head, outputs)
    scores = result["scores"].float().cpu().tolist()
    rows = [tuple(row) for row in outputs.float().cpu().tolist()]
    if head.task not in CLASSIFICATION_TASKS:
        return [Prediction(score, score, {}, row) for score, row in zip(scores, rows, strict=True)]
    made = []
    for label, by_label, row in zip(result["predictions"], scores, rows, strict=True):
        probabilities = dict(zip(head.labels, by_label, strict=True))
        if head.task == "multilabel":
            score = max(by_label)
        elif head.task == "binary":
            score = probabilities[head.labels[1]]
        else:
            score = probabilities[label]
        made.append(Prediction(label, score, probabilities, row))
    return made
