"""Opens a checkpoint: finds out its kind, and loads its configuration, processor and weights.

`open_checkpoint` reads only the configuration; `Checkpoint.load_processor` and `Checkpoint.load_model` do the rest.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from vlm.assembly.adapter_base import WHOLE_CHECKPOINT, Base, base_recipe, read_base
from vlm.assembly.adapter_folder import add_trained_weights, is_adapter_checkpoint, local_folder
from vlm.assembly.compose import build_model, choose_attention, choose_template, compose
from vlm.assembly.config_checks import check_config, check_generation_config
from vlm.assembly.encoders import check_views
from vlm.assembly.family import check_is_family, get_auto_class, load_family_model, read_config
from vlm.assembly.foreign_config import check_reference
from vlm.assembly.heads import get_num_embeddings, grow_rows
from vlm.assembly.image_budget import limit_image_tokens
from vlm.assembly.loading import check_weights, load_complete
from vlm.assembly.model_kinds import (
    get_body,
    get_body_config,
    is_composed_config,
    is_prediction_config,
    is_prediction_model,
)
from vlm.assembly.opening import opening
from vlm.assembly.processor_trial import check_composed_processor, check_vocabulary, load_tried
from vlm.assembly.quantization import make_checkpoint_quantization
from vlm.checks.checkpoint import check_heads, checkpoint_problem
from vlm.checks.model import check_no_image_mode
from vlm.config.derived import BASE_FILE
from vlm.data.coordinates.table import AUTO, use_convention
from vlm.data.processor import Processor
from vlm.families.parts import get_part_names
from vlm.families.processing import load_family_processor
from vlm.families.row_by_row import keep_apart
from vlm.families.table import get_family
from vlm.models import VLMForConditionalGeneration, VLMForPrediction, VLMProcessor
from vlm.models.connectors import CONNECTORS, connector_class
from vlm.models.heads import HEADS, head_class

NEWLINE = ("image_newline.weight",)
"""The weight that a model has if images come in tiles."""


class CheckpointKind(StrEnum):
    """The kind of a checkpoint."""

    COMPOSED = "composed"
    """A model composed of a visual encoder, a connector and a language model."""
    FAMILY = "family"
    """A model of a family of the Hub."""
    PREDICTION = "prediction"
    """Prediction heads on a model of either kind."""
    ADAPTER = "adapter"
    """An adapter, or trained parts, that need the base on which they were trained."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configuration has been read.

    Attributes:
        name: a folder, or a name on the Hub.
        kind: its kind.
        config: the model's configuration; for an adapter, that of the complete model.
        revision: branch, tag or commit on the Hub; None: the default branch.
        trust_remote_code: whether code from the checkpoint may run.
        opened_from: the adapters that have led to this checkpoint as their base, in the order of opening.
    """

    name: str
    kind: CheckpointKind
    config: PreTrainedConfig
    revision: str | None = None
    trust_remote_code: bool = False
    opened_from: tuple[str, ...] = ()

    @property
    def body_config(self) -> PreTrainedConfig:
        """The configuration of the vision-language model, without prediction heads."""
        return get_body_config(self.config)

    @property
    def has_heads(self) -> bool:
        """Whether the model has prediction heads."""
        return is_prediction_config(self.config)

    def check_heads(self, *, expected: bool) -> None:
        """Raise ValueError if the model has unexpected prediction heads, or lacks expected ones."""
        check_heads(self.name, found=self.has_heads, expected=expected)

    def load_processor(self, template: str | None = None, image_mode: str | None = None) -> Processor:
        """Return the processor.

        Args:
            template: see `DatasetConfig.template`; None: the checkpoint's own.
            image_mode: see `DatasetConfig.image_mode`; None: the checkpoint's own.

        Raises:
            ValueError: there is no such template, or an image mode is given for a family, whose processor decides.
        """
        if is_composed_config(self.body_config):
            return self.load_composed_processor(template, image_mode)
        check_no_image_mode(image_mode, self.name)
        family = get_family(self.body_config.model_type)
        load = partial(load_family_processor, family=family, trust_remote_code=self.trust_remote_code)
        processor = load_tried(load, self.name, self.revision)
        if template is not None:
            processor.chat_template = choose_template(template, processor.own_template, self.name)
        use_convention(processor, AUTO, self.body_config.model_type)
        return processor

    def load_composed_processor(self, template: str | None = None, image_mode: str | None = None) -> VLMProcessor:
        """Return the processor of a composed model; see `load_processor`."""
        load = partial(VLMProcessor.from_pretrained, trust_remote_code=False)
        processor = load_tried(load, self.name, self.revision or "main")
        check_composed_processor(processor, self.body_config, self.name)
        if template is not None:
            processor.chat_template = choose_template(template, processor.own_template, self.name)
        if image_mode is not None:
            if image_mode != processor.image_mode and "native" in (image_mode, processor.image_mode):
                raise ValueError(
                    f"dataset.image_mode={image_mode}: {self.name} was trained on {processor.image_mode} images; set "
                    "it to null to keep this"
                )
            processor.image_mode = image_mode
        check_views(processor)
        use_convention(processor, AUTO, self.body_config.model_type)
        return processor

    def load_model(
        self,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        *,
        quantization: Mapping[str, str] | None = None,
        base_paths: Sequence[str] = (),
        merge: bool = True,
    ) -> PreTrainedModel:
        """Return the model with its weights.

        Args:
            dtype: precision of the weights; `auto`: as saved, or for an adapter as in its base.
            attn_implementation: see `ModelConfig`; None: transformers chooses.
            quantization: part -> `8bit` or `4bit`; an adapter is then not merged.
            base_paths: the present location of an adapter's base, see `read_base`.
            merge: whether an adapter is merged into the weights.

        Raises:
            ValueError: the options do not fit the checkpoint, weights are missing, or the base is missing, has changed
                or does not fit.
        """
        quantization = quantization or {}
        if self.trust_remote_code:
            self._register_remote_classes()
        if self.kind is CheckpointKind.ADAPTER:
            folder = local_folder(self.name)
            source = read_base(folder, base_paths)
            base = self._load_base(source, dtype, attn_implementation or "auto", quantization)
            with opening(folder, "its configuration"):
                model = _with_recorded_config(base, deepcopy(self.config))
            new_parts = [] if source.model is None else ["connector"]
            new_parts += ["head"] if is_prediction_model(model) and not is_prediction_model(base) else []
            part_of = get_part_names(model.config).part_of
            needed = [name for name, _ in model.named_parameters() if part_of(name) in new_parts]
            return add_trained_weights(model, folder, merge=merge and not quantization, needed=needed)
        if base_paths:
            raise ValueError(f"base={base_paths[0]}: {self.name} is a complete model; it needs no base")
        if self.kind is CheckpointKind.PREDICTION:
            if quantization:
                raise ValueError(
                    f"quantization={next(iter(quantization.values()))}: {self.name} has prediction heads; such a "
                    "checkpoint is loaded as it is, not quantised"
                )
            options: dict[str, Any] = {}
            if attn_implementation not in (None, "auto"):
                options["attn_implementation"] = attn_implementation
            options |= {"config": self.config, "revision": self.revision or "main"}
            model = load_complete(VLMForPrediction, self.name, dtype=dtype, **options)
            keep_apart(cast(nn.Module, model.body))
            return model
        return self._load_text_model(dtype, attn_implementation, quantization)

    def check_weights(self) -> None:
        """Raise ValueError if the files do not have the model's weights; only their headers are read.

        The weights of an adapter are checked when it is added to its base.
        """
        if self.kind is CheckpointKind.PREDICTION:
            check_weights(VLMForPrediction, self.name, self.config, self.revision)
        elif self.kind is CheckpointKind.COMPOSED:
            check_weights(VLMForConditionalGeneration, self.name, self.config, self.revision)
        elif self.kind is CheckpointKind.FAMILY:
            check_weights(get_auto_class(self.config), self.name, self.config, self.revision)

    def _load_text_model(
        self, dtype: torch.dtype | str, attn_implementation: str | None, quantization: Mapping[str, str]
    ) -> PreTrainedModel:
        """Return a model without heads."""
        bits = make_checkpoint_quantization(self.config, quantization)
        if not is_composed_config(self.config):
            if attn_implementation is not None:
                auto = get_auto_class(self.config)
                attn_implementation = choose_attention(attn_implementation, dtype, self.config, auto)
            return load_family_model(
                self.name,
                self.config,
                dtype=dtype,
                revision=self.revision,
                attention=attn_implementation,
                trust_remote_code=self.trust_remote_code,
                quantization_config=bits,
            )
        options: dict[str, Any] = {}
        if attn_implementation is not None:
            parts = {**dict.fromkeys(self.config.encoder_names, AutoModel), "text_config": AutoModelForCausalLM}
            options["attn_implementation"] = {
                name: choose_attention(attn_implementation, dtype, getattr(self.config, name), auto)
                for name, auto in parts.items()
            }
        recorded = read_config(self.name, self.name, self.revision)
        has_tiles, had_tiles = self.config.anyres is not None, getattr(recorded, "anyres", None) is not None
        return load_complete(
            VLMForConditionalGeneration,
            self.name,
            new=NEWLINE if has_tiles and not had_tiles else (),
            unused=NEWLINE if had_tiles and not has_tiles else (),
            config=self.config,
            dtype=dtype,
            revision=self.revision or "main",
            quantization_config=bits,
            **options,
        )

    def _load_base(
        self, base: Base, dtype: torch.dtype | str, attention: str, quantization: Mapping[str, str]
    ) -> PreTrainedModel:
        """Return the model that an adapter was trained on."""
        if base.model is not None:
            return _compose_base(base, dtype, quantization, trust_remote_code=self.trust_remote_code)
        source = base.sources[WHOLE_CHECKPOINT]
        opened_from = (*self.opened_from, str(Path(self.name).resolve()))
        if str(Path(source.name).resolve()) in opened_from:
            raise ValueError(
                f"{Path(self.name, BASE_FILE)} names {source.name}, which is trained on {self.name} itself"
            )
        whole = open_checkpoint(source.name, revision=source.revision, trust_remote_code=self.trust_remote_code)
        whole = replace(whole, opened_from=opened_from)
        if quantization and whole.kind is CheckpointKind.ADAPTER:
            raise ValueError(f"{whole.name} is an adapter itself; merge it before quantising: vlm merge-lora")
        return whole.load_model(dtype, attention, quantization=quantization)

    def load_for_inference(
        self,
        *,
        device: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        base: Sequence[str] = (),
        max_image_tokens: int | None = None,
    ) -> tuple[PreTrainedModel, Processor]:
        """Return the model in evaluation mode on its device, and its processor.

        Args:
            device: `cuda`, `cpu` …; None: a GPU if there is one.
            dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
            quantization: `8bit` or `4bit` for the language model, which bitsandbytes then places on a device.
            base: the present location of an adapter's base, if it has moved: a folder, or `part=folder` for each part.
            max_image_tokens: see `DatasetConfig`; None: the saved setting of the processor.

        Raises:
            ValueError: the options do not fit the checkpoint.
        """
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(place)
        processor = self.load_processor()
        if max_image_tokens is not None:
            adapter = self.name if self.kind is CheckpointKind.ADAPTER else None
            limit_image_tokens(processor, self.body_config, max_image_tokens, adapter)
        model = self.load_model(
            dtype if dtype == "auto" else getattr(torch, dtype),
            base_paths=base,
            quantization={} if quantization is None else {"language_model": quantization},
        )
        check_vocabulary(processor, model, self.name)
        if not self.has_heads and model.generation_config is not None:
            check_generation_config(model.generation_config, get_num_embeddings(model), self.name)
        if quantization is None:
            return model.to(place).eval(), processor  # pyright: ignore[reportArgumentType] - a decorator's signature
        if device is not None and torch.device(device).type != model.device.type:
            raise ValueError(f"device={device}: quantised weights are on {model.device.type} and cannot be moved")
        return model.eval(), processor

    def _register_remote_classes(self) -> None:
        """Register connector and head classes that are saved with the checkpoint, if there are any.

        Otherwise the checkpoint's own model code would do this, but this package uses its own model classes.
        """
        config, body = self.config, self.body_config

        def load(reference: str) -> Any:
            """Return the class that the checkpoint's code defines under this reference."""
            return get_class_from_dynamic_module(
                check_reference(reference, self.name), self.name, revision=self.revision
            )

        if is_prediction_config(config):
            for head in config.settings:
                if head.type not in HEADS and (reference := config.auto_map.get(f"Head.{head.name}")):
                    HEADS[head.type] = load(reference)
        if is_composed_config(body):
            kind, classes = body.connector["type"], {**body.auto_map, **config.auto_map}
            if kind not in CONNECTORS and "Connector" in classes:
                CONNECTORS[kind] = load(classes["Connector"])


