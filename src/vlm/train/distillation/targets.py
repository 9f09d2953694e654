"""Targets besides logits: the last hidden states, and what a language model reads of images.

Where widths differ, a matrix maps the student's states to the teacher's width. It trains with the model, at the
connector's rate, and is in its checkpoints, but in no finished model.

Shapes: B rows, T tokens, S supervised positions, N image tokens, D the student's width, E the teacher's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import ModelOutput

from vlm.checks.distillation import KEY
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor
from vlm.models.text_loss import Head, select_kept
from vlm.models.vocabulary import find_vocabulary_head
from vlm.train.model import compute_dtype
from vlm.train.objectives.base import Inputs
from vlm.train.parts import Part

PROJECTIONS = "distillation"
"""The name of the module of the model that holds the matrices."""

HIDDEN_STATES, IMAGE_FEATURES = "hidden_state_loss", "image_feature_loss"
"""The names of the targets in logs, and of their matrices."""


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher read of a batch.

    Attributes:
        states: `(S, E)` at the supervised positions, of which logits are made.
        head: makes logits of some of them: `(S, E) -> (S, V)`.
        image_features: `(N, E)`, what its decoder read at image tokens; None: it was not asked for.
    """

    states: Tensor
    head: Head
    image_features: Tensor | None = None


@dataclass
class Watched:
    """What a forward pass read, mapped to the teacher's width: `(S, E)` and `(N, E)`; None: it was not asked for."""

    hidden_states: Tensor | None = None
    image_features: Tensor | None = None


