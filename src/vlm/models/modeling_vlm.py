"""A vision-language model composed of a visual encoder, a connector and a causal language model.

Hub code: imports torch, transformers and its siblings only.

Shapes: B rows, T tokens a row, I images in the batch, P features an image, N tokens an image, V vision width,
D text width, S supervised positions. With `config.anyres`, I are the views of all images (see `anyres.py`).
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import ModelOutput

from .anyres import AnyRes, ImageNewline, first_mismatched_row
from .configuration_vlm import VLMConfig
from .connectors import CONNECTORS, connector_class, connector_options
from .encoders import EncoderEnsemble, combine_encoders, read_features

IGNORE_INDEX = -100
"""The label of a position that is not supervised."""

MAX_LOGITS = 2**26
"""So many logits of one piece at most: 256 MiB in float32."""


@dataclass
class VLMOutput(ModelOutput):
    """What a forward pass returns.

    Args:
        loss: mean cross-entropy over the supervised positions, or their sum over `num_items_in_batch`; a scalar.
        logits: with `labels`, `(S, vocabulary)`: the supervised positions in order; else `(B, kept, vocabulary)`.
        past_key_values: the language model's cache.
        hidden_states: the language model's, where asked for.
        attentions: the language model's, where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class VLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Image features, mapped by a connector, stand among the text embeddings of a language model.

    Args:
        config: the composition.
        visual_encoder: a loaded encoder, or several; None builds what the configuration describes.
        language_model: a loaded causal language model; None builds one from `config.text_config`.
    """

    config_class = VLMConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - as transformers declares it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
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
            CONNECTORS[kind] = get_class_from_dynamic_module(config.auto_map["Connector"], str(config.name_or_path))
        self.visual_encoder = visual_encoder or combine_encoders(
            [AutoModel.from_config(getattr(config, name)) for name in config.encoder_names]
        )
        self.connector = connector_class(kind)(
            config.vision_dim, config.text_config.hidden_size, **connector_options(kind, options)
        )
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.image_newline = None
        if config.anyres is not None:
            self.image_newline = ImageNewline(AnyRes(**config.anyres), config.text_config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves; a connector's modules keep PyTorch's own initialisation."""
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the language model other ones."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's vocabulary head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the language model another one."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """The language model without its vocabulary head."""
        return self.language_model.get_decoder()

    def train(self, mode: bool = True) -> "VLMForConditionalGeneration":
        """As usual, but an encoder that does not train stays in evaluation mode (its batch statistics too)."""
        super().train(mode)
        if not _has_trainable_parameters(self.visual_encoder):
            self.visual_encoder.eval()
        return self

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Encode images and map them: `(I, 3 * encoders, height, width) -> (I, N, D)`, `(images, N, D)` by an index.

        A frozen encoder runs without a gradient graph; only the selected hidden states are kept. What training makes
        different for equal images (dropout, statistics of the batch) stays different for them.

        Args:
            pixel_values: the images.
            image_features: `(I, P, V)`: what `encode_images` gives for them, in place of pixels.
            image_index: `(images,)`: which of the I each image is; None: they are the images.
            kwargs: nothing; as transformers declares it.
        """
        if image_features is None:
            assert pixel_values is not None
            if image_index is not None and self.encodes_duplicates():
                pixel_values, image_index = pixel_values[image_index], None
            image_features = self.encode_images(pixel_values)
        if image_index is not None and self.connects_duplicates():
            image_features, image_index = image_features[image_index], None
        mapped = self.connector(image_features.to(get_module_dtype(self.connector, image_features)))
        return mapped if image_index is None else mapped[image_index]

    def encodes_duplicates(self) -> bool:
        """Whether equal images go through the visual encoder one by one: where it trains."""
        return self.visual_encoder.training

    def connects_duplicates(self) -> bool:
        """Whether they go through the connector one by one: where training makes them different."""
        return _is_stochastic(self.connector)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """What the connector reads: `(I, 3 * encoders, height, width) -> (I, P, V)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _has_trainable_parameters(self.visual_encoder)):
            return self._encode_and_concatenate(pixel_values.to(self.visual_encoder.dtype))

    def _encode_and_concatenate(self, pixel_values: Tensor) -> Tensor:
        """The features that are read, of all encoders by channel: `(I, 3 * encoders, height, width) -> (I, P, V)`."""
        part = self.visual_encoder
        encoders = list(part.encoders) if isinstance(part, EncoderEnsemble) else [part]
        seen = zip(encoders, pixel_values.chunk(len(encoders), dim=1), self.config.feature_selections, strict=True)
        return torch.cat([read_features(encoder, pixels, **selection) for encoder, pixels, selection in seen], dim=2)

    def merge_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Text embeddings with image features at the placeholders: `(B, T), (I, 3, h, w) -> (B, T, D)`.

        The other arguments as `forward` takes them.

        Raises:
            ValueError: the placeholders are not as many as the images have features; says for which rows. Or pixels
                are whole numbers, which the processor has yet to normalise.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None and image_features is None:
            return embeddings
        if pixel_values is not None and not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}: processor.normalise(pixels) is missing")
        placeholders = input_ids == self.config.image_token_id  # (B, T)
        features = self.get_image_features(pixel_values, image_features, image_index).to(embeddings.dtype)  # (I, N, D)
        if self.image_newline is not None:
            return embeddings.masked_scatter(
                placeholders.unsqueeze(-1), self._tokens_from_views(features, placeholders, image_sizes, image_views)
            )
        images, tokens = features.shape[:2]
        if not torch.compiler.is_compiling() and int(placeholders.sum()) != images * tokens:
            counts = {row: count for row, count in enumerate(placeholders.sum(1).tolist()) if count}
            raise ValueError(
                f"{images} images of {tokens} tokens each need {images * tokens} placeholders "
                f"(id {self.config.image_token_id}), but the batch has {sum(counts.values())}: row -> count {counts}. "
                "Prepare the inputs with this model's own processor."
            )
        return embeddings.masked_scatter(placeholders.unsqueeze(-1), features)

    def _tokens_from_views(self, views: Tensor, placeholders: Tensor, image_sizes: Any, image_views: Any) -> Tensor:
        """The tokens of all images out of those of their views: `(I, N, D), (B, T) -> (tokens, D)`.

        Raises:
            ValueError: as `merge_images` does.
        """
        assert self.image_newline is not None
        if image_sizes is None or image_views is None:
            raise ValueError("image_sizes and image_views are missing: this model sees images in tiles (config.anyres)")
        sizes, numbers = [tuple(size) for size in image_sizes.tolist()], image_views.tolist()
        if (seen := sum(max(number, 1) for number in numbers)) != len(views):
            raise ValueError(f"image_views={numbers} are {seen} views, but pixel_values hold {len(views)}")
        tokens = [self.image_newline.anyres.num_tokens(*image) for image in zip(sizes, numbers, strict=True)]
        rows = placeholders.sum(1).tolist()
        if (row := first_mismatched_row(rows, tokens)) is not None:
            raise ValueError(
                f"images of {tokens} tokens need as many placeholders (id {self.config.image_token_id}), image by "
                f"image; row {row} does not fit: row -> count {dict(enumerate(rows))}. Prepare the inputs with this "
                "model's own processor."
            )
        return self.image_newline(views, sizes, numbers)

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
        num_items_in_batch: Tensor | int | None = None,
        num_chunks: int = 1,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> VLMOutput:
        """One pass of the model.

        Args:
            input_ids: `(B, T)`, with `N` placeholders for each image, in the order of `pixel_values`.
            pixel_values: `(I, 3 * encoders, height, width)`, the images of all rows one after the other; each as the
                first encoder reads it, then as the second does, by channel.
            attention_mask: `(B, T)`, 0 at padding.
            position_ids: `(B, T)`.
            past_key_values: the cache of earlier tokens.
            inputs_embeds: `(B, T, D)` instead of `input_ids` and `pixel_values`.
            labels: `(B, T)`, -100 where not supervised; position t is predicted from t - 1. Logits are computed for
                supervised positions alone.
            logits_to_keep: without `labels`, as the language model takes it.
            num_items_in_batch: what the summed loss is divided by; None: the supervised positions of this batch.
            num_chunks: with `labels`, in how many pieces supervised positions go through the vocabulary head. With more
                than one, logits live only as long as their piece: they are computed anew for its gradient, and not
                returned. Only for language models whose logits are their head's output and nothing further.
            image_sizes: with `config.anyres`, `(images, 2)`: height and width of each image in pixels.
            image_views: with `config.anyres`, `(images,)`: views of each image, as `AnyRes.num_views` counts them.
            image_features: `(I, P, V)` in place of `pixel_values`: what `encode_images` gives for them.
            image_index: `(images,)`: which of the I each image is, with `config.anyres` each view; None: in order.
            kwargs: for the language model, such as `use_cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.merge_images(
                input_ids, pixel_values, image_sizes, image_views, image_features, image_index
            )
        text = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        targets = None
        if labels is not None:
            targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]  # (B, T): what each position predicts
            logits_to_keep = targets != IGNORE_INDEX
            if num_chunks > 1:
                hidden = self.get_decoder()(inputs_embeds=inputs_embeds, **text).last_hidden_state
                seen = hidden[logits_to_keep], targets[logits_to_keep]
                head = self.get_output_embeddings()
                return VLMOutput(loss=chunked_loss(head, *seen, num_items_in_batch, num_chunks))
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **{**text, "return_dict": True},
        )
        loss = None
        if targets is not None:
            loss = supervised_loss(outputs.logits, targets[logits_to_keep], num_items_in_batch)
        return VLMOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def decode(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> ModelOutput:
        """The language model over text and images without its vocabulary head; arguments as `forward`.

        Returns what the decoder does: `last_hidden_state` `(B, T, D)`, and `hidden_states` where asked for.
        """
        embeddings = self.merge_images(input_ids, pixel_values, image_sizes, image_views, image_features, image_index)
        return self.get_decoder()(inputs_embeds=embeddings, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs):
        """As `GenerationMixin.generate`; images are encoded once, before the first token.

        Returns what it returns for token inputs: the prompts' ids followed by the answers'.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        names = ("image_sizes", "image_views", "image_features", "image_index")
        given = {name: kwargs.pop(name, None) for name in names}
        if pixel_values is not None or given["image_features"] is not None:
            kwargs["inputs_embeds"] = self.merge_images(input_ids, pixel_values, **given)
        return super().generate(input_ids=input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As usual; the file of a connector class of the user's own travels with the hub code."""
        self.save_custom_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def save_custom_code(self, save_directory) -> None:
        """Copy the file of a connector class of the user's own, if it is one, and note it in the configuration."""
        source = sys.modules[type(self.connector).__module__].__file__
        if ":" in self.config.connector["type"] and source is not None:  # package.module:Class, not a name of the table
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            copy = folder / "user_connector.py"
            if copy.resolve() != Path(source).resolve():
                shutil.copyfile(source, copy)
            self.config.auto_map["Connector"] = f"{copy.stem}.{type(self.connector).__name__}"


def supervised_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Cross-entropy in float32 at the supervised positions: `(S, vocabulary), (S,) -> ()`.

    The sum over `num_items`, or the mean; 0 where nothing is supervised. Logits of less precision are widened piece by
    piece.
    """
    num_chunks = 1 if logits.dtype == torch.float32 else max(-(-logits.numel() // MAX_LOGITS), 1)
    return chunked_loss(nn.Identity(), logits, targets, num_items, num_chunks)


def chunked_loss(head: Any, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None, num_chunks: int) -> Tensor:
    """`supervised_loss` of the logits that a vocabulary head gives, piece by piece: `(S, D), (S,) -> ()`.

    The head is called `num_chunks` times whatever S is, and of several pieces as often again for the gradient: ranks
    that share its weights out have to make the same calls.
    """
    targets = targets.to(hidden.device)
    with record_function("loss"):  # the name that a profile knows it by
        if num_chunks == 1:
            total = _chunk_loss(head, hidden, targets)
        else:
            pieces = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
            losses: list[Any] = [checkpoint(_chunk_loss, head, *piece, use_reentrant=False) for piece in pieces]
            total = torch.stack(losses).sum()
        return total / (max(targets.numel(), 1) if num_items is None else num_items)


def _chunk_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _has_trainable_parameters(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_stochastic(module: nn.Module) -> bool:
    """Whether a module in training may give different rows for equal ones."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    return any(child.training and isinstance(child, kinds) for child in module.modules())


def get_module_dtype(module: nn.Module, fallback: Tensor) -> torch.dtype:
    """The dtype of a module's parameters, or of a tensor where it has none."""
    return next((parameter.dtype for parameter in module.parameters()), fallback.dtype)