def open_checkpoint(
    name: str | Path, *, key: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Find out the kind of a checkpoint; no weights are read.

    Args:
        name: a run's `final` folder, a model of a family, or a name on the Hub.
        key: the option that gave the name, for messages.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code from the checkpoint may run.

    Raises:
        ValueError: there is no checkpoint, or one of an unsupported kind.
    """
    name = str(name)
    if problem := checkpoint_problem(name, key):
        raise ValueError(problem)
    label = f"{key}={name}" if key else name
    config = read_config(name, label, revision, trust_remote_code=trust_remote_code)
    with opening(label, "its config.json"):
        check_config(config, label)
    if is_prediction_config(config):
        kind = CheckpointKind.PREDICTION
    elif is_composed_config(config):
        kind = CheckpointKind.COMPOSED
    else:
        check_is_family(config, label)
        kind = CheckpointKind.FAMILY
    if is_adapter_checkpoint(name):
        kind = CheckpointKind.ADAPTER
    return Checkpoint(name, kind, config, revision, trust_remote_code)


def check_device(name: str) -> None:
    """Raise ValueError if there is no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from error


def _compose_base(
    base: Base, dtype: torch.dtype | str, quantization: Mapping[str, str], *, trust_remote_code: bool
) -> PreTrainedModel:
    """Return a base that was composed of parts; the adapter's folder has the weights that are random here."""
    model = base_recipe(base, trust_remote_code=trust_remote_code)
    for part, kind in quantization.items():
        getattr(model, part).quantization = kind
    connector_class(model.connector.type)  # raises for a class of the user's own, which is not imported from here
    config, processor = compose(model, "plain", None)  # the template is of no account: the folder has its processor
    if isinstance(dtype, str):
        recorded = config.text_config.dtype
        dtype = recorded if isinstance(recorded, torch.dtype) else torch.float32
    return build_model(model, config, processor, dtype, seed=0)


def _with_recorded_config(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Adapt a base to an adapter's configuration: its number of embeddings, its heads, and its recipe.

    Heads of the user's own class are refused, because the class is not imported here.
    """
    grow_rows(model, config.get_text_config().vocab_size)
    body, body_config = get_body(model), get_body_config(config)
    if is_composed_config(body_config):
        body.config.recipe = body_config.recipe
    if not is_prediction_config(config):
        return model
    for head in config.settings:
        head_class(head.type)
    return VLMForPrediction(config, body)
