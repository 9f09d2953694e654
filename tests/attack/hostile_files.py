"""Hostile files: pipes and links, JSON that is none, weights that are not whole or not the model's, wrong indexes."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.attack.mutations import (
    INDEX,
    KINDS,
    WEIGHTS,
    WHOLE_KINDS,
    add,
    change_header,
    change_weights,
    cut,
    first,
    put,
    remove,
    rename_tensor,
    replace_tensor,
    with_index,
    write_bytes,
)

State = dict[str, Any]
Change = Callable[[State], None]


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "base.json", "non_lora_trainables.safetensors")


def make_special_files() -> None:
    """Folders, links that lead in a circle, pipes and devices where a file should be."""
    makers: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir, "loop": lambda path: path.symlink_to(path.name), "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"), "nowhere": lambda path: path.symlink_to("/no/such/file"),
    }  # fmt: skip
    for kind, make in makers.items():
        for file, kinds in (("config.json", KINDS), (WEIGHTS, WHOLE_KINDS), ("tokenizer.json", ("composed",))):
            add(f"{file}-is-{kind}", lambda folder, f=file, m=make: put(folder / f, m), kinds=kinds, file=file)
    for kind in ("folder", "pipe", "device"):
        for file in (
            "adapter_model.safetensors",
            "adapter_config.json",
            "base.json",
            "non_lora_trainables.safetensors",
        ):
            add(f"{file}-is-{kind}", lambda folder, f=file, m=makers[kind]: put(folder / f, m), kinds=("adapter",),
                file=file)  # fmt: skip


def make_broken_json() -> None:
    """Each JSON file that is opened, in forms that are none."""
    forms = {
        "list": b"[]", "number": b"1", "null": b"null", "text": b'"x"', "empty": b"", "cut": b'{"model_type": "ll',
        "latin": b'{"model_type": "\xe9"}', "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "object": b"{}",
        "binary": bytes(range(256)), "nan": b'{"model_type": NaN}', "twice": b'{"model_type": "vlm"}{}',
    }  # fmt: skip
    for form, content in forms.items():
        add(f"config.json-{form}", write_bytes("config.json", content), file="config.json")
        add(f"base.json-{form}", write_bytes("base.json", content), kinds=("adapter",), file="base.json")
        add(f"adapter_config.json-{form}", write_bytes("adapter_config.json", content), kinds=("adapter",),
            file="adapter_config.json")  # fmt: skip
        add(f"{INDEX}-{form}", with_index_text(content), kinds=WHOLE_KINDS, file=INDEX)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
            harmless = form in ("object", "nan") or file == "generation_config.json"
            add(f"{file}-{form}", write_bytes(file, content), kinds=("composed", "family"), file=file,
                harmless=harmless)  # fmt: skip
    add("config.json-huge", lambda folder: (folder / "config.json").open("ab").truncate(1 << 30), file="config.json")
    add("tokenizer.json-huge", lambda folder: (folder / "tokenizer.json").open("ab").truncate(3 << 30),
        kinds=("composed",), file="tokenizer.json")  # fmt: skip


def with_index_text(content: bytes) -> Callable[[Path], None]:
    """Give the weights an index that is these bytes."""

    def write(folder: Path) -> None:
        with_index(lambda index, folder: None)(folder)
        (folder / INDEX).write_bytes(content)

    return write


def make_cut_weights() -> None:
    """Weights that are not whole, or no safetensors."""
    for file, kinds in ((WEIGHTS, WHOLE_KINDS), ("adapter_model.safetensors", ("adapter",))):
        for share in (0.0, 0.0001, 0.01, 0.5, 0.999):
            add(f"{file}-cut-{share}", cut(file, share), kinds=kinds, file=file)
        for name, number in (("2^60", 1 << 60), ("2^64-1", (1 << 64) - 1), ("200MB", 200_000_000), ("0", 0)):
            content = struct.pack("<Q", number) + b"{}"
            add(f"{file}-header-{name}", write_bytes(file, content), kinds=kinds, file=file)
        add(f"{file}-pickle", write_bytes(file, b"\x80\x04cos\nsystem\n(S'true'\ntR."), kinds=kinds, file=file)
        add(f"{file}-missing", lambda folder, f=file: (folder / f).unlink(), kinds=kinds)


def make_broken_headers() -> None:
    """Headers of weights that do not describe their data."""
    headers: dict[str, Change] = {
        "offsets-beyond": lambda header: entry(header).update(data_offsets=[0, 1 << 50]),
        "offsets-negative": lambda header: entry(header).update(data_offsets=[-8, 8]),
        "shape-huge": lambda header: entry(header).update(shape=[1 << 40, 1 << 40]),
        "shape-text": lambda header: entry(header).update(shape="large"),
        "dtype-unknown": lambda header: entry(header).update(dtype="Q7"),
        "list": lambda header: header.update({first(tensors(header), "weight"): []}),
        "name-controls": lambda header: header.update({"\x1b[31mred": header.pop(first(tensors(header), "connector") if
                         any("connector" in n for n in header) else first(tensors(header), "weight"))}),
    }  # fmt: skip
    for name, change in headers.items():
        add(f"header-{name}", change_header(change), kinds=WHOLE_KINDS)


def make_wrong_weights() -> None:
    """Weights that are not those of the model."""
    states: dict[str, Change] = {
        "lacks-layer": remove("layers.1."), "lacks-norm": remove("norm.weight"),
        "lacks-embeddings": remove("embed_tokens"),
        "all-gone": remove(""), "extra": lambda state: state.update(extra=torch.zeros(2)),
        "extra-layer": add_layer,
        "renamed": rename_tensor("q_proj.weight", "somewhere.else"),
        "shape": replace_tensor("q_proj.weight", lambda t: torch.zeros(3, 3)),
        "zero-size": replace_tensor("q_proj.weight", lambda t: torch.zeros(0, t.shape[1])),
        "transposed": replace_tensor("gate_proj.weight", lambda t: t.T.contiguous()),
        "scalar": replace_tensor("norm.weight", lambda t: torch.tensor(1.0)),
        "integers": replace_tensor("q_proj.weight", lambda t: t.to(torch.int32)),
        "bools": replace_tensor("q_proj.weight", lambda t: t > 0),
        "complex": replace_tensor("q_proj.weight", lambda t: t.to(torch.complex64)),
        "nan": replace_tensor("q_proj.weight", lambda t: t * float("nan")),
        "inf": replace_tensor("q_proj.weight", lambda t: t + float("inf")),
    }  # fmt: skip
    for name, change in states.items():
        add(f"weights-{name}", change_weights(change), kinds=WHOLE_KINDS)
    add("connector-missing", change_weights(remove("connector")), kinds=("composed", "prediction"))
    add("head-missing", change_weights(remove("heads.")), kinds=("prediction",))


def add_layer(state: State) -> None:
    """Add a copy of a layer behind the last."""
    layer = {name: tensor for name, tensor in state.items() if "layers.1." in name}
    state.update({name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in layer.items()})


def remove_adapter(folder: Path) -> None:
    """Remove both files of an adapter, which leaves a folder like one of a run without."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()


