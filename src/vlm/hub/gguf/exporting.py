"""Exporting to GGUF: the language model as one file, the encoder with the connector (`mmproj`) as another."""

import gc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import gguf
import torch
from torch import Tensor
from tqdm import tqdm

from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.model_kinds import is_composed_model
from vlm.assembly.numbers import bound_infinite
from vlm.assembly.round_trip import quiet_loading
from vlm.hub.folders import create_folder
from vlm.hub.gguf import language_models, mmproj, tokenizer
from vlm.hub.gguf.readback import (
    LARGEST_LOGIT_DIFFERENCE,
    TensorCheck,
    find_tokenizer_problems,
    read_logits,
    reads_architecture,
)
from vlm.hub.gguf.tensors import FILE_TYPES, STORED_TYPES, PlannedTensor, StoredType, TensorFile
from vlm.hub.opening import OpenedCheckpoint, name_weights, read_shapes, refuse_incompatible
from vlm.hub.readback import find_memory_shortage_for
from vlm.hub.shards import read_shard, weight_files
from vlm.models import VLMConfig, VLMProcessor

LANGUAGE_MODEL_FILE, MMPROJ_FILE = "model.gguf", "mmproj.gguf"
OUR_NAMES = (("", ""),)
"""Prefixes that leave our names as they are."""

Weights = dict[str, tuple[str, tuple[int, ...]]]
"""A name -> the name in the checkpoint, and the shape."""


def export_gguf(opened: OpenedCheckpoint, out: Path, dtype: str | None = None) -> list[str]:
    """Write a checkpoint as `model.gguf` and `mmproj.gguf`, and read both back.

    Args:
        opened: the checkpoint.
        out: a new folder.
        dtype: how matrices are stored, a name of `STORED_TYPES`; as in the checkpoint by default.

    Returns:
        What differs from the checkpoint in llama.cpp, as sentences.

    Raises:
        ValueError: llama.cpp has no place for a part of the model, where every reason is listed; or what was written
            is not the checkpoint.
    """
    config, processor = opened.config, opened.processor
    refuse_incompatible(opened.name, "gguf", find_incompatibilities(config, processor))
    precision = dtype or str(config.dtype or "float32").removeprefix("torch.")
    if precision not in STORED_TYPES:
        raise ValueError(f"{opened.name} has dtype={precision}: choose a --dtype of {', '.join(STORED_TYPES)}")
    wanted = STORED_TYPES[precision]
    text, vision = _divide_weights(opened)
    plans = {
        LANGUAGE_MODEL_FILE: list(language_models.plan_language_model(config.text_config, text, wanted)),
        MMPROJ_FILE: list(mmproj.plan_mmproj(config, vision, wanted)),
    }
    with create_folder(out) as folder:
        writers = {
            LANGUAGE_MODEL_FILE: _make_text_writer(config, processor, wanted),
            MMPROJ_FILE: _make_mmproj_writer(config, processor, wanted),
        }
        _write(opened.folder, folder, writers, plans)
        _compare_tensors(opened.folder, folder, plans)
        if problems := list(find_tokenizer_problems(folder / LANGUAGE_MODEL_FILE, processor)):
            raise ValueError(f"{opened.name} was not exported: the files written have {'; '.join(problems)}")
        return [
            *mmproj.find_differences(config, processor),
            *tokenizer.find_differences(processor),
            *_compare_logits(opened, folder / LANGUAGE_MODEL_FILE, wanted),
        ]


def find_incompatibilities(config: VLMConfig, processor: VLMProcessor) -> list[str]:
    """Return every reason why llama.cpp cannot answer as the model does."""
    return [
        *mmproj.find_incompatibilities(config, processor),
        *language_models.find_incompatibilities(config.text_config),
        *tokenizer.find_incompatibilities(processor),
    ]


def _divide_weights(opened: OpenedCheckpoint) -> tuple[Weights, Weights]:
    """Return the weights of the language model by transformers' names, and the others by ours."""
    names = name_weights(opened.name, opened.folder, opened.config, OUR_NAMES)
    text, vision = {}, {}
    for source, tensor in read_shapes(opened.folder).items():
        if source in names:
            ours = names[source]
            part = text if ours.startswith("language_model.") else vision
            part[ours.removeprefix("language_model.")] = (source, tuple(tensor.shape))
    return text, vision


def _make_text_writer(config: VLMConfig, processor: VLMProcessor, wanted: StoredType) -> gguf.GGUFWriter:
    text = config.text_config
    arch = gguf.MODEL_ARCH_NAMES[language_models.ARCHITECTURES[text.model_type].arch]
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    _add_precision(writer, wanted)
    language_models.add_language_model(writer, text)
    tokenizer.add_tokenizer(writer, processor, text.vocab_size)
    return writer


def _make_mmproj_writer(config: VLMConfig, processor: VLMProcessor, wanted: StoredType) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    writer.add_type(gguf.GGUFType.MMPROJ)
    _add_precision(writer, wanted)
    mmproj.add_mmproj(writer, config, processor)
    return writer


def _add_precision(writer: gguf.GGUFWriter, wanted: StoredType) -> None:
    writer.add_file_type(FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write(
    checkpoint: Path, folder: Path, writers: dict[str, gguf.GGUFWriter], plans: dict[str, list[PlannedTensor]]
) -> None:
    """Write both files, a tensor at a time."""
    files = [TensorFile(folder / name, writers[name], plan) for name, plan in plans.items()]
    for source, tensor in tqdm(_tensors(checkpoint), desc="weights", unit="", disable=None):
        for file in files:
            file.add(source, tensor)
    for file in files:
        file.close()


def _compare_tensors(checkpoint: Path, folder: Path, plans: dict[str, list[PlannedTensor]]) -> None:
    """Refuse files that hold another tensor than the checkpoint."""
    checks = [TensorCheck(folder / name, plan) for name, plan in plans.items()]
    for source, tensor in _tensors(checkpoint):
        for check in checks:
            check.compare(source, tensor)


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    return chain.from_iterable(map(read_shard, weight_files(checkpoint)))


@torch.no_grad()
def _compare_logits(opened: OpenedCheckpoint, file: Path, wanted: StoredType) -> list[str]:
    """Refuse a language model whose logits are not the checkpoint's; return why they were not compared."""
    text = opened.config.text_config
    if not reads_architecture(text.model_type):
        return [f"tensors were compared, logits were not: transformers reads no GGUF of a {text.model_type}"]
    if shortage := find_memory_shortage_for(4 * sum(tensor.n_elements for tensor in gguf.GGUFReader(file).tensors)):
        return [f"tensors were compared, logits were not: {shortage}"]
    ids = torch.tensor([opened.processor.tokenizer(tokenizer.TEXTS[0]).input_ids])
    with quiet_loading():
        model = open_checkpoint(opened.folder).load_model()
    assert is_composed_model(model)
    ours = model.float().eval()(input_ids=ids).logits
    del model
    gc.collect()  # before the export is loaded: memory holds one model at a time
    assert ours is not None
    theirs = read_logits(file, text, ids)
    expected, found = (bound_infinite(logits, torch.float32) for logits in (ours, theirs))
    difference = float((expected - found).norm() / expected.norm().clamp(min=1e-12))
    if not difference <= LARGEST_LOGIT_DIFFERENCE[wanted]:
        raise ValueError(f"{opened.name} was not exported: its logits in GGUF differ by {difference:.2g} of their norm")
    return []
