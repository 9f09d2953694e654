"""What is tried: a small model of a family with random weights, its parts, and the processor of the large one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vlm.assembly.family_trial.conversations import Conversation, make_row
from vlm.assembly.family_trial.verdicts import DisprovedError
from vlm.assembly.heads import grow_embeddings
from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.opening import quiet_loading
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import SampleInputs
from vlm.families.meta_model import get_auto_class
from vlm.families.parts import PartNames, get_part_names
from vlm.families.processing import FamilyProcessor
from vlm.families.row_by_row import keep_apart
from vlm.models.text_loss import select_kept

VECTOR_NOISE = 0.1
"""Standard deviation of what is added to vectors and single numbers: gates that begin closed open."""


@dataclass
class Subject:
    """A family on trial.

    Attributes:
        config: the configuration of the small model.
        processor: the processor of the large one.
        trust_remote_code: whether code of the checkpoint's repository may run.
        attention: attention implementation; None: as transformers chooses.
    """

    config: PreTrainedConfig
    processor: FamilyProcessor
    trust_remote_code: bool = False
    attention: str | None = None
    _rows: dict[tuple[object, ...], SampleInputs] = field(default_factory=dict)
    _logits: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The small model in float32 and evaluation mode, with the same random weights each time."""
        options: dict[str, object] = {"trust_remote_code": True} if self.trust_remote_code else {}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_auto_class(self.config).from_config(self.config, dtype=torch.float32, **options)
            grow_embeddings(model, self.processor.tokenizer)
        keep_apart(model)
        wake(model)
        return model.eval()

    @property
    def trainable(self) -> TrainableModel:
        """The same model, as training sees it."""
        return cast(TrainableModel, self.model)

    @cached_property
    def names(self) -> PartNames:
        """The parts of the small model, by prefixes of its parameters."""
        return get_part_names(self.model.config)

    @cached_property
    def collate(self) -> Collator:
        """Pads rows as training does, with a blank image for a batch without any."""
        return Collator.of(self.processor, dummy_image(self.processor))

    @property
    def attends_across(self) -> bool:
        """Whether its language model reads images by cross-attention, and not at placeholders."""
        return "cross_attention_mask" in self.processor.per_token_inputs

    def make_batch(self, *conversations: Conversation) -> SampleInputs:
        """Return conversations as a batch of training."""
        return dict(self.collate([self.make_row(conversation) for conversation in conversations]))

    def make_row(self, conversation: Conversation) -> SampleInputs:
        """Return a conversation as a data worker hands it on; the same one is made once."""
        if conversation.key not in self._rows:
            self._rows[conversation.key] = make_row(self.processor, conversation)
        return dict(self._rows[conversation.key])

    @torch.no_grad()
    def alone_logits(self, conversation: Conversation) -> Tensor:
        """Return logits `(S, vocabulary)` of the replies of a conversation alone; those of the same one are kept."""
        if conversation.key not in self._logits:
            self._logits[conversation.key] = self.reply_logits(self.make_batch(conversation))
        return self._logits[conversation.key]

    @property
    def image_token_id(self) -> int:
        """The id at which the model places features of images: its configuration's, else the processor's."""
        token_id = getattr(self.config, "image_token_id", None)
        return token_id if isinstance(token_id, int) else self.processor.image_token_id

    def reply_logits(self, batch: Mapping[str, object]) -> Tensor:
        """Return logits where the next token is supervised: `(S, vocabulary)`, row by row."""
        return compute_reply_logits(self.model, batch)


def compute_reply_logits(model: PreTrainedModel, batch: Mapping[str, object]) -> Tensor:
    """Return a model's logits where the next token is supervised: `(S, vocabulary)`, row by row.

    Raises:
        DisprovedError: the model does not keep to the positions that it is asked for.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    keep = supervised_next(cast(Tensor, batch["labels"]))
    returned: Tensor = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    logits = select_kept(returned, keep)
    if logits.ndim != 2 or len(logits) != int(keep.sum()):
        raise DisprovedError(
            f"asked for logits at {int(keep.sum())} of {keep.numel()} positions (logits_to_keep), by which training "
            f"computes the loss, the model returns logits of shape {tuple(returned.shape)}, which are neither these "
            "nor all"
        )
    return logits


def supervised_next(labels: Tensor) -> Tensor:
    """Return where the next token is supervised: a mask of labels' shape `(B, T)`."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] != IGNORE_INDEX


@torch.no_grad()
def wake(model: PreTrainedModel) -> None:
    """Add noise to all weights, so that every path through a small model carries something.

    Fresh weights have a standard deviation of 0.02, made for wide layers: through narrow ones, next to nothing of an
    image arrives. Some gates begin closed. The noise of a matrix has the standard deviation of one over the root of
    its inputs, that of a vector is `VECTOR_NOISE`.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            inputs = parameter[0].numel() if parameter.ndim > 1 else 0
            scale = 1 / math.sqrt(inputs) if inputs else VECTOR_NOISE
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two tensors over the norm of the first.

    The lowest number of a precision, by which a model rules tokens out, counts as 0 if both have it.
    """
    ruled_out = (one <= torch.finfo(one.dtype).min) & (other <= torch.finfo(other.dtype).min)
    before, after = (tensor.double().masked_fill(ruled_out, 0) for tensor in (one, other))
    return float((before - after).norm() / before.norm())


def list_names(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
