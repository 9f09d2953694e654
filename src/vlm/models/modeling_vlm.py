"""A vision-language model composed of a visual encoder, a connector and a causal language model.

Hub code: imports torch, transformers and its siblings only.

Shapes: B rows, T tokens a row, I images in the batch, P features an image, N tokens an image, V vision width,
D text width, S supervised positions. With `config.anyres`, I are the views of all images (see `anyres.py`). With
`config.native`, images have different numbers of patches: pixels are the patches of all images, features and tokens are
those of all images one behind the other, without the dimension of images (see `native.py`).
"""

import inspect
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .anyres import AnyRes, ImageNewline, first_mismatched_row
from .configuration_vlm import VLMConfig
from .connectors import CONNECTORS, connector_class, connector_options, count_tokens
from .encoders import EncoderEnsemble, combine_encoders, read_features
from .language_inputs import PER_LAYER, grid_positions, look_up_ids, looks_up_ids
from .native import Grid, NativeResolution
from .native_encoders import read_native_features, remove_merger
from .text_loss import IGNORE_INDEX, Divisor, add_balance_loss, supervised_loss
from .wrapper import VLMOutput, WrapperModel, copy_class_file, load_travelling_class

IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_views", "image_features", "image_index", "image_grids")
"""The inputs of images, see `VLMForConditionalGeneration.forward`."""


