"""What libraries keep for the whole process, put back as it was when a model that was thrown away is gone.

`TrainingArguments` and DeepSpeed's `Accelerator` write down what the run is, each for everything that follows: the
arguments of a probe would stand in for those of the run, and accelerate refuses DeepSpeed to a second trainer.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers.integrations import deepspeed as deepspeed_integration


@contextmanager
def libraries_restored() -> Iterator[None]:
    """Let a run begin afterwards as if nothing had been trained within; the memory of what was is freed."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    process = dict(PartialState._shared_state)  # the device among others
    variables = _accelerate_variables()
    deepspeed_integration.unset_hf_deepspeed_config()  # a model is resolved before arguments are made, and unsharded
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        PartialState._shared_state.clear()
        PartialState._shared_state.update(process)
        for name in _accelerate_variables().keys() - variables:
            del os.environ[name]
        os.environ.update(variables)
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference
        gc.collect()  # a trainer and its callbacks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _accelerate_variables() -> dict[str, str]:
    """Return the variables in which accelerate keeps what it uses, DeepSpeed for example."""
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
