"""Reads a published checkpoint as its users do: transformers, and no line of this package.

It runs by its path, in a process or an environment of its own, under transformers 4.57 and 5, and imports neither
`vlm` nor its siblings: `python plain_reader.py JOB`. Files alone go in and out, JSON and safetensors.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

VISUAL_ENCODERS = ("visual_encoder", "vision_tower", "visual", "vision_model")
CONNECTORS = ("connector", "multi_modal_projector")
LANGUAGE_MODELS = ("language_model", "text_model")
"""What models call their parts; the first name that a model has counts."""

RESULTS = "results.json"
"""The file of versions and answers, beside a `.safetensors` file for each case."""


def main(job_file: str) -> None:
    """Do a job: see `observe`; `hidden_packages` are packages that must not be importable."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    sys.meta_path.insert(0, HiddenPackages(job["hidden_packages"]))
    observe(job)


Message = dict[str, Any]
"""A message as processors take it: a role, and a list of images and texts."""
Job = dict[str, Any]
"""What is to be observed, see `observe`."""


class HiddenPackages:
    """Finds no module of some packages, as where they are not installed."""

    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ImportError for a module of the packages."""
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is hidden, because a published checkpoint must load without it")


def observe(job: Job) -> None:
    """Write what a checkpoint gives for each case, and its answers; none where the model fails at a case.

    Args:
        job: `model`, a folder; `out`, a folder; `device`; `dtype`; `trust_remote_code`; `processor_options` for
            `AutoProcessor`; `cases`, each with a `name` and `messages` whose images are paths; `traced`, the names of
            cases of which all layers are wanted; `questions`, likewise, to be answered in at most `max_new_tokens`;
            and `num_logits`, of how many last positions.
    """
    out, model_folder = Path(job["out"]), job["model"]
    trusted = {"trust_remote_code": True} if job["trust_remote_code"] else {}
    processor = AutoProcessor.from_pretrained(model_folder, **trusted, **job["processor_options"])
    model: Any = AutoModelForImageTextToText.from_pretrained(
        model_folder, dtype=getattr(torch, job["dtype"]), **trusted
    )
    model = model.to(job["device"]).eval()
    failures: dict[str, str] = {}
    for case in job["cases"]:
        inputs = prepare(processor, case["messages"])
        outputs = {} if case["name"] in job["traced"] else read_inputs(inputs)
        moved = inputs.to(model.device, model.dtype)
        with torch.no_grad(), traced(model, outputs if case["name"] in job["traced"] else None):
            try:
                outputs["logits"] = model(**moved).logits[0, -job["num_logits"] :]
            except Exception as error:  # whatever a model raises of inputs that do not fit it
                failures[case["name"]] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        save_file({name: as_saved(tensor) for name, tensor in outputs.items()}, out / f"{case['name']}.safetensors")
    questions = () if failures else job["questions"]
    answers = {case["name"]: answer(model, processor, case["messages"], job) for case in questions}
    versions = {module.__name__: module.__version__ for module in (transformers, torch)}  # of what was imported
    ends = model.generation_config.eos_token_id
    results = {
        "answers": answers,
        "ends": ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else [],
        "failures": failures,
        "versions": versions,
    }
    (out / RESULTS).write_text(json.dumps(results), encoding="utf-8")


def prepare(processor: ProcessorMixin, messages: list[Message]) -> BatchFeature:
    """Return the inputs of a conversation, as the model card tells its readers to make them."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return cast(BatchFeature, inputs)  # declared for texts too


def read_inputs(inputs: BatchFeature) -> dict[str, Tensor]:
    """Return ids `(tokens,)`, and pixels if there are any, in the form of the processor."""
    outputs = {"ids": inputs["input_ids"][0]}
    return outputs | ({"pixels": inputs["pixel_values"]} if "pixel_values" in inputs else {})


def answer(model: Any, processor: ProcessorMixin, messages: list[Message], job: Job) -> str:
    """Return the greedy answer to a conversation."""
    inputs = prepare(processor, messages).to(model.device, model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=job["max_new_tokens"], do_sample=False)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def as_saved(tensor: Tensor) -> Tensor:
    """Return a tensor as it is saved: on the CPU, contiguous, apart from others."""
    return tensor.detach().cpu().contiguous().clone()


# Layers


@contextmanager
def traced(model: nn.Module, outputs: dict[str, Tensor] | None) -> Iterator[None]:
    """Within this context, a forward pass of one conversation adds what each part gives; without `outputs`, nothing.

    Added are, in the order in which they run, `visual encoder layer 1` … and `image features` (what the connector
    reads), `connector` (what it gives), each `(images, tokens, width)`, and `language model layer 1` … `(tokens,
    width)`.
    """
    if outputs is None:
        yield
        return
    handles = []
    for name, module in find_layers(model):
        handles.append(module.register_forward_hook(lambda _, __, given, name=name: add(outputs, name, given)))
    if (connector := find_part(model, CONNECTORS)) is not None:
        handles.append(connector.register_forward_pre_hook(lambda _, given: add(outputs, "image features", given)))
        handles.append(connector.register_forward_hook(lambda _, __, given: add(outputs, "connector", given)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add(outputs: dict[str, Tensor], name: str, given: object) -> None:
    """Add what a module gives, or is given: the first of several; a language model's without the only row."""
    if isinstance(given, tuple) and not given:  # what a connector is given by name is not seen
        return
    tensor = given[0] if isinstance(given, tuple) else given
    assert isinstance(tensor, Tensor)
    if name.startswith("language model"):
        tensor = tensor[0]
    outputs[name] = tensor if name not in outputs else torch.cat([outputs[name], tensor])


def find_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of the encoders and of the language model with their names, counted from 1."""
    part = find_part(model, VISUAL_ENCODERS)
    encoders = [] if part is None else list(getattr(part, "encoders", [part]))
    for number, encoder in enumerate(encoders, start=1):
        name = "visual encoder" if number == 1 else f"visual encoder {number}"
        yield from ((f"{name} layer {place}", layer) for place, layer in enumerate(layers_of(encoder), start=1))
    text = find_part(model, LANGUAGE_MODELS)
    if text is not None:
        yield from ((f"language model layer {place}", layer) for place, layer in enumerate(layers_of(text), start=1))


def find_part(model: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """Return the module of the model, or of the model within it, that has one of the names; None where none has."""
    for owner in (model, getattr(model, "model", None)):
        for name in names:
            if isinstance(part := getattr(owner, name, None), nn.Module):
                return part
    return None


def layers_of(part: nn.Module) -> list[nn.Module]:
    """Return the modules of the first list of a part, the outermost first; empty where it has none."""
    lists = [(name.count("."), name, child) for name, child in part.named_modules() if isinstance(child, nn.ModuleList)]
    return list(min(lists, key=lambda entry: entry[0])[2]) if lists else []


if __name__ == "__main__":
    main(sys.argv[1])
