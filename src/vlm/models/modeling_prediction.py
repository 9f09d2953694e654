"""A vision-language model that predicts: heads read the hidden states of a body, composed or of a family.

Hub code: imports torch, transformers and its siblings only.

Shapes: B rows, T tokens a row, D text width, K numbers of a head, C labels (see `head_tasks.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_prediction import HeadSettings, VLMPredictionConfig, is_composed
from .head_losses import head_loss
from .head_tasks import CLASSIFICATION_TASKS, EMBEDDING, choose_labels, probabilities
from .heads import HEADS, PredictionHead
from .modeling_vlm import VLMForConditionalGeneration, has_trainable_parameters
from .poolings import TokenMasks, pool_hidden_states
from .sentence_embedding import write_sentence_transformers_files
from .text_loss import SupervisedScores, mean_loss
from .wrapper import WrapperModel, copy_class_file, load_travelling_class


@dataclass
class VLMPredictionOutput(ModelOutput):
    """The result of a forward pass.

    Args:
        loss: the weighted sum of the heads' losses, plus that of replies where they are learned; a scalar.
        logits: `(B, K)` of the first head.
        outputs: name -> `(B, K)` of each head.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    outputs: dict[str, Tensor] | None = None


class VLMForPrediction(WrapperModel):
    """Heads on the hidden states of a vision-language model at a prompt.

    Args:
        config: body and heads.
        body: a loaded vision-language model; by default built from `config.body_config`.
    """

    config_class = VLMPredictionConfig
    base_model_prefix = "vlm_prediction"
    wrapped = "body"
    _keep_in_fp32_modules_strict = ["heads"]  # noqa: RUF012 - as transformers declares it; thresholds are for these
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: VLMPredictionConfig, body: PreTrainedModel | None = None):
        super().__init__(config)
        if body is None:
            config.body_config.name_or_path = config.name_or_path  # where the code of a body lies
        self.body = make_body(config.body_config) if body is None else body
        config.body_config = self.body.config
        self.reply_losses = SupervisedScores(self.body)
        if type(self).__module__.startswith("transformers_modules."):  # loaded from the checkpoint, as its heads are
            for head in config.settings:
                if head.type not in HEADS:
                    reference = config.auto_map[f"Head.{head.name}"]
                    HEADS[head.type] = load_travelling_class(reference, str(config.name_or_path))
        width = config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({head.name: PredictionHead(width, head) for head in config.settings})
        self.post_init()

    def train(self, mode: bool = True) -> "VLMForPrediction":
        """Set training mode; a frozen body stays in evaluation mode."""
        if has_trainable_parameters(self.body):
            super().train(mode)
            return self
        self.training = mode
        self.heads.train(mode)
        if self.body.training:  # walking through all its modules at every step would cost more than the heads do
            self.body.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Mapping[str, Tensor] | None = None,
        groups: Tensor | None = None,
        text_labels: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        **inputs,
    ) -> VLMPredictionOutput:
        """Run the model; vocabulary logits are computed only for supervised positions of replies.

        Args:
            input_ids: `(B, T)`: prompts that wait for an answer, followed by `config.suffix`.
            attention_mask: `(B, T)`, 0 at padding.
            labels: head -> `(B, C)` for `multilabel`, else `(B, 1)` or `(B,)`: the index of the label, or the number of
                a regression; NaN where a row has none. A tensor is for the first head.
            groups: `(B,)`: `pairwise` compares rows of the same group; of `embedding`, see `contrastive.contrastive`.
            text_labels: `(B, T)`: labels of the replies that the body learns, -100 elsewhere.
            prompt_mask: `(B, T)`: 1 at tokens of the prompt, where a reply follows it.
            features: head -> output of `features`, in place of all inputs of the body; with `attention_mask` where a
                head needs every token.
            inputs: further inputs of the body, such as `pixel_values`.

        Raises:
            ValueError: an argument that belongs to another is missing, a head is unknown, or a row has no token that a
                head reads.
        """
        if text_labels is not None and prompt_mask is None:
            raise ValueError(
                "give prompt_mask with text_labels: heads do not read the replies that stand behind prompts"
            )
        loss = None
        if features is None:
            if input_ids is None:
                raise ValueError("give input_ids, or features")
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            states, reply_loss = self._hidden_states_by_layer(input_ids, real, text_labels, inputs)
            features, prompt = self._read_head_features(states, input_ids, real if prompt_mask is None else prompt_mask)
            if reply_loss is not None:
                loss = self.config.generation_weight * reply_loss
        else:
            prompt = None if attention_mask is None else attention_mask.bool()
        outputs = {name: head(features[name], prompt) for name, head in self.heads.items()}
        if labels is not None:
            head_loss = self._weighted_head_loss(outputs, labels, groups)
            loss = head_loss if loss is None else loss + head_loss
        return VLMPredictionOutput(loss=loss, logits=next(iter(outputs.values())), outputs=outputs)

    def features(self, input_ids: Tensor, attention_mask: Tensor, **inputs) -> dict[str, Tensor]:
        """Return the features of prompts for `forward`: head -> `(B, D)`, or `(B, T, D)` where it needs every token.

        Args:
            input_ids: as in `forward`.
            attention_mask: `(B, T)`, 0 at padding.
            inputs: further inputs of the body, such as `pixel_values`.

        Raises:
            ValueError: a row has no token that a head reads.
        """
        states, _ = self._hidden_states_by_layer(input_ids, attention_mask, None, inputs)
        return self._read_head_features(states, input_ids, attention_mask)[0]

    def _read_head_features(
        self, states: dict[int | None, Tensor], input_ids: Tensor, prompt_and_suffix_mask: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features that each head reads of hidden states, and the mask of the prompt without its suffix."""
        prompt_and_suffix = prompt_and_suffix_mask.bool()
        prompt = prompt_and_suffix & ~torch.isin(input_ids, input_ids.new_tensor(self.config.suffix_ids))
        media = torch.isin(input_ids, input_ids.new_tensor(self.config.media_token_ids)) & prompt
        features = {}
        for settings in self.config.settings:
            token_id = -1 if settings.token_id is None else settings.token_id
            masks = TokenMasks(prompt, media, prompt_and_suffix & (input_ids == token_id))
            features[settings.name] = pool_hidden_states(settings.pooling, states[settings.layer], masks)
        return features, prompt

    def _hidden_states_by_layer(
        self, input_ids: Tensor, attention_mask: Tensor, text_labels: Tensor | None, inputs: dict[str, Tensor]
    ) -> tuple[dict[int | None, Tensor], Tensor | None]:
        """Return the hidden states that heads read, by layer, each `(B, T, D)`, and the loss of replies, if any."""
        body: Any = self.body
        layers = {settings.layer for settings in self.config.settings}
        arguments = {**inputs, "input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        composed = is_composed(self.config.body_config)
        if composed:
            arguments["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_trainable_parameters(body)):
            if text_labels is None:
                decode = body.decode if composed else body.base_model  # without the vocabulary head
                output = decode(**arguments, output_hidden_states=layers != {None})
                last, loss = output.last_hidden_state, None
            else:
                losses, _, output = self.reply_losses(
                    {**arguments, "labels": text_labels, "output_hidden_states": True}
                )
                last, loss = output.hidden_states[-1], mean_loss(losses, None)
        return {layer: last if layer is None else output.hidden_states[layer] for layer in layers}, loss

    def _weighted_head_loss(
        self, outputs: dict[str, Tensor], labels: Tensor | Mapping[str, Tensor], groups: Tensor | None
    ) -> Tensor:
        """Return the weighted sum of the heads' losses."""
        named = labels if isinstance(labels, Mapping) else {self.config.settings[0].name: labels}
        if not named or named.keys() - self.heads.keys():
            raise ValueError(f"labels of {', '.join(named) or 'no head'}: the heads are {', '.join(self.heads.keys())}")
        losses = []
        for head in self.config.settings:
            if head.name in named:
                loss = head_loss(
                    head.task,
                    head.loss,
                    (outputs[head.name] - head.shift) / head.scale,
                    (named[head.name].float() - head.shift) / head.scale,
                    groups=groups,
                    weights=head.class_weights,
                    smoothing=head.label_smoothing,
                    options=self.head(head.name).loss_options(),
                )
                losses.append(head.weight * loss)
        return torch.stack(losses).sum()

    def head(self, name: str) -> PredictionHead:
        """Return a head."""
        return cast(PredictionHead, self.heads[name])

    @torch.no_grad()
    def predict(self, **inputs) -> dict[str, dict[str, Any]]:
        """Return the heads' predictions for prompts, with the temperature and threshold chosen in training.

        Args:
            inputs: those of `forward`.

        Returns:
            Head -> `scores` `(B, C)` (probabilities of labels) or `(B,)` (numbers), and `predictions`: for each row a
            label, the list of labels of `multilabel`, or the number. For `embedding`, both are the vectors.

        Raises:
            ValueError: as `forward`.
        """
        outputs = self(**inputs).outputs
        return {head.name: interpret_outputs(head, outputs[head.name]) for head in self.config.settings}

    def save_custom_code(self, save_directory) -> None:
        """Copy the files of a user's own classes, if there are any, and what sentence-transformers needs of vectors."""
        if is_composed(self.body.config):
            cast(VLMForConditionalGeneration, self.body).save_custom_code(save_directory)
        for number, settings in enumerate(self.config.settings):
            if ":" in settings.type:  # package.module:Class, not a name of the table
                kind = type(self.heads[settings.name].layers)
                copy = Path(save_directory, f"user_head_{number}.py")
                self.config.auto_map[f"Head.{settings.name}"] = copy_class_file(kind, copy)
        if (first := self.config.settings[0]).task == EMBEDDING:
            write_sentence_transformers_files(first.prompts, save_directory)


def make_body(config: PreTrainedConfig) -> Any:
    """Build a vision-language model from a configuration, without weights; all of it in the configuration's dtype."""
    propagate_dtype(config)
    if is_composed(config):
        return VLMForConditionalGeneration(config)  # pyright: ignore[reportArgumentType] - by name, see is_composed
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return (AutoModelForImageTextToText if known else AutoModelForCausalLM).from_config(config)


def propagate_dtype(config: PreTrainedConfig) -> None:
    """Set the dtype on nested configurations, from which parts are built; transformers does so for one level only."""
    for name in config.sub_configs:
        if (nested := getattr(config, name, None)) is not None:
            nested.dtype = config.dtype
            propagate_dtype(nested)


def interpret_outputs(head: HeadSettings, outputs: Tensor) -> dict[str, Any]:
    """Turn a head's outputs `(B, K)` into scores and predictions, see `VLMForPrediction.predict`."""
    if head.task == EMBEDDING:
        return {"scores": outputs, "predictions": outputs.tolist()}
    if head.task not in CLASSIFICATION_TASKS:
        return {"scores": outputs[:, 0], "predictions": outputs[:, 0].tolist()}
    scores = probabilities(head.task, outputs, head.temperature)
    decisions = choose_labels(head.task, scores, head.threshold).tolist()
    if head.task == "multilabel":
        return {"scores": scores, "predictions": [list(compress(head.labels, row)) for row in decisions]}
    return {"scores": scores, "predictions": [head.labels[number] for number in decisions]}
