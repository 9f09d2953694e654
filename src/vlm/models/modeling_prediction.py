"""A vision-language model that predicts: heads read the hidden states of a body, composed or of a family.

Hub code: imports torch, transformers and its siblings only.

Shapes: B rows, T tokens a row, D text width, K numbers of a head, C labels (see `head_tasks.py`).
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

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
    """What a forward pass returns.

    Args:
        loss: the weighted sum of the heads' losses, and of that of the replies where they are learned; a scalar.
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
        body: a loaded vision-language model; None builds one from `config.body_config`.
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

    def __init__(self, config: VLMPredictionConfig, body: Any = None):
        super().__init__(config)
        if body is None:
            config.body_config.name_or_path = config.name_or_path  # where code that travels with a body lies
        self.body = make_body(config.body_config) if body is None else body
        config.body_config = self.body.config
        width = config.get_text_config().hidden_size
        for one in config.settings:
            self._register_remote_head(one)
        self.heads = nn.ModuleDict({one.name: make_head(one, width) for one in config.settings})
        self.post_init()

    def _register_remote_head(self, one: HeadSettings) -> None:
        """Put a head class that travels with the checkpoint in the table, where this code does too."""
        if one.type not in HEADS and type(self).__module__.startswith("transformers_modules."):
            reference = self.config.auto_map[f"Head.{one.name}"]
            HEADS[one.type] = get_class_from_dynamic_module(reference, str(self.config.name_or_path))

    def _init_weights(self, module: nn.Module) -> None:
        """The body initialises itself; a head's modules keep PyTorch's own initialisation."""
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def get_input_embeddings(self) -> nn.Module:
        """The body's."""
        return self.body.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the body other ones."""
        self.body.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The body's vocabulary head."""
        return self.body.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the body another one."""
        self.body.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """The body's language model without its vocabulary head."""
        return self.body.get_decoder()

    def train(self, mode: bool = True) -> "VLMForPrediction":
        """As usual, but a body of which nothing trains stays in evaluation mode."""
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
        """One pass of the model; vocabulary logits are computed for supervised positions of replies alone.

        Args:
            input_ids: `(B, T)`: prompts that wait for an answer, with `config.suffix` behind them.
            attention_mask: `(B, T)`, 0 at padding.
            labels: head -> `(B, C)` for `multilabel`, else `(B, 1)` or `(B,)`: the number of the label, or the number
                itself; NaN where a row has none. A tensor is the first head's.
            groups: `(B,)`: rows that `pairwise` compares.
            text_labels: `(B, T)`: what the body learns to write, -100 elsewhere.
            prompt_mask: `(B, T)`: 1 at tokens of the prompt where a reply stands behind it.
            features: in place of everything that the body reads: head -> what `features` gave; with `attention_mask`
                where a head needs every token.
            inputs: what else the body reads, such as `pixel_values`.

        Raises:
            ValueError: arguments that belong together are not all there, a head is not known, or a row has nothing
                that a head reads.
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
            found = self._weighted_head_loss(outputs, labels, groups)
            loss = found if loss is None else loss + found
        return VLMPredictionOutput(loss=loss, logits=next(iter(outputs.values())), outputs=outputs)

    def features(self, input_ids: Tensor, attention_mask: Tensor, **inputs) -> dict[str, Tensor]:
        """What the heads read of prompts, for `forward`: head -> `(B, D)`, or `(B, T, D)` where every token counts."""
        states, _ = self._hidden_states_by_layer(input_ids, attention_mask, None, inputs)
        prompt_and_suffix_mask = attention_mask.bool()
        return self._read_head_features(
            states, input_ids, prompt_and_suffix_mask, self._mask_suffix(input_ids, prompt_and_suffix_mask)
        )

    def _mask_suffix(self, input_ids: Tensor, prompt_and_suffix_mask: Tensor) -> Tensor:
        """Which tokens are the prompt's, without those that heads of their own read at: `(B, T), (B, T) -> (B, T)`."""
        return prompt_and_suffix_mask & ~torch.isin(input_ids, input_ids.new_tensor(self.config.suffix_ids))

    def _read_head_features(
        self, states: dict[int | None, Tensor], input_ids: Tensor, prompt_and_suffix_mask: Tensor, prompt: Tensor
    ) -> dict[str, Tensor]:
        """What each head reads of hidden states; `prompt` is without the tokens that are other heads' own."""
        media = torch.isin(input_ids, input_ids.new_tensor(self.config.media_token_ids)) & prompt
        found = {}
        for one in self.config.settings:
            wanted = prompt_and_suffix_mask & (input_ids == (-1 if one.token_id is None else one.token_id))
            head: Any = self.heads[one.name]
            found[one.name] = head.features(states[one.layer], TokenMasks(prompt, media, wanted))
        return found

    def _hidden_states_by_layer(
        self, input_ids: Tensor, attention_mask: Tensor, text_labels: Tensor | None, inputs: dict[str, Any]
    ) -> tuple[dict[int | None, Tensor], Tensor | None]:
        """The hidden states that heads read, by layer: each `(B, T, D)`; and the loss of replies, where there are."""
        layers = {one.layer for one in self.config.settings}
        inputs = {**inputs, "input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if is_composed(self.config.body_config):
            inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        needs_gradients = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.body.parameters()
        )
        with torch.set_grad_enabled(needs_gradients):
            if text_labels is None:
                output = run_decoder(self.body, **inputs, output_hidden_states=layers != {None})
                last, loss = output.last_hidden_state, None
            else:
                targets = F.pad(text_labels, (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T): what each position predicts
                keep = targets != IGNORE_INDEX
                output = self.body(**inputs, logits_to_keep=keep, output_hidden_states=True)
                last, loss = output.hidden_states[-1], supervised_loss(output.logits, targets[keep], None)
        return {layer: last if layer is None else output.hidden_states[layer] for layer in layers}, loss

    def _weighted_head_loss(self, outputs: dict[str, Tensor], labels: Any, groups: Tensor | None) -> Tensor:
        """The weighted sum of the heads' losses."""
        named = labels if isinstance(labels, Mapping) else {self.config.settings[0].name: labels}
        if not named or named.keys() - self.heads.keys():
            raise ValueError(f"labels of {', '.join(named) or 'no head'}: the heads are {', '.join(self.heads.keys())}")
        total = []
        for one in self.config.settings:
            if one.name in named:
                losses = head_loss(
                    one.task, one.loss, (outputs[one.name] - one.shift) / one.scale,
                    (named[one.name].float() - one.shift) / one.scale, groups=groups, weights=one.class_weights,
                    smoothing=one.label_smoothing, options=one.loss_options,
                )  # fmt: skip
                total.append(one.weight * losses)
        return torch.stack(total).sum()

    @torch.no_grad()
    def predict(self, **inputs) -> dict[str, dict[str, Any]]:
        """What the heads say of prompts, by the temperature and threshold that were chosen in training.

        Args:
            inputs: as `forward`.

        Returns:
            Head -> `scores` `(B, C)` (probabilities of labels) or `(B,)` (numbers), and `predictions`: for each row a
            label, the labels that hold of `multilabel`, or the number.
        """
        outputs = self(**inputs).outputs
        return {one.name: interpret_outputs(one, outputs[one.name]) for one in self.config.settings}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As usual; the files of connector and head classes of the user's own travel with the hub code."""
        self.save_custom_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def save_custom_code(self, save_directory) -> None:
        """Copy the files of classes of the user's own, if there are any, and note them in the configuration."""
        if is_composed(self.body.config):
            self.body.save_custom_code(save_directory)
        for number, one in enumerate(self.config.settings):
            head: Any = self.heads[one.name]
            source = sys.modules[type(head.layers).__module__].__file__
            if ":" in one.type and source is not None:  # package.module:Class, not a name of the table
                copy = Path(save_directory, f"user_head_{number}.py")
                copy.parent.mkdir(parents=True, exist_ok=True)
                if copy.resolve() != Path(source).resolve():
                    copyfile(source, copy)
                self.config.auto_map[f"Head.{one.name}"] = f"{copy.stem}.{type(head.layers).__name__}"


def make_body(config: PreTrainedConfig) -> Any:
    """A vision-language model of a configuration, without weights; all of it in the configuration's dtype."""
    propagate_dtype(config)
    if is_composed(config):
        return VLMForConditionalGeneration(config)  # pyright: ignore[reportArgumentType] - by name, see is_composed
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return (AutoModelForImageTextToText if known else AutoModelForCausalLM).from_config(config)


def propagate_dtype(config: PreTrainedConfig) -> None:
    """Give nested configurations, by which parts are built, the dtype: transformers does so for one level only."""
    for name in config.sub_configs:
        if (nested := getattr(config, name, None)) is not None:
            nested.dtype = config.dtype
            propagate_dtype(nested)


def make_head(one: HeadSettings, width: int) -> PredictionHead:
    """A head with fresh weights."""
    return PredictionHead(
        width, task=one.task, num_labels=len(one.labels), pooling=one.pooling, type=one.type, options=one.options,
        shift=one.shift, scale=one.scale,
    )  # fmt: skip


def run_decoder(body: Any, **inputs) -> Any:
    """A body's language model over text and pictures, without its vocabulary head: has `last_hidden_state`."""
    if is_composed(body.config):
        return body.decode(**inputs)
    return body.base_model(**inputs)


def interpret_outputs(one: HeadSettings, outputs: Tensor) -> dict[str, Any]:
    """What a head's numbers `(B, K)` mean: see `VLMForPrediction.predict`."""
    if one.task not in CLASSIFICATION_TASKS:
        return {"scores": outputs[:, 0], "predictions": outputs[:, 0].tolist()}
    label_probabilities = probabilities(one.task, outputs, one.temperature)
    decisions = choose_labels(one.task, label_probabilities, one.threshold)
    if one.task == "multilabel":
        rows = [[label for label, holds in zip(one.labels, row, strict=True) if holds] for row in decisions.tolist()]
        return {"scores": label_probabilities, "predictions": rows}
    return {"scores": label_probabilities, "predictions": [one.labels[number] for number in decisions.tolist()]}
