"""An adapter for vLLM: the base as a LLaVA, and LoRA weights under the names that vLLM has for its language model.

vLLM adds the weights that the adapters of requests have to those of one base (`--enable-lora`). What else a run trained
goes into that base. Names, ranks and options that vLLM takes were read in the source of version 0.33.0.
"""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from vlm.assembly.adapter_merge import merge
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.family import read_config
from vlm.assembly.model_kinds import is_composed_config, is_composed_model
from vlm.assembly.round_trip import quiet_loading
from vlm.checks.checkpoint import check_adapter, check_checkpoint, is_adapter_folder
from vlm.hub.adapters import PEFT_PREFIX, LoraDelta, read_adapter
from vlm.hub.exporting import export_checkpoint
from vlm.hub.folders import create_folder, read_json, resolve_folder, write_json
from vlm.hub.opening import refuse_incompatible
from vlm.hub.readback import (
    NATIVE,
    Probe,
    State,
    find_differences,
    find_memory_shortage,
    make_probe,
    read_native_logits,
)
from vlm.hub.shards import read_meta_tensors

BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"
"""What an export has: a LLaVA to serve, and the adapter."""

LANGUAGE_MODEL = "language_model."
"""Where our names and vLLM's have the language model; both are the same below it."""

ADAPTED_LAYERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
)
"""Ends of names of the layers of language models that vLLM adapts."""

