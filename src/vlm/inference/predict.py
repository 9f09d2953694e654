"""Asking a model with prediction heads: `Predictor.load(checkpoint).predict("Is it broken?", ["cup.png"])`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm.assembly.checkpoint import open_checkpoint
from vlm.config.schema import DatasetConfig
from vlm.data.sample import Turn
from vlm.inference.feature_cache import ImageFeatureCache
from vlm.inference.generate import VisionLanguageModel
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_tasks import CLASSIFICATION_TASKS
from vlm.models.modeling_prediction import interpret_outputs


@dataclass(frozen=True)
class Prediction:
    """What a head says of one prompt.

    Attributes:
        prediction: the label; of `multilabel` those that hold; of `regression` and `pairwise` the number.
        score: the positive label's probability (`binary`), the predicted one's (`multiclass`, `ordinal`), the highest
            one (`multilabel`), or the number.
        probabilities: of each label; none where there are no labels.
        outputs: the head's raw numbers, before temperature.
    """

    prediction: Any
    score: float
    probabilities: dict[Any, float]
    outputs: tuple[float, ...]


class Predictor:
    """A model with prediction heads and its processor, ready to be asked.

    Args:
        model: a `VLMForPrediction`.
        processor: its processor.
        feature_cache: as `VisionLanguageModel`.
    """

    def __init__(self, model: Any, processor: Any, feature_cache: ImageFeatureCache | None = None):
        self.model, self.processor = model, processor
        self._vlm = VisionLanguageModel(model, processor, feature_cache)

    @classmethod
    def load(
        cls, checkpoint: str | Path, *, device: str | None = None, dtype: str = "auto", base: Sequence[str] = (),
        trust_remote_code: bool = False,
    ) -> "Predictor":  # fmt: skip
        """Load a checkpoint with prediction heads, from a folder or the Hub; arguments as `VisionLanguageModel.load`.

        Raises:
            ValueError: it has none.
        """
        opened = open_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
        opened.check_heads(expected=True)
        model, processor = opened.load_for_inference(device=device, dtype=dtype, base=base)
        return cls(model, processor, ImageFeatureCache())

    @property
    def heads(self) -> list[HeadSettings]:
        """The model's heads."""
        return self.model.config.settings

    def predict(
        self, prompt: str | Sequence[str], images: Sequence[Any] = (), videos: Sequence[Any] = (), *,
        max_frames: int = DatasetConfig.max_frames, system_prompt: str | None = None,
    ) -> Any:  # fmt: skip
        """What the heads say of one prompt, or of several at once.

        Args:
            prompt: the question as it was asked in training, or a list of them; `<image>` in it says where an image
                stands, else the images come first.
            images: the images (paths or Pillow images) of the prompt; for several prompts, a list for each.
            videos: the videos (paths), likewise.
            max_frames: most frames of a video that the model sees.
            system_prompt: said first, as `dataset.system_prompt` was in training.

        Returns:
            A `Prediction`, or head -> `Prediction` where there are several heads; for several prompts a list of these.

        Raises:
            ValueError: as `VisionLanguageModel.generate`.
        """
        turns, media = self._vlm.conversations(prompt, images, videos, max_frames)
        first = [] if system_prompt is None else [Turn("system", (system_prompt,))]
        turns = [[*first, *one] for one in turns]
        inputs = self._vlm.inputs(turns, media, suffix=self.model.config.suffix_ids, left=False)
        found = [one if len(one) > 1 else next(iter(one.values())) for one in self.of(inputs)]
        return found[0] if isinstance(prompt, str) else found

    @torch.no_grad()
    def of(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, Prediction]]:
        """What each head says of each row of a batch as the model reads it."""
        outputs = self.model(**self._vlm.use_cached_features(inputs)).outputs
        columns = {one.name: self._make_predictions(one, outputs[one.name]) for one in self.heads}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _make_predictions(self, one: HeadSettings, outputs: torch.Tensor) -> list[Prediction]:
        """What one head says: `(B, K)` to B predictions."""
        decided = interpret_outputs(one, outputs)
        scores = decided["scores"].float().cpu().tolist()
        raw = [tuple(row) for row in outputs.float().cpu().tolist()]
        if one.task not in CLASSIFICATION_TASKS:
            return [Prediction(number, number, {}, numbers) for number, numbers in zip(scores, raw, strict=True)]
        named = [dict(zip(one.labels, row, strict=True)) for row in scores]
        return [
            Prediction(label, _get_score(one, label, probs), probs, numbers)
            for label, probs, numbers in zip(decided["predictions"], named, raw, strict=True)
        ]


def _get_score(one: HeadSettings, label: Any, probs: dict[Any, float]) -> float:
    if one.task == "binary":
        return probs[one.labels[1]]
    return max(probs.values()) if one.task == "multilabel" else probs[label]
