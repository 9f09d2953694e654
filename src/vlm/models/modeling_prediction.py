"""A vision-language model that predicts: heads read the hidden states of a body, composed or of a family.

Hub code: imports torch, transformers and its siblings only.

Shapes: B rows, T tokens a row, D text width, K numbers of a head, C labels (see `head_tasks.py`).
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import ModelOutput

from .configuration_prediction import HeadSettings, VLMPredictionConfig, is_composed
from .head_losses import head_loss
from .head_tasks import CLASSIFICATION_TASKS, choose_labels, probabilities
from .heads import HEADS, PredictionHead
from .modeling_vlm import IGNORE_INDEX, VLMForConditionalGeneration, supervised_loss
from .poolings import TokenMasks


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


class VLMForPrediction(PreTrainedModel):
    """Heads on the hidden states of a vision-language model at a prompt.

    Args:
        config: body and heads.
        body: a loaded vision-language model; by default built from `config.body_config`.
    """

    config_class = VLMPredictionConfig
    base_model_prefix = "vlm_prediction"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - as transformers declares it
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["heads"]  # noqa: RUF012 - as transformers declares it; thresholds are for these
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: VLMPredictionConfig, body: PreTrainedModel | None = None):
        super().__init__(config)
        if body is None:
            config.body_config.name_or_path = config.name_or_path  # where the code of a body lies
        self.body = make_body(config.body_config) if body is None else body
        config.body_config = self.body.config
        width = config.get_text_config().hidden_size
        for settings in config.settings:
            self._register_remote_head(settings)
        self.heads = nn.ModuleDict({settings.name: make_head(settings, width) for settings in config.settings})
        self.post_init()

    def _register_remote_head(self, settings: HeadSettings) -> None:
        """Add a head class of the checkpoint to the table, where this code itself is loaded from the checkpoint."""
        if settings.type not in HEADS and type(self).__module__.startswith("transformers_modules."):
            reference = self.config.auto_map[f"Head.{settings.name}"]
            HEADS[settings.type] = get_class_from_dynamic_module(reference, str(self.config.name_or_path))

    def _init_weights(self, module: nn.Module) -> None:
        """The body initialises itself; a head's modules keep PyTorch's own initialisation."""
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def get_input_embeddings(self) -> nn.Module:
        """Return the body's input embeddings."""
        return self.body.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the body's input embeddings."""
        self.body.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the body's vocabulary head."""
        return self.body.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the body's vocabulary head."""
        self.body.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Return the body's language model without its vocabulary head."""
        return self.body.get_decoder()

    def train(self, mode: bool = True) -> "VLMForPrediction":
        """Set training mode; a frozen body stays in evaluation mode."""
        if any(parameter.requires_grad for parameter in self.body.parameters()):
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
            groups: `(B,)`: `pairwise` compares rows of the same group.
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
            real = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
            states, reply_loss = self._hidden_states_by_layer(input_ids, real, text_labels, inputs)
            prompt = (real if prompt_mask is None else prompt_mask).bool()
            prompt_and_suffix_mask, prompt = prompt, self._mask_suffix(input_ids, prompt)
            features = self._read_head_features(states, input_ids, prompt_and_suffix_mask, prompt)
            if text_labels is not None:
                loss = self.config.generation_weight * reply_loss
        else:
            prompt = None if attention_mask is None else attention_mask.bool()
        outputs = {name: head(features[name], prompt) for name, head in self.heads.items()}
        if labels is not None:
            head_loss = self._weighted_head_loss(outputs, labels, groups)
            loss = head_loss if loss is None else loss + head_loss
        return VLMPredictionOutput(loss=loss, logits=next(iter(outputs.values())), outputs=outputs)

    def features(self, input_ids: Tensor, attention_mask: Tensor, **inputs) -> dict[str, Tensor]:
        """Return the features of prompts for `forward`: head -> `(B, D)`, or `(B, T, D)` where it needs every token."""
        states, _ = self._hidden_states_by_layer(input_ids, attention_mask, None, inputs)
        prompt_and_suffix_mask = attention_mask.bool()
        return self._read_head_features(
            states, input_ids, prompt_and_suffix_mask, self._mask_suffix(input_ids, prompt_and_suffix_mask)
        )

    def _mask_suffix(self, input_ids: Tensor, prompt_and_suffix_mask: Tensor) -> Tensor:
        """Return the mask of the prompt without the tokens of `config.suffix`: `(B, T), (B, T) -> (B, T)`."""
        return prompt_and_suffix_mask & ~torch.isin(input_ids, input_ids.new_tensor(self.config.suffix_ids))

    def _read_head_features(
        self, states: dict[int | None, Tensor], input_ids: Tensor, prompt_and_suffix_mask: Tensor, prompt: Tensor
    ) -> dict[str, Tensor]:
        """Return the features that each head reads of hidden states; `prompt` is without the tokens of the suffix."""
        media = torch.isin(input_ids, input_ids.new_tensor(self.config.media_token_ids)) & prompt
        features = {}
        for settings in self.config.settings:
            token_id = -1 if settings.token_id is None else settings.token_id
            masks = TokenMasks(prompt, media, prompt_and_suffix_mask & (input_ids == token_id))
            head = self.heads[settings.name]
            assert isinstance(head, PredictionHead)
            features[settings.name] = head.features(states[settings.layer], masks)
        return features

    def _hidden_states_by_layer(
        self, input_ids: Tensor, attention_mask: Tensor, text_labels: Tensor | None, inputs: dict[str, Tensor]
    ) -> tuple[dict[int | None, Tensor], Tensor | None]:
        """Return the hidden states that heads read, by layer, each `(B, T, D)`, and the loss of replies, if any."""
        layers = {settings.layer for settings in self.config.settings}
        arguments = {**inputs, "input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if is_composed(self.config.body_config):
            arguments["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        needs_gradients = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.body.parameters()
        )
        with torch.set_grad_enabled(needs_gradients):
            if text_labels is None:
                output = run_decoder(self.body, **arguments, output_hidden_states=layers != {None})
                last, loss = output.last_hidden_state, None
            else:
                targets = F.pad(text_labels, (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T): what each position predicts
                keep = targets != IGNORE_INDEX
                output = self.body(**arguments, logits_to_keep=keep, output_hidden_states=True)
                last, loss = output.hidden_states[-1], supervised_loss(output.logits, targets[keep], None)
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
                    head.task, head.loss, (outputs[head.name] - head.shift) / head.scale,
                    (named[head.name].float() - head.shift) / head.scale, groups=groups, weights=head.class_weights,
                    smoothing=head.label_smoothing, options=head.loss_options,
                )  # fmt: skip
                losses.append(head.weight * loss)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def predict(self, **inputs) -> dict[str, dict[str, Any]]:
        """Return the heads' predictions for prompts, with the temperature and threshold chosen in training.

        Args:
            inputs: those of `forward`.

        Returns:
            Head -> `scores` `(B, C)` (probabilities of labels) or `(B,)` (numbers), and `predictions`: for each row a
            label, the list of labels of `multilabel`, or the number.
        """
        outputs = self(**inputs).outputs
        return {head.name: interpret_outputs(head, outputs[head.name]) for head in self.config.settings}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the model, with the files of a user's own connector and head classes beside the hub code."""
        self.save_custom_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def save_custom_code(self, save_directory) -> None:
        """Copy the files of a user's own classes, if there are any, and note them in the configuration."""
        if is_composed(self.body.config):
            cast(VLMForConditionalGeneration, self.body).save_custom_code(save_directory)
        for number, settings in enumerate(self.config.settings):
            head = self.heads[settings.name]
            assert isinstance(head, PredictionHead)
            source = sys.modules[type(head.layers).__module__].__file__
            if ":" in settings.type and source is not None:  # package.module:Class, not a name of the table
                copy = Path(save_directory, f"user_head_{number}.py")
                copy.parent.mkdir(parents=True, exist_ok=True)
                if copy.resolve() != Path(source).resolve():
                    copyfile(source, copy)
                self.config.auto_map[f"Head.{settings.name}"] = f"{copy.stem}.{type(head.layers).__name__}"


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


def make_head(settings: HeadSettings, width: int) -> PredictionHead:
    """Make a head with new weights."""
    return PredictionHead(
        width, task=settings.task, num_labels=len(settings.labels), pooling=settings.pooling, type=settings.type,
        options=settings.options, shift=settings.shift, scale=settings.scale,
    )  # fmt: skip


def run_decoder(body: PreTrainedModel, **inputs) -> Any:
    """Run a body over text and images without its vocabulary head; the output has `last_hidden_state`."""
    if is_composed(body.config):
        return cast(VLMForConditionalGeneration, body).decode(**inputs)
    return body.base_model(**inputs)


def interpret_outputs(head: HeadSettings, outputs: Tensor) -> dict[str, Any]:
    """Turn a head's outputs `(B, K)` into scores and predictions, see `VLMForPrediction.predict`."""
    if head.task not in CLASSIFICATION_TASKS:
        return {"scores": outputs[:, 0], "predictions": outputs[:, 0].tolist()}
    label_probabilities = probabilities(head.task, outputs, head.temperature)
    decisions = choose_labels(head.task, label_probabilities, head.threshold)
    if head.task == "multilabel":
        rows = [[label for label, holds in zip(head.labels, row, strict=True) if holds] for row in decisions.tolist()]
        return {"scores": label_probabilities, "predictions": rows}
    return {"scores": label_probabilities, "predictions": [head.labels[number] for number in decisions.tolist()]}
