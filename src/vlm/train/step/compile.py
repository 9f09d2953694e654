"""`trainer.torch_compile` by regions: each repeated layer is compiled in place, once for all layers of its kind.

A whole model would be compiled anew for each number of layers, and for batches of other shapes. Layers of one class
share what was compiled, for all lengths; names of parameters stay as they are.

accelerate's regional compilation differs in both: `compile_regions` puts each layer into a wrapper, which renames its
parameters, and `compile_regions_deepspeed` compiles all other modules too, whose shapes change with every batch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

RECOMPILE_LIMIT = 32
"""How often a layer class may be compiled: with a mask or without, for one row or several, with or without gradient."""


def compile_layers(model: nn.Module, args: TrainingArguments) -> None:
    """Have a model's repeated layers compiled when they first run, as `trainer.torch_compile` and its keys say.

    `args.torch_compile` is false afterwards: `Trainer` would wrap the whole model.

    Raises:
        ValueError: the model has no repeated layers, or an option does not go with compiled layers.
    """
    if not args.torch_compile:
        return
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "trainer.torch_compile=true: under ZeRO-3 each layer gathers its weights as it runs, which cannot be "
            "compiled; choose trainer.deepspeed=zero2 or none, or leave it out"
        )
    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    if options["mode"] in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"trainer.torch_compile_mode={args.torch_compile_mode}: it would record a graph for every length; "
            "choose default or max-autotune-no-cudagraphs"
        )
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    layers = list(repeated_layers(model))
    if not layers:
        raise ValueError("trainer.torch_compile=true: this model has no repeated layers; leave it out")
    for layer in layers:
        layer.compile(**options, dynamic=True, recompile_limit=RECOMPILE_LIMIT)


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost layers of which several of one class are in a row."""
    for child in module.children():
        layers = list(child.children())
        repeated = len(layers) > 1 and len(set(map(type, layers))) == 1 and any(layers[0].children())
        if isinstance(child, nn.ModuleList | nn.Sequential) and repeated and not isinstance(layers[0], PreTrainedModel):
            yield from layers
        else:
            yield from repeated_layers(child)


def force_eager() -> AbstractContextManager[object]:
    """Run compiled layers uncompiled: in generation, each layer has an index of its own into the cache."""
    return torch.compiler.set_stance("force_eager")
