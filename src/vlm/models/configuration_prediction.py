"""The configuration of a model with prediction heads: its body's, nested as it is, and what each head does.

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
"""Which class answers for which auto class where a checkpoint's own code is trusted."""


@dataclass
class HeadSettings:
    """One head, as a checkpoint holds it.

    Attributes:
        name: what it is called.
        task: a name of `TASKS`.
        labels: what it chooses among, in the order of its numbers.
        type: a name of `HEADS`, or `package.module:Class`.
        options: that class's keyword parameters.
        pooling: a name of `POOLINGS`.
        layer: index into `hidden_states`; None: the last.
        token_id: the token that it reads at, where its pooling has one.
        shift: of `regression`: the mean of the training labels.
        scale: of `regression`: their standard deviation.
        loss: how it was trained.
        loss_options: the loss's keyword parameters.
        class_weights: what each label counts in the loss.
        label_smoothing: share of a target that is spread over all labels.
        weight: what its loss counts among those of several heads.
        temperature: what its logits are divided by before they become probabilities.
        threshold: from which probability on a label is decided; one for each label of `multilabel`.
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


class VLMPredictionConfig(PreTrainedConfig):
    """Configuration of `VLMForPrediction`.

    Args:
        body_config: configuration of the vision-language model, with its `model_type`.
        heads: the fields of `HeadSettings` of each head; the first one's numbers are the model's `logits`.
        media_token_ids: ids that stand for features of pictures and videos.
        suffix: what stands behind every prompt, as text: the tokens of heads that read at one of their own.
        suffix_ids: its ids.
        generation_weight: what the loss of replies counted in training beside the heads'.
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
            del known["AutoProcessor"]  # a family's own says in its own file what it is
        kwargs.setdefault("auto_map", known)
        kwargs["tie_word_embeddings"] = False  # the body ties its own, nested
        super().__init__(**kwargs)

    sub_configs = {"body_config": AutoConfig}  # noqa: RUF012 # pyright: ignore[reportAssignmentType] - as transformers does

    @property
    def settings(self) -> list[HeadSettings]:
        """The heads."""
        return [HeadSettings(**head) for head in self.heads]

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's."""
        return self.body_config.get_text_config(*args, **kwargs)


def is_composed(config: PreTrainedConfig) -> bool:
    """Whether a body is composed of parts, not a family's.

    By name: of code that travels with a checkpoint, transformers imports one copy for configurations and another for
    models, whose classes differ.
    """
    return config.model_type == VLMConfig.model_type


def copy_body_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """A body's configuration as an object of its own: what `PreTrainedConfig` sets on it touches no loaded model."""
    if isinstance(config, PreTrainedConfig):
        return deepcopy(config)
    values = dict(config or {})
    composed = values.get("model_type", VLMConfig.model_type) == VLMConfig.model_type
    return VLMConfig(**values) if composed else as_config(values, VLMConfig.model_type)
