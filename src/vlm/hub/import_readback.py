"""Imports, loaded and compared with what they were made from, before they are called done.

The source is loaded by transformers' own classes: a LLaVA of transformers as a whole; of the original's, its language
model and its encoder, with LLaVA's projector between them. Both get the ids and pixels that our processor prepares.
"""

import gc
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.foreign_config import load_config
from vlm.assembly.model_kinds import is_composed_model
from vlm.assembly.round_trip import quiet_loading
from vlm.hub.folders import read_json, resolve_folder
from vlm.hub.readback import (
    NATIVE,
    ORIGINAL,
    Probe,
    State,
    find_differences,
    find_memory_shortage,
    load_state,
    make_probe,
    make_projector,
    split_original,
)
from vlm.hub.shards import read_shard
from vlm.hub.sources import NATIVE_TYPES, ForeignCheckpoint
from vlm.models import VLMProcessor


def compare_import(name: str, source: ForeignCheckpoint, folder: Path, processor: VLMProcessor) -> Iterator[str]:
    """Refuse an import whose outputs are not its source's; yield why they were not compared, if they were not.

    Args:
        name: the source's, a folder or a name on the Hub.
        source: what was read of it.
        folder: the checkpoint that was written.
        processor: its processor.

    Raises:
        ValueError: the checkpoint does not load, or its outputs differ by more than rounding.
    """
    if shortage := find_memory_shortage(folder):
        yield f"{name} was not compared with what was written: {shortage}"
        return
    probe = make_probe(processor)
    is_native = read_json(resolve_folder(name) / "config.json").get("model_type") in NATIVE_TYPES and not source.encoder
    with quiet_loading():
        model = open_checkpoint(folder).load_model()
    assert is_composed_model(model)
    with torch.no_grad():
        ours = (NATIVE if is_native else ORIGINAL).own_outputs(model.eval(), probe)
    dtype, image_token = model.dtype, model.config.image_token_id
    del model
    gc.collect()  # before the source is loaded: memory holds one model at a time
    read_outputs = _read_native_outputs if is_native else _read_original_outputs
    theirs = read_outputs(name, source, probe, dtype, image_token)
    ours["logits"] = ours["logits"][..., : theirs["logits"].shape[-1]]  # rows of the vocabulary were added
    if problems := list(find_differences(ours, theirs)):
        raise ValueError(f"{name} was not imported: the files written have {'; '.join(problems)}")


@torch.no_grad()
def _read_native_outputs(
    name: str, source: ForeignCheckpoint, probe: Probe, dtype: torch.dtype, image_token: int
) -> State:
    """Return the logits of transformers' LLaVA for the image and the question."""
    with quiet_loading():
        folder = resolve_folder(name)
        config = load_config(folder, name)
        model: object = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=dtype).eval()
    images = {"pixel_values": probe.inputs["pixel_values"].to(dtype)}
    if "image_views" in probe.inputs:
        images = {"pixel_values": images["pixel_values"][None], "image_sizes": probe.inputs["image_sizes"]}
    ids = probe.ids.masked_fill(probe.ids == image_token, model.config.image_token_id)
    return {"logits": model(input_ids=ids, **images).logits}


@torch.no_grad()
def _read_original_outputs(
    name: str, source: ForeignCheckpoint, probe: Probe, dtype: torch.dtype, image_token: int
) -> State:
    """Return the logits of the question alone, the image's features before rows are joined, and what joins them."""
    values = read_json(resolve_folder(name) / "config.json")
    parts = split_original(_read_weights(source))
    text = deepcopy(source.text_config)
    text.vocab_size = len(next(tensor for name, tensor in parts.text.items() if name.endswith("embed_tokens.weight")))
    model, _ = load_state(AutoModelForCausalLM._model_mapping[type(text)], text, parts.text, dtype=dtype)
    outputs: State = {"logits": model.eval()(probe.text_ids).logits}
    del model
    assert source.encoder is not None
    vision = load_config(source.encoder, source.encoder)
    vision = getattr(vision, "vision_config", vision)
    if parts.tower:
        tower, _ = load_state(AutoModel._model_mapping[type(vision)], vision, parts.tower, dtype=dtype)
    else:
        with quiet_loading():
            tower = AutoModel.from_pretrained(source.encoder, config=vision, dtype=dtype)
    states = tower.eval()(probe.inputs["pixel_values"].to(dtype), output_hidden_states=True).hidden_states
    if vision.model_type == "clip_vision_model":
        features = states[values["mm_vision_select_layer"]]
        features = features[:, 1:] if values.get("mm_vision_select_feature", "patch") == "patch" else features
    else:
        features = states[-2]  # as the original reads SigLIP, whatever the fields say
    kind = {"mm_projector_type": values.get("mm_projector_type") or "linear", "mm_hidden_size": vision.hidden_size}
    projector = make_projector(kind, text.hidden_size).to(dtype)
    projector.load_state_dict(parts.projector)
    outputs["image features"] = projector(features)
    return outputs if parts.newline is None else {**outputs, "image_newline": parts.newline.to(dtype)}


def _read_weights(source: ForeignCheckpoint) -> dict[str, Tensor]:
    """Return the weights of an original LLaVA under its own names, with its adapter merged."""
    weights = dict(source.adapter.replacements)
    for store in source.stores:
        for file in store.files:
            for name, tensor in read_shard(file):
                weights.setdefault(name, tensor)
    for name, delta in source.adapter.deltas.items():
        weights[name] = delta.add_to(weights[name])
    return weights