def make_wrong_adapters() -> None:
    """Weights of an adapter's folder that are not those of its base."""
    adapters: dict[str, Change] = {
        "empty": remove(""), "lacks-b": remove("lora_B"), "nan": replace_tensor("lora_B", lambda t: t * float("nan")),
        "shape": replace_tensor("lora_B", lambda t: torch.zeros(3, 3)),
        "extra": lambda s: s.update(extra=torch.ones(1)),
        "integers": replace_tensor("lora_B", lambda t: t.to(torch.int32)),
    }  # fmt: skip
    add("adapter-gone", remove_adapter, kinds=("adapter",))
    for name, change in adapters.items():
        add(f"adapter-{name}", change_weights(change, "adapter_model.safetensors"), kinds=("adapter",))
    trained: dict[str, Change] = {
        "unknown": lambda state: state.update({"no.such": torch.ones(2)}),
        "shape": lambda state: state.update({"connector.layers.0.weight": torch.ones(2, 2)}),
        "scalar": lambda state: state.update({"language_model.model.norm.weight": torch.tensor(1.0)}),
        "integers": lambda state: state.update({"language_model.model.norm.weight": torch.ones(32, dtype=torch.int32)}),
        "nan": lambda state: state.update({"language_model.model.norm.weight": torch.full((32,), float("nan"))}),
        "zero-rows": lambda state: state.update({"language_model.model.norm.weight": torch.ones(0)}),
    }
    for name, change in trained.items():
        add(f"trained-{name}", change_weights(change, "non_lora_trainables.safetensors"), kinds=("adapter",))


def tensors(header: dict[str, Any]) -> list[str]:
    """The tensors of a header."""
    return [name for name in header if name != "__metadata__"]


def entry(header: dict[str, Any]) -> dict[str, Any]:
    """The first weight of a header."""
    return header[first(tensors(header), "weight")]


def make_broken_indexes() -> None:
    """Indexes that name what is not there, or not theirs."""

    def point(name: object) -> Callable[[dict[str, Any], Path], None]:
        return lambda index, folder: index["weight_map"].update({first(index["weight_map"], "weight"): name})

    named: dict[str, object] = {
        "outside": "../base/model.safetensors", "absolute": "/etc/passwd", "missing": "model-3.safetensors",
        "config": "config.json", "number": 3, "null": None, "list": ["a"],
        "pickle": "evil.bin", "empty": "", "dot": ".",
    }  # fmt: skip
    for name, value in named.items():
        add(f"index-{name}", with_index(point(value)), kinds=WHOLE_KINDS, file=INDEX)
    other: dict[str, Callable[[dict[str, Any], Path], None]] = {
        "no-map": lambda index, folder: index.pop("weight_map"),
        "map-list": lambda index, folder: index.update(weight_map=[]),
        "empty-map": lambda index, folder: index.update(weight_map={}),
        "swapped": swap_shard,
        "unlisted": lambda index, folder: index["weight_map"].pop(first(index["weight_map"], "weight")),
        "unknown": lambda index, folder: index["weight_map"].update(more="model-00001-of-00002.safetensors"),
    }  # fmt: skip
    for name, change in other.items():
        add(f"index-{name}", with_index(change), kinds=WHOLE_KINDS, file=INDEX, harmless=name == "unlisted")
    add("index-shard-gone", with_index(lambda i, folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        kinds=WHOLE_KINDS)  # fmt: skip
    add("index-shard-cut", with_index(lambda i, folder: cut("model-00002-of-00002.safetensors", 0.5)(folder)),
        kinds=WHOLE_KINDS)  # fmt: skip


def swap_shard(index: dict[str, Any], folder: Path) -> None:
    """Say of a tensor of the first shard that it is in the second one."""
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in sorted(index["weight_map"].items()) if shard == shards[0])
    index["weight_map"][name] = shards[1]


for make in (make_special_files, make_broken_json, make_cut_weights, make_broken_headers, make_wrong_weights,
             make_wrong_adapters, make_broken_indexes):  # fmt: skip
    make()
