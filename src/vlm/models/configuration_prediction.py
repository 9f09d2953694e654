"""The configuration of a model with prediction heads: its body's, nested unchanged, and the settings of each head.

Hub code: imports transformers and its siblings only.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_vlm import VLMConfig, as_config

AUTO_MAP = {
    "AutoConfig": "configuration_prediction.VLMPredictionConfig",
    "AutoModel": "modeling_prediction.VLMForPrediction",
    "AutoModelForSequenceClassification": "modeling_prediction.VLMForPrediction",
    "AutoProcessor": "processing_vlm.VLMProcessor",
}
"""Auto class -> the class to load where a checkpoint's own code is trusted."""


@dataclass
class HeadSettings:
    """The settings of one head in a checkpoint.

    Attributes:
        name: its name.
        task: a name of `head_tasks.TASKS`.
        labels: the labels, in the order of its outputs.
        type: a name of `HEADS`, or `package.module:Class`.
        options: the keyword parameters of that class.
        pooling: a name of `POOLINGS`.
        layer: index into `hidden_states`; None for the last.
        token_id: the token that it reads at, for poolings that have one.
        shift: the mean of the training labels of `regression`.
        scale: the standard deviation of the training labels of `regression`.
        loss: the loss that it was trained with.
        loss_options: the keyword parameters of the loss.
        class_weights: the weight of each label in the loss.
        label_smoothing: the share of a target that is spread over all labels.
        weight: the weight of its loss among those of several heads.
        temperature: the divisor of its logits before they become probabilities.
        threshold: the least probability at which a label is chosen; one for each label of `multilabel`.
        dim: how many numbers a vector of `embedding` has; None: as many as hidden states.
        prompts: of `embedding`: `query` and `document` -> the system turn of what is searched by, and searched for.
    """

    name: str
    task: str
    labels: list[Any] = field(default_factory=list)
    type: str = "linear"
    options: dict[str, Any] = field(default_factory=dict)
    pooling: str = "last"
    layer: int | None = None
    token_id: int | None = None
    shift: float = 0.0
    scale: float = 1.0
    loss: str = ""
    loss_options: dict[str, Any] = field(default_factory=dict)
    class_weights: list[float] | None = None
    label_smoothing: float = 0.0
    weight: float = 1.0
    temperature: float = 1.0
    threshold: float | list[float] | None = None
    dim: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)


class VLMPredictionConfig(PreTrainedConfig):
    """Configuration of `VLMForPrediction`.

    Args:
        body_config: configuration of the vision-language model, with its `model_type`.
        heads: the fields of `HeadSettings` of each head; the outputs of the first one are the model's `logits`.
        media_token_ids: ids that stand for features of images and videos.
        suffix: the text at the end of every prompt: the tokens of heads that read at one of their own.
        suffix_ids: the ids of the suffix.
        generation_weight: the weight of the loss of replies in training, relative to that of the heads.
        recipe: the `model` section of the run that built it.
    """

    model_type = "vlm_prediction"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        body_config: dict | PreTrainedConfig | None = None,
        heads: Sequence[dict] = (),
        media_token_ids: Sequence[int] = (),
        suffix: str = "",
        suffix_ids: Sequence[int] = (),
        generation_weight: float = 0.0,
        recipe: dict | None = None,
        **kwargs,
    ):
        self.body_config = copy_body_config(body_config)
        self.heads = [asdict(HeadSettings(**head)) for head in heads]
        self.media_token_ids = list(media_token_ids)
        self.suffix = suffix
        self.suffix_ids = list(suffix_ids)
        self.generation_weight = generation_weight
        self.recipe = recipe or {}
        if self.heads and (labels := self.heads[0]["labels"]):
            kwargs["id2label"] = {number: str(label) for number, label in enumerate(labels)}
            kwargs["label2id"] = {str(label): number for number, label in enumerate(labels)}
        elif self.heads:
            kwargs["num_labels"] = 1
        known = dict(AUTO_MAP)
        if not is_composed(self.body_config):
            del known["AutoProcessor"]  # a family's processor names its class in its own file
        kwargs.setdefault("auto_map", known)
        kwargs["tie_word_embeddings"] = False  # the body ties its own, nested
        super().__init__(**kwargs)

    sub_configs = {"body_config": AutoConfig}  # noqa: RUF012 # pyright: ignore[reportAssignmentType] - as transformers does

    @property
    def settings(self) -> list[HeadSettings]:
        """The settings of the heads."""
        return [HeadSettings(**head) for head in self.heads]

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Return the language model's configuration."""
        return self.body_config.get_text_config(*args, **kwargs)


def is_composed(config: PreTrainedConfig) -> bool:
    """Return whether a body is composed of parts; by its name, since a checkpoint's classes may be imported twice."""
    return config.model_type == VLMConfig.model_type


def copy_body_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Return a copy of a body's configuration, so that what `PreTrainedConfig` sets on it affects no loaded model."""
    if isinstance(config, PreTrainedConfig):
        return deepcopy(config)
    values = dict(config or {})
    composed = values.get("model_type", VLMConfig.model_type) == VLMConfig.model_type
    return VLMConfig(**values) if composed else as_config(values, VLMConfig.model_type)
