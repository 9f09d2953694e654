"""Exports, read back by the classes that others read them with: are all names there, and are the outputs ours?

Names and shapes are checked on the meta device, before a weight is written. Outputs are those of one question, in the
precision of the checkpoint, first of our model, then of the export, so that memory holds one model at a time. `llava`
is read by transformers' own class; `llava-original` by transformers' classes of its parts, joined as in LLaVA's code.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
)

from vlm.assembly.loading import LoadingInfo
from vlm.assembly.numbers import bound_infinite
from vlm.assembly.round_trip import quiet_loading
from vlm.hub.folders import JsonObject, read_json
from vlm.hub.shards import read_shard, weight_files
from vlm.hub.sources import make_original_text_config
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor

State = dict[str, Tensor]
"""Tensors by their names on disk."""

PROBE_QUESTION = "What is this?"

LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Precision -> the largest `|ours - theirs| / |ours|` (Euclidean norms) that counts as rounding."""

TOWER, PROJECTOR, NEWLINE = "model.vision_tower.vision_tower.", "model.mm_projector.", "model.image_newline"
"""Where LLaVA's own code has what is not its language model's."""

LOADED_MODEL_FACTOR = 1.2
"""How many times the bytes of its weights a model takes in memory, with one question."""


class Probe(NamedTuple):
    """A question about an image, and one without.

    Attributes:
        image: the image, `PIL.Image`.
        ids: `(1, T)`: the question with placeholders for the image.
        inputs: our model's inputs of the image.
        text_ids: `(1, T)`: the question alone, without a template.
    """

    image: Image.Image
    ids: Tensor
    inputs: State
    text_ids: Tensor


class Readback(NamedTuple):
    """How one format is read back."""

    find_problems: Callable[[JsonObject, VLMConfig, State], list[str]]
    """What is wrong with the names and shapes, for `config.json`, our configuration, and meta tensors."""
    read_outputs: Callable[[Path, VLMConfig, Probe], State]
    """The outputs of an export in a folder, by what they are."""
    own_outputs: Callable[[VLMForConditionalGeneration, Probe], State]
    """The same of our model."""


def make_probe(processor: VLMProcessor) -> Probe:
    """Return one small image of noise and a question, as our processor prepares them."""
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    question = {"role": "user", "content": f"{processor.image_token}\n{PROBE_QUESTION}"}
    text = processor.apply_chat_template([question], add_generation_prompt=True)
    inputs: State = dict(processor(images=[image], text=text))
    text_ids = torch.tensor([processor.tokenizer(PROBE_QUESTION).input_ids])  # templates like `plain` drop the question
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    return Probe(image, ids, inputs, text_ids)


def find_differences(expected: State, actual: State) -> Iterator[str]:
    """Yield which outputs differ by more than rounding, and by how much."""
    for name, ours in expected.items():
        theirs = actual[name]
        if ours.shape != theirs.shape:
            yield f"{name} of shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
            continue
        if ours.isnan().any():
            yield f"{name} that are not numbers (NaN) already in the checkpoint"
            continue
        expected_values, found = (bound_infinite(tensor, ours.dtype) for tensor in (ours, theirs))
        norm = bound_infinite(ours[ours.isfinite()], ours.dtype).norm().clamp(min=1e-12)
        difference = float((expected_values - found).norm() / norm)
        if not difference <= LARGEST_DIFFERENCE.get(ours.dtype, 1e-4):
            yield f"{name} that differ by {difference:.2g} of their norm"


def find_memory_shortage(folder: Path) -> str | None:
    """Return why a folder's weights cannot be loaded now, as a sentence; None where they fit into free memory."""
    return find_memory_shortage_for(sum(file.stat().st_size for file in weight_files(folder)))


def find_memory_shortage_for(num_bytes: int) -> str | None:
    """Return why weights of this size cannot be loaded now, as a sentence; None where they fit into free memory."""
    needed, available = LOADED_MODEL_FACTOR * num_bytes, read_available_memory()
    if available is None or needed <= available:
        return None
    return f"the weights need {needed / 1e9:.0f} GB of memory, but {available / 1e9:.0f} GB are free"


def read_available_memory() -> int | None:
    """Return the bytes that new programs may use, as Linux estimates them; None where they are not known."""
    if not (file := Path("/proc/meminfo")).is_file():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text(encoding="ascii"))
    return int(match[1]) * 1024 if match else None


def _loading_problems(model_class: Any, config: PreTrainedConfig, state: State) -> Iterator[str]:
    """Yield what a class of transformers lacks, has no place for, or needs in another shape."""
    _, info = load_state(model_class, config, state, device_map="meta")
    name = model_class.__name__
    for found, problem in ((info["missing_keys"], "lacks"), (info["unexpected_keys"], "has no place for")):
        if names := sorted(found):
            yield f"{name} {problem} {len(names)} weights, such as {', '.join(names[:3])}"
    for weight, given, needed in sorted(info["mismatched_keys"], key=str):
        yield f"{name} needs {weight} as {tuple(needed)}, not {tuple(given)}"


def load_state(model_class: Any, config: PreTrainedConfig, state: State, **options: object) -> tuple[Any, LoadingInfo]:
    """Return a model of a class with a state under the names of files, and what transformers says of loading it."""
    with quiet_loading():
        return model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )


# transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision


def _find_native_problems(values: JsonObject, config: VLMConfig, state: State) -> list[str]:
    theirs = CONFIG_MAPPING[values["model_type"]].from_dict(deepcopy(values))  # which it changes
    return list(_loading_problems(AutoModelForImageTextToText._model_mapping[type(theirs)], theirs, state))


def _read_native_outputs(folder: Path, config: VLMConfig, probe: Probe) -> State:
    with quiet_loading():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    return read_native_logits(model, folder, probe)


@torch.no_grad()
def read_native_logits(model: Any, folder: Path, probe: Probe) -> State:
    """Return a model's logits of our ids, with the image as transformers' processor in a folder prepares it."""
    reader: Any = AutoProcessor.from_pretrained(folder)
    inputs = reader(images=[probe.image], text=reader.image_token, return_tensors="pt")
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    return {"logits": model(input_ids=probe.ids, **images).logits}


@torch.no_grad()
def _own_logits(model: VLMForConditionalGeneration, probe: Probe) -> State:
    logits = model(input_ids=probe.ids, **probe.inputs).logits
    assert logits is not None
    return {"logits": logits}


# The original LLaVA


class OriginalParts(NamedTuple):
    """The weights of an original LLaVA, by the module that reads them."""

    text: State
    tower: State
    projector: State
    newline: Tensor | None


def split_original(state: Mapping[str, Tensor]) -> OriginalParts:
    """Return the weights of an original LLaVA, by name on disk, divided by the module that reads them."""
    parts = OriginalParts({}, {}, {}, state.get(NEWLINE))
    for name, tensor in state.items():
        if name.startswith(TOWER):
            parts.tower[name.removeprefix(TOWER)] = tensor
        elif name.startswith(PROJECTOR):
            parts.projector[name.removeprefix(PROJECTOR)] = tensor
        elif name != NEWLINE:
            parts.text[name] = tensor
    return parts


def make_projector(values: JsonObject, text_dim: int) -> nn.Module:
    """Return LLaVA's projector of a `config.json`, without weights that mean anything."""
    kind, vision_dim = values["mm_projector_type"], values["mm_hidden_size"]
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision_dim, text_dim)
    depth = int(cast("re.Match[str]", re.fullmatch(r"mlp(\d+)x_gelu", kind))[1])
    layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
    return nn.Sequential(*layers)


def _find_original_problems(values: JsonObject, config: VLMConfig, state: State) -> list[str]:
    parts, text = split_original(state), make_original_text_config(deepcopy(values))
    problems = [*_loading_problems(AutoModelForCausalLM._model_mapping[type(text)], text, parts.text)]
    vision = config.vision_config
    problems += _loading_problems(AutoModel._model_mapping[type(vision)], vision, parts.tower)
    needed = {
        name: tuple(tensor.shape) for name, tensor in make_projector(values, text.hidden_size).state_dict().items()
    }
    given = {name: tuple(tensor.shape) for name, tensor in parts.projector.items()}
    if needed != given:
        problems.append(f"{values['mm_projector_type']} needs mm_projector {needed}, not {given}")
    newline = (text.hidden_size,) if "unpad" in values["mm_patch_merge_type"] else None
    if newline != (None if parts.newline is None else tuple(parts.newline.shape)):
        problems.append(f"mm_patch_merge_type={values['mm_patch_merge_type']} needs image_newline of shape {newline}")
    return problems


@torch.no_grad()
def _read_original_outputs(folder: Path, config: VLMConfig, probe: Probe) -> State:
    """Return the logits of the question alone, the image's features before rows are joined, and what joins them."""
    values = read_json(folder / "config.json")
    parts = split_original({name: tensor for file in weight_files(folder) for name, tensor in read_shard(file)})
    text, vision = make_original_text_config(values), config.vision_config
    dtype = next(iter(parts.text.values())).dtype
    model, _ = load_state(AutoModelForCausalLM._model_mapping[type(text)], text, parts.text, dtype=dtype)
    tower, _ = load_state(AutoModel._model_mapping[type(vision)], vision, parts.tower, dtype=dtype)
    projector = make_projector(values, text.hidden_size).to(dtype)
    projector.load_state_dict(parts.projector)
    states = tower.eval()(probe.inputs["pixel_values"].to(dtype), output_hidden_states=True).hidden_states
    features = states[values["mm_vision_select_layer"]]
    if values["mm_vision_select_feature"] == "patch" and vision.model_type == "clip_vision_model":
        features = features[:, 1:]
    outputs = {"logits": model.eval()(probe.text_ids).logits, "image features": projector(features)}
    return outputs if parts.newline is None else {**outputs, "image_newline": parts.newline}


@torch.no_grad()
def _own_parts_outputs(model: VLMForConditionalGeneration, probe: Probe) -> State:
    logits = model(input_ids=probe.text_ids).logits
    assert logits is not None
    outputs = {"logits": logits, "image features": model.get_image_features(probe.inputs["pixel_values"])}
    return outputs if model.image_newline is None else {**outputs, "image_newline": model.image_newline.weight}


NATIVE = Readback(_find_native_problems, _read_native_outputs, _own_logits)
ORIGINAL = Readback(_find_original_problems, _read_original_outputs, _own_parts_outputs)