ADAPTED_ARCHITECTURES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
"""The classes of vLLM that take adapters; LLaVA-OneVision's does not."""

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be."""


def export_vllm_lora(name: str, out: Path, base_paths: Sequence[str] = ()) -> list[str]:
    """Write an adapter checkpoint as a base and an adapter for vLLM.

    Args:
        name: a LoRA run's folder `final`, or a name on the Hub.
        out: a new folder.
        base_paths: where the adapter's base lies now, see `read_base`.

    Returns:
        How to serve it, and what differs from the checkpoint, as sentences.

    Raises:
        ValueError: the checkpoint is none with an adapter, vLLM has no place for a part of it, or base and adapter
            together compute something else than the checkpoint.
    """
    checkpoint, deltas = open_adapter(name)
    with create_folder(out) as folder:
        with TemporaryDirectory(prefix="vllm-lora-") as space:
            notes = _write_base(checkpoint, Path(space), folder / BASE_FOLDER, base_paths)
        values = read_json(folder / BASE_FOLDER / "config.json")
        if values["architectures"][0] not in ADAPTED_ARCHITECTURES:
            raise ValueError(
                f"{name} becomes {values['architectures'][0]}, and vLLM takes adapters on "
                f"{' and '.join(ADAPTED_ARCHITECTURES)} alone: vlm merge-lora, then --format llava"
            )
        rank = write_adapter(deltas, folder / ADAPTER_FOLDER)
        notes += _compare(name, checkpoint, folder, base_paths)
    limit = next(limit for limit in MAX_RANKS if limit >= rank)
    command = (
        f"vllm serve {out / BASE_FOLDER} --enable-lora --max-lora-rank {limit} "
        f"--lora-modules {out.name}={out / ADAPTER_FOLDER}"
    )
    return [f"serve it: {command}", *notes, *_describe_base(checkpoint)]


def open_adapter(name: str) -> tuple[Path, dict[str, LoraDelta]]:
    """Return the folder of an adapter checkpoint, and what its adapter adds.

    Raises:
        ValueError: the checkpoint is none with an adapter, or vLLM has no place for a part of it.
    """
    checkpoint = resolve_folder(name)
    _require_adapter(name, checkpoint)
    deltas = read_adapter(checkpoint).deltas
    refuse_incompatible(name, "vllm-lora", _incompatibilities(deltas))
    return checkpoint, deltas


def _require_adapter(name: str, checkpoint: Path) -> None:
    """Raise ValueError for a checkpoint that is none, or has no adapter, or is no composed model."""
    check_checkpoint(checkpoint)
    complete = is_adapter_folder(checkpoint) and (checkpoint / ADAPTER_WEIGHTS).is_file()
    check_adapter(name, found=complete, expected=True)
    config = read_config(str(checkpoint), name)
    if not is_composed_config(config):
        raise ValueError(f"{name} adapts a {config.model_type} model; --format vllm-lora is for composed models")


def _incompatibilities(deltas: dict[str, LoraDelta]) -> Iterator[str]:
    """Yield what vLLM has no place for."""
    elsewhere = sorted(name for name in deltas if not name.startswith(LANGUAGE_MODEL))
    for part in dict.fromkeys(name.partition(".")[0] for name in elsewhere):
        names = [name for name in elsewhere if name.startswith(f"{part}.")]
        yield f"{len(names)} adapted layers of the {part}, such as {names[0]}: vLLM adapts the language model"
    for name in sorted(set(deltas) - set(elsewhere)):
        if name.removesuffix(".weight").rpartition(".")[2] not in ADAPTED_LAYERS:
            yield f"{name} is adapted: vLLM adapts {', '.join(ADAPTED_LAYERS)}"
    if (rank := max((len(delta.down) for delta in deltas.values()), default=0)) > MAX_RANKS[-1]:
        yield f"a rank of {rank}: vLLM's largest is {MAX_RANKS[-1]}"


def _write_base(checkpoint: Path, space: Path, out: Path, base_paths: Sequence[str]) -> list[str]:
    """Export the base with what else was trained, as the checkpoint would be without its adapter; return the notes."""
    bare = space / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if file.name == NON_LORA_WEIGHTS:  # it says that an adapter belongs beside it
            save_file(load_file(file), bare / file.name, {"format": "pt"})
        elif file.is_file() and not file.name.startswith("adapter_"):
            (bare / file.name).symlink_to(file.resolve())
    merge(str(bare), space / "whole", base_paths)
    return export_checkpoint(str(space / "whole"), out, "llava")


def write_adapter(deltas: dict[str, LoraDelta], folder: Path) -> int:
    """Write `adapter_config.json` and `adapter_model.safetensors`, and return the rank.

    All layers get one rank and the scale 1: earlier versions of vLLM pass over ranks and scales of single layers. A
    smaller rank is filled up with zeros, and the scale goes into the second factor.
    """
    folder.mkdir()
    rank = max(len(delta.down) for delta in deltas.values())
    state: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        layer = PEFT_PREFIX + name.removesuffix(".weight")
        missing = rank - len(delta.down)
        state[f"{layer}.lora_A.weight"] = torch.nn.functional.pad(delta.down, (0, 0, 0, missing)).contiguous()
        up = (delta.up.double() * delta.scale).to(delta.up.dtype)
        state[f"{layer}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing)).contiguous()
    save_file(state, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    targets = sorted(name.removesuffix(".weight") for name in deltas)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": targets}
    write_json(folder / "adapter_config.json", settings | {"task_type": "CAUSAL_LM", "inference_mode": True})
    return rank


def _describe_base(checkpoint: Path) -> Iterator[str]:
    trained = read_meta_tensors(checkpoint / NON_LORA_WEIGHTS)
    if trained:
        yield f"{BASE_FOLDER} has {len(trained)} weights that this run trained besides: it is for this adapter alone"
    else:
        yield f"{BASE_FOLDER} is what the run began with: other adapters on it can be served beside this one"


# Reading back


def _compare(name: str, checkpoint: Path, folder: Path, base_paths: Sequence[str]) -> list[str]:
    """Refuse an export that computes something else than the checkpoint; return why nothing was compared, if so."""
    if shortage := find_memory_shortage(folder / BASE_FOLDER):
        return [f"names and ranks were checked, outputs were not compared: {shortage}"]
    opened = open_checkpoint(checkpoint)
    probe = make_probe(opened.load_composed_processor())
    with quiet_loading():
        model = opened.load_model(base_paths=base_paths)
    assert is_composed_model(model)
    expected = NATIVE.own_outputs(model.eval(), probe)
    del model
    gc.collect()  # before the export is loaded: memory holds one model at a time
    if problems := list(find_differences(expected, read_adapted_outputs(folder, probe))):
        raise ValueError(f"{name} was not exported: base and adapter together have {'; '.join(problems)}")
    return []


@torch.no_grad()
def read_adapted_outputs(folder: Path, probe: Probe) -> State:
    """Return the logits of a base with its adapter, which is added to the layers that its names are of, in float32."""
    with quiet_loading():
        model: object = AutoModelForImageTextToText.from_pretrained(folder / BASE_FOLDER, dtype="auto").eval()
    layers = dict(model.named_parameters())
    for name, delta in read_adapter(folder / ADAPTER_FOLDER).deltas.items():
        weight = layers[name.replace("language_model.model.", "model.language_model.", 1)]  # as transformers names it
        weight.copy_(delta.add_to(weight))
    return read_native_logits(model, folder / BASE_FOLDER, probe)