@dataclass(frozen=True)
class StateTargets:
    """Reads states of the student while it computes its loss, and compares them with the teacher's.

    Attributes:
        model: the student, not wrapped.
        weights: target -> its weight in the loss.
        projections: target -> its matrix, where widths differ.
    """

    model: PreTrainedModel
    weights: Mapping[str, float]
    projections: Mapping[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        parts: Sequence[Part],
        weights: Mapping[str, float],
        width: int,
        args: TrainingArguments,
    ) -> "StateTargets":
        """Give a student what maps its states to the teacher's width; its optimiser trains that with the connector."""
        own_width = model.config.get_text_config().hidden_size
        if own_width == width:
            return cls(model, weights)
        dtype = torch.float32 if args.deepspeed is None else compute_dtype(args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            projections = nn.ModuleDict({name: nn.Linear(own_width, width, bias=False) for name in weights})
        model.add_module(PROJECTIONS, projections.to(model.device, dtype))
        connector = next(part for part in parts if part.name == "connector")
        unsaved = {f"{PROJECTIONS}.{name}": parameter for name, parameter in projections.named_parameters()}
        connector.parameters.update(unsaved)
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *unsaved}
        return cls(model, weights, dict(projections.items()))

    @contextmanager
    def watching(self, inputs: Inputs, processor: Processor) -> Iterator[Watched]:
        """Within, note what a call of the model with these inputs reads, dummies of images included.

        Matrices are multiplied within that call, as ZeRO-3 needs, and in each of them, as DDP does.
        """
        watched, keep = Watched(), find_predicting(inputs["labels"])

        def note_hidden_states(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            """Note what the vocabulary head reads."""
            watched.hidden_states = self._map(HIDDEN_STATES, select_kept(given[0], keep))

        def note_image_features(features: Tensor) -> None:
            """Note what the decoder reads of images."""
            watched.image_features = self._map(IMAGE_FEATURES, features)

        with ExitStack() as stack:
            if HIDDEN_STATES in self.weights:
                head = find_vocabulary_head(self.model)
                assert head is not None
                stack.callback(head.register_forward_pre_hook(note_hidden_states).remove)
            if IMAGE_FEATURES in self.weights:
                ids = inputs["input_ids"]
                places = ids == processor.image_token_id
                stack.enter_context(capture_image_inputs(self.model, ids, places, note_image_features))
            if self.projections:
                stack.callback(self.model.register_forward_hook(partial(_return_states, watched)).remove)
            yield watched

    def losses(self, watched: Watched, read: TeacherStates, inputs: Inputs, processor: Processor) -> dict[str, Tensor]:
        """Return the loss of each target at each supervised position, before its weight: `(S,)`, by its name in logs.

        Raises:
            ValueError: the models read different numbers of tokens of images.
        """
        losses: dict[str, Tensor] = {}
        if watched.hidden_states is not None:
            states = watched.hidden_states
            losses[HIDDEN_STATES] = relative_errors(states, read.states if len(states) else states.detach())
        if watched.image_features is not None:
            shown = image_places(inputs, processor)
            features = watched.image_features[shown[inputs["input_ids"] == processor.image_token_id]]
            targets = features.detach() if read.image_features is None else read.image_features
            if len(targets) != len(features):
                raise ValueError(
                    f"{KEY}.image_features_weight: the teacher has {len(targets)} image tokens in a batch, the "
                    f"model that trains has {len(features)}; set it to 0, or choose a teacher with the same number"
                )
            samples, keep = number_samples(inputs), find_predicting(inputs["labels"])
            errors, number = relative_errors(features, targets), samples.max() + 1
            losses[IMAGE_FEATURES] = spread_over_samples(errors, samples[shown], samples[keep], int(number))
        return losses

    def _map(self, name: str, states: Tensor) -> Tensor:
        return self.projections[name](states) if name in self.projections else states


def _return_states(watched: Watched, module: nn.Module, given: object, output: ModelOutput) -> ModelOutput:
    """Return a model's output with what was noted: DDP takes parameters that no output depends on for unused ones."""
    noted = (watched.hidden_states, watched.image_features)
    output["hidden_states"] = tuple(states for states in noted if states is not None)
    return output


@contextmanager
def capture_image_inputs(
    model: PreTrainedModel, ids: Tensor, places: Tensor, receive: Callable[[Tensor], object]
) -> Iterator[None]:
    """Within, `receive` gets what a model's decoder reads at the tokens of images: `(N, D)`.

    Args:
        model: the model.
        ids: `(B, T)`, those that it is called with.
        places: `(B, T)`, true where features of images are.
        receive: called in each call of the decoder.

    Raises:
        ValueError: on the call, the decoder reads no embeddings, or those of the tokens instead of images.
    """
    label = f"{KEY}.image_features_weight: model_type={model.config.model_type}"

    def read(module: nn.Module, given: tuple[object, ...], named: Inputs) -> None:
        """Read the embeddings that a decoder is called with."""
        embeddings = named.get("inputs_embeds")
        if not isinstance(embeddings, Tensor):
            raise ValueError(f"{label} calls its decoder without embeddings; set it to 0")
        features, table = embeddings[places], model.get_input_embeddings()
        if len(features) and cast(Tensor, table.weight).numel():  # ZeRO-3 has its rows elsewhere
            with torch.no_grad():
                token = table(ids[places][:1])
            if torch.equal(features[:1].to(token.dtype), token):
                raise ValueError(f"{label} does not put image features at the image tokens; set it to 0")
        receive(features)

    handle = model.get_decoder().register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def image_places(inputs: Inputs, processor: Processor) -> Tensor:
    """Return where features of a batch's images are, without dummies: `(B, T)`, bool."""
    places = inputs["input_ids"] == processor.image_token_id
    mask = inputs.get("attention_mask")
    return places if mask is None else places & mask.bool()


def find_predicting(labels: Tensor) -> Tensor:
    """Return which positions predict a supervised token: `(B, T)`, bool."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] != IGNORE_INDEX


def relative_errors(states: Tensor, targets: Tensor) -> Tensor:
    """Return |s - t|^2 / |t|^2 of each state: `(N, E), (N, E) -> (N,)`, float32; 1 for a state of zeros."""
    states, targets = states.float(), targets.float()
    norms = targets.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (states - targets).square().sum(-1) / norms


def number_samples(inputs: Inputs) -> Tensor:
    """Return the number of the sample in the batch that each token belongs to: `(B, T)`."""
    ids = inputs["input_ids"]
    if SEQUENCE_STARTS not in inputs:
        return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    ends = inputs[SEQUENCE_STARTS][1:].contiguous()
    places = torch.arange(ids.shape[1], device=ids.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True)[None]


def spread_over_samples(errors: Tensor, owners: Tensor, samples: Tensor, num_samples: int) -> Tensor:
    """Return the mean error of the images of each position's sample: `(N,), (N,), (S,) -> (S,)`; 0 without images.

    A sample's images count as much as its supervised tokens do, however samples are laid out in rows.

    Args:
        errors: of each image token.
        owners: the sample that each image token belongs to.
        samples: the sample that each supervised position belongs to.
        num_samples: number of samples of the batch.
    """
    sums = errors.new_zeros(num_samples).index_add(0, owners, errors)
    counts = torch.bincount(owners, minlength=num_samples).clamp_min(1)
    return (sums / counts)[samples]