class VLMForConditionalGeneration(WrapperModel, GenerationMixin):
    """Image features, mapped by a connector, take the place of placeholders among a language model's embeddings.

    Args:
        config: the composition.
        visual_encoder: a loaded encoder, or several; by default built from the configuration.
        language_model: a loaded causal language model; by default built from `config.text_config`.
    """

    config_class = VLMConfig
    base_model_prefix = "vlm"
    wrapped = "language_model"
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - as transformers declares it
    _auto_class = "AutoModelForImageTextToText"

    def __init__(
        self,
        config: VLMConfig,
        visual_encoder: PreTrainedModel | EncoderEnsemble | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        kind, options = config.connector["type"], config.connector["options"]
        if kind not in CONNECTORS and type(self).__module__.startswith("transformers_modules."):
            CONNECTORS[kind] = load_travelling_class(config.auto_map["Connector"], str(config.name_or_path))
        self.visual_encoder = visual_encoder or combine_encoders(
            [AutoModel.from_config(getattr(config, name)) for name in config.encoder_names]
        )
        self.connector = connector_class(kind)(
            config.vision_dim, config.text_config.hidden_size, **connector_options(kind, options)
        )
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.image_newline = None
        self.native = None if config.native is None else NativeResolution(**config.native)
        if self.native is not None:
            remove_merger(self.visual_encoder)
        if config.anyres is not None:
            self.image_newline = ImageNewline(AnyRes(**config.anyres), config.text_config.hidden_size)
        self.post_init()

    def train(self, mode: bool = True) -> "VLMForConditionalGeneration":
        """Set training mode; a frozen encoder stays in evaluation mode, with its batch statistics."""
        super().train(mode)
        if not has_trainable_parameters(self.visual_encoder):
            self.visual_encoder.eval()
        return self

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        image_grids: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Encode images and map them: `(I, 3 * encoders, height, width) -> (I, N, D)`, `(images, N, D)` by an index.

        With `config.native`, `(patches, 3, side, side) -> (tokens, D)`.

        A frozen encoder runs without a gradient graph; only the selected hidden states are kept. Equal images are
        encoded separately where training makes them different (dropout, batch statistics).

        Args:
            pixel_values: the images.
            image_features: `(I, P, V)`: the output of `encode_images`, in place of pixels.
            image_index: `(images,)`: the index of each image among the I, where equal images are there once.
            image_grids: with `config.native`, see `forward`.
            kwargs: unused; transformers declares them.
        """
        if self.native is not None:
            return self._map_native(pixel_values, image_grids)
        if image_features is None:
            assert pixel_values is not None
            if image_index is not None and self.encodes_duplicates():
                pixel_values, image_index = pixel_values[image_index], None
            image_features = self.encode_images(pixel_values)
        if image_index is not None and self.connects_duplicates():
            image_features, image_index = image_features[image_index], None
        mapped = self.connector(image_features.to(next(self.connector.parameters(), image_features).dtype))
        return mapped if image_index is None else mapped[image_index]

    def _map_native(self, pixel_values: Tensor | None, image_grids: Tensor | None) -> Tensor:
        """Encode and map images of different sizes: `(patches, 3, side, side) -> (tokens, D)`."""
        if pixel_values is None or image_grids is None:
            raise ValueError(
                "pixel_values and image_grids are missing: this model reads images at native resolution (config.native)"
            )
        grids: list[Grid] = [(rows, columns) for rows, columns in image_grids.tolist()]
        if (needed := sum(math.prod(grid) for grid in grids)) != len(pixel_values):
            raise ValueError(f"image_grids={grids} are {needed} patches, but pixel_values hold {len(pixel_values)}")
        part, selection = self.visual_encoder, self.config.feature_selections[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_trainable_parameters(part)):
            features = read_native_features(
                part, pixel_values.to(part.dtype), grids, selection["feature_layer"], selection["num_prefix_tokens"]
            )
        return self.connector.map_native(features.to(next(self.connector.parameters(), features).dtype), grids)

    def encodes_duplicates(self) -> bool:
        """Return whether equal images go through the visual encoder one by one, since it trains."""
        return self.visual_encoder.training

    def connects_duplicates(self) -> bool:
        """Return whether equal images go through the connector one by one, since training makes them different."""
        kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
        return any(module.training and isinstance(module, kinds) for module in self.connector.modules())

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the features that the connector reads: `(I, 3 * encoders, height, width) -> (I, P, V)`."""
        part = self.visual_encoder
        encoders = list(part.encoders) if isinstance(part, EncoderEnsemble) else [part]
        channels = pixel_values.to(part.dtype).chunk(len(encoders), dim=1)
        inputs = zip(encoders, channels, self.config.feature_selections, strict=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_trainable_parameters(part)):
            features = [read_features(encoder, pixels, **selection) for encoder, pixels, selection in inputs]
            return torch.cat(features, dim=2)

    def merge_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        image_grids: Tensor | None = None,
    ) -> Tensor:
        """Return text embeddings with image features at the placeholders: `(B, T), (I, 3, h, w) -> (B, T, D)`.

        The other arguments are those of `forward`.

        Raises:
            ValueError: there are more or fewer placeholders than features of images; tells the rows. Or pixels are
                integers, which the processor has not normalised.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None and image_features is None:
            return embeddings
        if pixel_values is not None and not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}: processor.normalise(pixels) is missing")
        placeholders = input_ids == self.config.image_token_id  # (B, T)
        images = pixel_values, image_features, image_index, image_grids
        features = self.get_image_features(*images).to(embeddings.dtype)  # (I, N, D)
        images, tokens = features.shape[:2]
        if self.image_newline is not None:
            features = self._join_views(features, placeholders, image_sizes, image_views)
        elif self.native is not None:
            assert image_grids is not None
            numbers = [self.native.num_tokens((rows, columns)) for rows, columns in image_grids.tolist()]
            self._check_placeholders(placeholders, numbers)
        elif not torch.compiler.is_compiling() and int(placeholders.sum()) != images * tokens:
            counts = {row: count for row, count in enumerate(placeholders.sum(1).tolist()) if count}
            raise ValueError(
                f"{images} images of {tokens} tokens each need {images * tokens} placeholders "
                f"(id {self.config.image_token_id}), but the batch has {sum(counts.values())}: row -> count {counts}. "
                "Prepare the inputs with this model's own processor."
            )
        return embeddings.masked_scatter(placeholders.unsqueeze(-1), features)

    def _join_views(
        self, views: Tensor, placeholders: Tensor, image_sizes: Tensor | None, image_views: Tensor | None
    ) -> Tensor:
        """Return the tokens of all images from those of their views: `(I, N, D), (B, T) -> (tokens, D)`."""
        assert self.image_newline is not None
        if image_sizes is None or image_views is None:
            raise ValueError("image_sizes and image_views are missing: this model sees images in tiles (config.anyres)")
        sizes, numbers = [tuple(size) for size in image_sizes.tolist()], image_views.tolist()
        if (total := sum(max(number, 1) for number in numbers)) != len(views):
            raise ValueError(f"image_views={numbers} are {total} views, but pixel_values hold {len(views)}")
        tokens = [self.image_newline.anyres.num_tokens(*image) for image in zip(sizes, numbers, strict=True)]
        self._check_placeholders(placeholders, tokens)
        return self.image_newline(views, sizes, numbers)

    def _check_placeholders(self, placeholders: Tensor, tokens: list[int]) -> None:
        """Raise ValueError where rows do not have the placeholders of their images, image by image."""
        rows = placeholders.sum(1).tolist()
        if (row := first_mismatched_row(rows, tokens)) is not None:
            raise ValueError(
                f"images of {tokens} tokens need as many placeholders (id {self.config.image_token_id}), image by "
                f"image; row {row} does not fit: row -> count {dict(enumerate(rows))}. Prepare the inputs with this "
                "model's own processor."
            )

    def read_ids(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_grids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what the language model reads of ids besides embeddings, by its names; empty for most.

        Inputs of each layer that are looked up by ids (Gemma 3n, Gemma 4), and positions in rows and columns of images
        (`config.positions=mrope`). The arguments are those of `forward`.
        """
        inputs: dict[str, Tensor] = {}
        text, decoder = self.config.text_config, self.get_decoder()
        if getattr(text, "hidden_size_per_layer_input", None) and looks_up_ids(decoder):
            inputs[PER_LAYER] = look_up_ids(decoder, input_ids, self.config.image_token_id, text.pad_token_id)
        if self.config.positions == "mrope" and (position_ids is None or position_ids.ndim == 2):
            grids = self._token_grids(input_ids, image_grids)
            mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            inputs["position_ids"] = grid_positions(input_ids, grids, self.config.image_token_id, mask, position_ids)
        return inputs

    def _token_grids(self, input_ids: Tensor, image_grids: Tensor | None) -> list[Grid]:
        """Return the rows and columns of tokens of each image of a batch."""
        number = int((input_ids == self.config.image_token_id).sum())
        if self.native is not None:
            grids = [] if image_grids is None else image_grids.tolist()
            return [self.native.token_grid((rows, columns)) for rows, columns in grids]
        side = math.isqrt(self.connector_tokens)
        return [(side, side)] * (number // side**2)

    @property
    def connector_tokens(self) -> int:
        """The number of tokens of an image, where all have the same."""
        connector = self.config.connector
        return count_tokens(connector["type"], self.config.num_features, connector["options"])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Divisor = None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        image_grids: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        **kwargs,
    ) -> VLMOutput:
        """Run the model; raise ValueError without one of `input_ids` and `inputs_embeds`, or as `merge_images` does.

        Args:
            input_ids: `(B, T)`, with `N` placeholders for each image, in the order of `pixel_values`.
            pixel_values: `(I, 3 * encoders, height, width)`, the images of all rows; channels encoder by encoder.
            attention_mask: `(B, T)`, 0 at padding.
            position_ids: `(B, T)`; with `config.positions=mrope`, also `(4, B, T)`, see `grid_positions`.
            past_key_values: the cache of earlier tokens.
            inputs_embeds: `(B, T, D)` instead of `input_ids` and `pixel_values`.
            labels: `(B, T)`, -100 where not supervised; position t is predicted from t - 1.
            logits_to_keep: without `labels`, as the language model takes it; with them, supervised positions are kept.
            num_items_in_batch: the divisor of the summed loss; defaults to the supervised positions of this batch.
            image_sizes: with `config.anyres`, `(images, 2)`: height and width of each image in pixels.
            image_views: with `config.anyres`, `(images,)`: number of views of each image, see `AnyRes.num_views`.
            image_features: `(I, P, V)` in place of `pixel_values`: the output of `encode_images`.
            image_index: `(images,)`: the index of each image (with `config.anyres`: view) among the I.
            image_grids: with `config.native`, `(images, 2)`: rows and columns of patches of each image;
                `pixel_values` is then `(patches, 3, side, side)`.
            per_layer_inputs: `(B, T, layers, width)` beside `inputs_embeds`, for language models that look them up by
                ids, see `read_ids`.
            kwargs: for the language model, such as `use_cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        text = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        text |= kwargs | {"return_dict": True}
        if input_ids is not None:
            images = (pixel_values, image_sizes, image_views, image_features, image_index, image_grids)
            text["inputs_embeds"] = self.merge_images(input_ids, *images)
            text |= self.read_ids(input_ids, attention_mask, position_ids, image_grids)
        elif per_layer_inputs is not None:
            text[PER_LAYER] = per_layer_inputs
        if labels is None:
            return self._run_language_model(text, past_key_values, logits_to_keep)
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T): what each position predicts
        supervised = targets != IGNORE_INDEX
        outputs = self._run_language_model(text, past_key_values, supervised)
        assert outputs.logits is not None
        loss = supervised_loss(outputs.logits, targets[supervised], num_items_in_batch)
        loss = add_balance_loss(loss, outputs, self.config.text_config, supervised.sum(), num_items_in_batch)
        return VLMOutput(loss, **outputs)

    def _run_language_model(
        self, inputs: dict[str, Any], past_key_values: object | None, logits_to_keep: int | Tensor
    ) -> VLMOutput:
        """Run the language model on embeddings, with its cache under the name that it takes; no loss is computed."""
        if not self.has_state_cache():
            inputs = inputs | {"past_key_values": past_key_values}
        elif inputs.get("cache_params") is not None:
            inputs = inputs | {"attention_mask": None}  # the state of a prompt does not contain its padding
        outputs = self.language_model(**inputs, logits_to_keep=logits_to_keep)
        names = ("logits", "past_key_values", "hidden_states", "attentions", "cache_params", "aux_loss")
        return VLMOutput(**{name: outputs.get(name) for name in names})

    def has_state_cache(self) -> bool:
        """Return whether the language model has a state in place of keys and values, as Mamba and its kin do."""
        names = inspect.signature(type(self.language_model).forward).parameters
        return "cache_params" in names and "past_key_values" not in names

    def _supports_default_dynamic_cache(self) -> bool:
        """Return whether `generate` makes the cache; Mamba, MiniMax and their kin make their own in the first pass."""
        language_model: Any = self.language_model  # nn.Module declares its methods as tensors
        return not self.has_state_cache() and language_model._supports_default_dynamic_cache()

    def decode(self, input_ids: Tensor, **kwargs) -> ModelOutput:
        """Run the language model without its vocabulary head; arguments as in `forward`.

        Returns the decoder's output: `last_hidden_state` `(B, T, D)`, and `hidden_states` where requested.
        """
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        kwargs |= self.read_ids(input_ids, *positions, images["image_grids"])
        return self.get_decoder()(inputs_embeds=self.merge_images(input_ids, **images), **kwargs)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs):
        """Generate as `GenerationMixin.generate`; images are encoded once, before the first token.

        Returns the ids of prompts followed by those of answers.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS} | {"pixel_values": pixel_values}
        if pixel_values is not None or images["image_features"] is not None:
            kwargs["inputs_embeds"] = self.merge_images(input_ids, **images)
        positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        kwargs |= self.read_ids(input_ids, *positions, images["image_grids"])
        return super().generate(input_ids=input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args, inputs_embeds: Tensor | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict[str, object]:
        """Return the inputs of the next pass; what was looked up by ids of the prompt is read in the first one."""
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration or inputs.get("inputs_embeds") is None:
            inputs.pop(PER_LAYER, None)  # looked up from these ids
        return inputs

    def save_custom_code(self, save_directory) -> None:
        """Copy the file of a user's own connector class, if there is one, and note it in the configuration."""
        if ":" in self.config.connector["type"]:  # package.module:Class, not a name of the table
            file = Path(save_directory, "user_connector.py")
            self.config.auto_map["Connector"] = copy_class_file(type(self.connector), file)


def has_trainable_parameters(module: nn.Module) -> bool:
    """Return whether any parameter of a module gets a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())
