"""Output of a frozen part of a family's model, put in the place of the call that would compute it.

The part is the visual encoder where the connector trains; where it is frozen too, all that `get_image_features` does.
Nothing is known of the part but what it returns: a tensor, or an output of tensors, tuples and lists of them, in which
the samples of a batch stand one after the other. What of it the rest of the model reads is found by its gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vlm.data.feature_cache.families import CACHED_FEATURES, CACHED_SHAPES, MAX_DIMS, count_numbers
from vlm.families.parts import get_part_names

FEATURES_METHOD = "get_image_features"
KEY = "dataset.cache_features=true"

Call = Callable[..., object]


class Captured(Exception):
    """Ends a forward pass once the part has returned."""


class NotCacheable(ValueError):
    """The features of a model cannot be kept, and why."""


def is_tensors(value: object) -> TypeGuard[Sequence[Tensor | None]]:
    """Return whether a value is a tuple or list of tensors, some of which may be missing."""
    if not isinstance(value, tuple | list):
        return False
    return any(isinstance(item, Tensor) for item in value) and all(
        item is None or isinstance(item, Tensor) for item in value
    )


def are_lists(value: object) -> TypeGuard[Sequence[Sequence[Tensor | None]]]:
    """Return whether a value is a tuple or list of those."""
    return isinstance(value, tuple | list) and bool(value) and all(map(is_tensors, value))


def join_samples(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the tensors of samples, filled up with 0 where those of other samples are larger."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if any(list(part.shape[1:]) != largest for part in parts):
        ends = [[most - size for most, size in zip(largest, part.shape[1:], strict=True)] for part in parts]
        parts = [
            F.pad(part, [number for end in reversed(missing) for number in (0, end)])
            for part, missing in zip(parts, ends, strict=True)
        ]
    return torch.cat(list(parts))


@dataclass(frozen=True)
class Field:
    """A field of an output.

    Attributes:
        name: its name; empty where the output is a tensor itself.
        length: the number of its tensors, each of all samples, such as one for each layer; 0 for a single tensor.
        is_split: whether each of them is a list with an entry for each image.
        used: which of its tensors the model reads.
    """

    name: str
    length: int = 0
    is_split: bool = False
    used: tuple[bool, ...] = (True,)


class FrozenPart:
    """A part of a model whose calls are recorded, and replaced where a batch brings what they would return.

    Args:
        module: the module that has the call.
        attribute: the name of the call: `forward` or `get_image_features`.
    """

    def __init__(self, module: nn.Module, attribute: str):
        self.module, self.attribute = module, attribute
        self.original: Call = getattr(module, attribute)
        self.fields: list[Field] = []
        self.kind: type[ModelOutput] | None = None
        self.returned: object = None
        self.recorded: list[object] | None = None
        self.ends = False

        @wraps(self.original)
        def call(*given: object, **named: object) -> object:
            """Return what is there in place of the output, or compute it."""
            if self.returned is not None:
                return self.returned
            output = self.original(*given, **named)
            if self.recorded is not None:
                self.recorded.append(output)
                if self.ends:
                    raise Captured
            return output

        setattr(module, attribute, call)

    @contextmanager
    def returning(self, output: object) -> Iterator[None]:
        """Return this in place of the output, within."""
        self.returned = output
        try:
            yield
        finally:
            self.returned = None

    def output_of(self, model: nn.Module, inputs: Mapping[str, Tensor], *, to_the_end: bool = False) -> object:
        """Return the output of the part in a forward pass of the model.

        Raises:
            NotCacheable: it is called several times, or never.
        """
        self.recorded, self.ends = [], not to_the_end
        try:
            model(**inputs)
        except Captured:
            pass
        finally:
            recorded, self.recorded = self.recorded, None
        if len(recorded) != 1:
            raise NotCacheable(f"its {self.attribute} for images is called {len(recorded)} times per batch")
        return recorded[0]

    def learn(self, one: object, two: object) -> None:
        """Find out how samples stand in an output, by that of one sample and that of the same one twice.

        Raises:
            NotCacheable: they do not stand one after the other.
        """
        self.kind = type(one) if isinstance(one, ModelOutput) else None
        self.fields = []
        for name, value in self._named(one):
            other = dict(self._named(two)).get(name)
            if isinstance(value, Tensor) and isinstance(other, Tensor):
                self._check_doubled(name, value, other)
                self.fields.append(Field(name))
            elif are_lists(value):  # of each layer, for each image
                self.fields.append(Field(name, len(value), is_split=True, used=(True,) * len(value)))
            elif is_tensors(value) and is_tensors(other) and len(other) == 2 * len(value):
                self.fields.append(Field(name, is_split=True))
            elif is_tensors(value) and is_tensors(other) and len(other) == len(value):
                for first, second in zip(value, other, strict=True):
                    if first is not None and second is not None:
                        self._check_doubled(name, first, second)
                self.fields.append(Field(name, len(value), used=tuple(item is not None for item in value)))
        if not self.fields:
            raise NotCacheable(
                f"its {self.attribute} returns {type(one).__name__}, which has no tensor with a row per sample"
            )

    def _named(self, output: object) -> list[tuple[str, object]]:
        if isinstance(output, ModelOutput):
            return [(str(name), value) for name, value in output.items()]
        return [("", output)]

    def _check_doubled(self, name: str, one: Tensor, two: Tensor) -> None:
        if one.ndim == 0 or one.ndim > MAX_DIMS or two.shape != (2 * one.shape[0], *one.shape[1:]):
            shapes = f"{tuple(one.shape)} for one sample and {tuple(two.shape)} for two"
            raise NotCacheable(
                f"{name or 'the output'} of its {self.attribute} has the shape {shapes}, so samples do not follow one "
                "another"
            )

    def keep_used(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], output: object) -> None:
        """Keep only those of the tensors of an output that the language model's inputs depend on, by their gradient."""
        tensors = [tensor.detach().clone().requires_grad_() for tensor in self.tensors(output)]
        with torch.enable_grad(), self.returning(self.rebuild([tensors])):
            total = sum_of_decoder_inputs(model, inputs)
            gradients = torch.autograd.grad(total, tensors, allow_unused=True)
        remaining = iter([gradient is not None for gradient in gradients])
        self.fields = [
            replace(field, used=tuple(used and next(remaining) for used in field.used)) for field in self.fields
        ]

    def tensors(self, output: object) -> list[Tensor]:
        """Return the tensors of an output that are kept; those of a list that has one for each image as one.

        Raises:
            NotCacheable: they have several types.
        """
        values, found = dict(self._named(output)), list[Tensor]()
        for field in self.fields:
            value = values[field.name]
            if are_lists(value):
                listed = [torch.cat([item for item in layer if item is not None]) for layer in value]
            elif field.is_split and is_tensors(value):
                listed = [torch.cat([item for item in value if item is not None])]
            else:
                listed = [value] if isinstance(value, Tensor) else list(value) if is_tensors(value) else []
            pairs = zip(listed, field.used, strict=True)
            found += [tensor for tensor, used in pairs if used and tensor is not None]
        if len({tensor.dtype for tensor in found}) > 1:
            raise NotCacheable(f"its {self.attribute} returns tensors of several types")
        return found

    def rebuild(self, samples: Sequence[Sequence[Tensor]]) -> object:
        """Return the output for samples, from the kept tensors of each."""
        columns = iter([list(column) for column in zip(*samples, strict=True)])
        values: dict[str, object] = {}
        for field in self.fields:
            parts = [next(columns) if used else None for used in field.used]
            if field.is_split:
                split = [() if part is None else tuple(part) for part in parts]
                values[field.name] = split if field.length else split[0]
            else:
                joined = [None if part is None else join_samples(part) for part in parts]
                values[field.name] = tuple(joined) if field.length else joined[0]
        if self.kind is None:
            return values[""]
        return self.kind(**values)

    def unpack(self, numbers: Tensor, shapes: Tensor) -> object:
        """Return the output for a batch from its inputs `CACHED_FEATURES` and `CACHED_SHAPES`."""
        samples: list[list[Tensor]] = []
        start = 0
        for sample in shapes.tolist():
            tensors = []
            for shape in sample:
                end = start + count_numbers(shape)
                tensors.append(numbers[start:end].view([size for size in shape if size]))
                start = end
            samples.append(tensors)
        return self.rebuild(samples)

    def attach(self, model: PreTrainedModel) -> None:
        """Let batches of the model bring features: each forward pass takes them out of its inputs."""

        def take(
            module: nn.Module, given: tuple[object, ...], named: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            """Take the features out of the inputs of a forward pass."""
            numbers, shapes = named.pop(CACHED_FEATURES, None), named.pop(CACHED_SHAPES, None)
            self.returned = None
            if isinstance(numbers, Tensor) and isinstance(shapes, Tensor):
                self.returned = self.unpack(numbers, shapes)
            return given, named

        def forget(module: nn.Module, given: object, output: object) -> None:
            """Compute features again in passes of other modules."""
            self.returned = None

        model.register_forward_pre_hook(take, with_kwargs=True)
        model.register_forward_hook(forget, always_call=True)


def sum_of_decoder_inputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of all numbers that the language model's layers are given in a forward pass, which ends there."""
    given: list[object] = []

    def end(module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        """Take the arguments, and end the pass."""
        given.extend([*arguments, *named.values()])
        raise Captured

    handle = model.get_decoder().register_forward_pre_hook(end, with_kwargs=True)
    try:
        model(**inputs)
    except Captured:
        pass
    finally:
        handle.remove()
    flat = [tensor for value in given for tensor in (value if is_tensors(value) else [value])]
    sums = [tensor.float().sum() for tensor in flat if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    return torch.stack(sums).sum()


def find_frozen_part(model: PreTrainedModel, *, connector_trains: bool) -> tuple[FrozenPart, list[str]]:
    """Return the largest part of a model that is frozen and returns features of images, and its parameters' names.

    Raises:
        NotCacheable: there is none.
    """
    if not connector_trains and (owner := find_features_owner(model)) is not None:
        names = get_part_names(model.config)
        own = [name for name, _ in model.named_parameters() if names.part_of(name) != "language_model"]
        return FrozenPart(owner, FEATURES_METHOD), own
    encoder = model.get_encoder(modality="image")
    if not isinstance(encoder, nn.Module) or encoder in (model, model.base_model):
        raise NotCacheable("its class names no visual encoder (get_encoder)")
    ids = {id(parameter) for parameter in encoder.parameters()}
    own = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
    names = get_part_names(model.config)
    within = [name for name in own if names.part_of(name) != "visual_encoder"]
    if within and connector_trains:
        raise NotCacheable(
            f"its connector, which trains, is inside its visual encoder ({within[0]}); freeze it, too "
            "(trainer.unfreeze.train_connector=false)"
        )
    return FrozenPart(encoder, "forward"), own


def find_features_owner(model: PreTrainedModel) -> nn.Module | None:
    """Return the inner module whose `get_image_features` a forward pass calls; None: there is none."""
    inner = [module for module in (model.base_model, getattr(model, "model", None)) if isinstance(module, nn.Module)]
    return next((module for module in inner if module is not model and hasattr(module, FEATURES_METHOD)), None)
