"""Checkpoints as a stranger may write them: whole ones of each kind, and what is done to a copy of each.

A row of `MUTATIONS` is done to a checkpoint of each kind that it fits. None of the results may answer: each is refused
by name. To attack a checkpoint in another way, add a row.
"""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.families.tiny_families import save_family
from tests.tiny_parts import Parts
from vlm.assembly import adapter_folder
from vlm.assembly.adapter_base import WHOLE_CHECKPOINT, Base, make_source
from vlm.models import VLMForPrediction, VLMPredictionConfig

KINDS = ("composed", "family", "prediction", "adapter")
WHOLE_KINDS = ("composed", "family", "prediction")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# Whole checkpoints


def save_whole(kind: str, folder: Path, parts: Parts) -> None:
    """Write a whole checkpoint of a kind; an adapter's base is beside it."""
    if kind == "family":
        save_family("llava-1.5", folder)
        return
    model, processor = parts.model(template="chatml")
    if kind == "prediction":
        head = {"name": "label", "task": "binary", "labels": ["no", "yes"], "loss": "bce"}
        model = VLMForPrediction(VLMPredictionConfig(body_config=model.config, heads=[head]), model)
    if kind == "adapter":
        base = folder.with_name("base")
        model.save_pretrained(base)
        processor.save_pretrained(base)
        layer = "language_model.model.layers.0.self_attn.q_proj"
        model.requires_grad_(False).add_adapter(LoraConfig(r=2, target_modules=[layer]))
        adapter_folder.save(model, folder, Base({WHOLE_CHECKPOINT: make_source(str(base), None)}))
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


# What is done to them


@dataclass(frozen=True)
class Mutation:
    """What a stranger does to a whole checkpoint.

    Attributes:
        change: does it to a folder.
        kinds: the kinds of checkpoints that it fits.
        file: the file whose name the refusal must have.
        harmless: whether a checkpoint may also go on as if nothing had been done.
    """

    change: Callable[[Path], None]
    kinds: tuple[str, ...] = KINDS
    file: str = ""
    harmless: bool = False


MUTATIONS: dict[str, Mutation] = {}


def add(name: str, change: Callable[[Path], None], *, kinds: tuple[str, ...] = KINDS, file: str = "",
        harmless: bool = False) -> None:  # fmt: skip
    """Put a row into the table."""
    assert name not in MUTATIONS
    MUTATIONS[name] = Mutation(change, kinds, file, harmless)


def write_bytes(file: str, content: bytes) -> Callable[[Path], None]:
    """Put a file of this content in place of another."""
    return lambda folder: put(folder / file, lambda path: path.write_bytes(content))


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Remove what is at a path, and write there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    write(path)


def set_json(file: str, values: Mapping[str, Any]) -> Callable[[Path], None]:
    """Set values of a JSON file by dotted keys; `...` removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        for key, value in values.items():
            *path, last = key.split(".")
            place = content
            for step in path:
                place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
            if value is ...:
                place.pop(last, None)
            else:
                place[last] = copy.deepcopy(value)
        (folder / file).write_text(json.dumps(content))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], None], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Change the tensors of a file."""

    def write(folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(state)
        save_file(state, folder / file, {"format": "pt"})

    return write


def change_header(change: Callable[[dict[str, Any]], None], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Change the header of a safetensors file, and leave its data."""

    def write(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return write


def cut(file: str, share: float) -> Callable[[Path], None]:
    """Keep the first part of a file, as a download that was interrupted does."""

    def write(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return write


def with_index(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], None]:
    """Give the weights an index of two shards, and change that."""

    def write(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        names = sorted(state)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, held in shards.items():
            save_file({name: state[name].clone() for name in held}, folder / shard, {"format": "pt"})
        (folder / WEIGHTS).unlink()
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        change(index, folder)
        (folder / INDEX).write_text(json.dumps(index))

    return write


def first(names: Any, word: str) -> str:
    """The first name with a word in it."""
    return next(name for name in sorted(names) if word in name)


def remove(word: str) -> Callable[[dict[str, Any]], None]:
    """Remove all tensors with a word in their names."""

    def change(state: dict[str, Any]) -> None:
        for name in [name for name in state if word in name]:
            del state[name]

    return change


def replace_tensor(word: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    """Replace the first tensor with a word in its name."""

    def change(state: dict[str, Any]) -> None:
        name = first(state, word)
        state[name] = make(state[name])

    return change


def rename_tensor(word: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Rename the first tensor with a word in its name."""
    return lambda state: state.update({new: state.pop(first(state, word))})


# Files that are none


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
        for file in ("adapter_model.safetensors", "adapter_config.json", "base.json", "non_lora_trainables.safetensors"):
            add(f"{file}-is-{kind}", lambda folder, f=file, m=makers[kind]: put(folder / f, m), kinds=("adapter",),
                file=file)  # fmt: skip


# JSON


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


# Weights


def make_broken_weights() -> None:
    """Weights that are not whole, not those of the model, or no safetensors."""
    for file, kinds in ((WEIGHTS, WHOLE_KINDS), ("adapter_model.safetensors", ("adapter",))):
        for share in (0.0, 0.0001, 0.01, 0.5, 0.999):
            add(f"{file}-cut-{share}", cut(file, share), kinds=kinds, file=file)
        for name, number in (("2^60", 1 << 60), ("2^64-1", (1 << 64) - 1), ("200MB", 200_000_000), ("0", 0)):
            content = struct.pack("<Q", number) + b"{}"
            add(f"{file}-header-{name}", write_bytes(file, content), kinds=kinds, file=file)
        add(f"{file}-pickle", write_bytes(file, b"\x80\x04cos\nsystem\n(S'true'\ntR."), kinds=kinds, file=file)
        add(f"{file}-missing", lambda folder, f=file: (folder / f).unlink(), kinds=kinds)
    headers: dict[str, Callable[[dict[str, Any]], None]] = {
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
    states: dict[str, Callable[[dict[str, Any]], None]] = {
        "lacks-layer": remove("layers.1."), "lacks-norm": remove("norm.weight"), "lacks-embeddings": remove("embed_tokens"),
        "all-gone": remove(""), "extra": lambda state: state.update(extra=torch.zeros(2)),
        "extra-layer": lambda state: state.update({
            name.replace("layers.1.", "layers.2."): t.clone() for name, t in list(state.items()) if "layers.1." in name}),
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
    adapters: dict[str, Callable[[dict[str, Any]], None]] = {
        "empty": remove(""), "lacks-b": remove("lora_B"), "nan": replace_tensor("lora_B", lambda t: t * float("nan")),
        "shape": replace_tensor("lora_B", lambda t: torch.zeros(3, 3)), "extra": lambda s: s.update(extra=torch.ones(1)),
        "integers": replace_tensor("lora_B", lambda t: t.to(torch.int32)),
    }  # fmt: skip
    for name, change in adapters.items():
        add(f"adapter-{name}", change_weights(change, "adapter_model.safetensors"), kinds=("adapter",))
    trained: dict[str, Callable[[dict[str, Any]], None]] = {
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
        "config": "config.json", "number": 3, "null": None, "list": ["a"], "pickle": "evil.bin", "empty": "", "dot": ".",
    }  # fmt: skip
    for name, value in named.items():
        add(f"index-{name}", with_index(point(value)), kinds=WHOLE_KINDS, file=INDEX)
    other: dict[str, Callable[[dict[str, Any], Path], None]] = {
        "no-map": lambda index, folder: index.pop("weight_map"),
        "map-list": lambda index, folder: index.update(weight_map=[]),
        "empty-map": lambda index, folder: index.update(weight_map={}),
        "swapped": lambda index, folder: index["weight_map"].update({first(index["weight_map"], "weight"):
                   "model-00002-of-00002.safetensors"}),
        "unlisted": lambda index, folder: index["weight_map"].pop(first(index["weight_map"], "weight")),
        "unknown": lambda index, folder: index["weight_map"].update(more="model-00001-of-00002.safetensors"),
    }  # fmt: skip
    for name, change in other.items():
        add(f"index-{name}", with_index(change), kinds=WHOLE_KINDS, file=INDEX)
    add("index-shard-gone", with_index(lambda i, folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        kinds=WHOLE_KINDS)  # fmt: skip
    add("index-shard-cut", with_index(lambda i, folder: cut("model-00002-of-00002.safetensors", 0.5)(folder)),
        kinds=WHOLE_KINDS)  # fmt: skip


# Configurations


def make_broken_configurations() -> None:
    """Values of `config.json` that no model has."""
    prefixes = {"composed": "", "family": "", "prediction": "body_config."}
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")
    values = {"huge": 10**9, "zero": 0, "negative": -1, "text": "many", "fraction": 1.5, "nan": float("nan"), "list": [1],
              "null": None, "yes": True}  # fmt: skip
    for kind, prefix in prefixes.items():
        for size in sizes:
            for name, value in values.items():
                add(f"{kind}-text-{size}-{name}", set_json("config.json", {f"{prefix}text_config.{size}": value}),
                    kinds=(kind,), harmless=name == "null")  # fmt: skip
        for size in ("num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_channels"):
            for name in ("huge", "zero", "text"):
                add(f"{kind}-vision-{size}-{name}",
                    set_json("config.json", {f"{prefix}vision_config.{size}": values[name]}), kinds=(kind,))  # fmt: skip
        for part in ("text_config", "vision_config"):
            for name, value in (("unknown", "no_such_model"), ("list", ["llama"]), ("number", 3), ("self", "vlm"),
                                ("gone", ...)):  # fmt: skip
                add(f"{kind}-{part}-type-{name}", set_json("config.json", {f"{prefix}{part}.model_type": value}),
                    kinds=(kind,), harmless=name == "gone")  # fmt: skip
            for name, value in (("list", []), ("text", "llama"), ("null", None), ("empty", {})):
                add(f"{kind}-{part}-{name}", set_json("config.json", {f"{prefix}{part}": value}), kinds=(kind,),
                    harmless=name in ("null", "empty", "list"))  # fmt: skip
        add(f"{kind}-layers-1", set_json("config.json", {f"{prefix}text_config.num_hidden_layers": 1}), kinds=(kind,))
        add(f"{kind}-pad-far", set_json("config.json", {f"{prefix}text_config.pad_token_id": 10**9}), kinds=(kind,))
        add(f"{kind}-dtype", set_json("config.json", {f"{prefix}dtype": "float999"}), kinds=(kind,))
        add(f"{kind}-rope", set_json("config.json", {f"{prefix}text_config.rope_parameters": "all"}), kinds=(kind,))
        add(f"{kind}-activation", set_json("config.json", {f"{prefix}text_config.hidden_act": "no_such"}), kinds=(kind,))
    composed: dict[str, dict[str, Any]] = {
        "connector-null": {"connector": None}, "connector-text": {"connector": "mlp"}, "connector-empty": {"connector": {}},
        "connector-unknown": {"connector.type": "no_such"}, "connector-options": {"connector.options": {"depth": 10**9}},
        "connector-options-text": {"connector.options": "deep"}, "connector-options-unknown": {"connector.options.x": 1},
        "feature-layer": {"feature_layer": 99}, "feature-layer-text": {"feature_layer": "last"},
        "strategy": {"feature_strategy": "no_such"}, "patches": {"num_patches": 10**9}, "patches-text": {"num_patches": "9"},
        "prefix": {"num_prefix_tokens": -5}, "beside": {"beside": [1]}, "beside-many": {"beside": [{}] * 1000},
        "image-token": {"image_token_id": 10**9}, "image-token-text": {"image_token_id": "<image>"},
        "image-token-other": {"image_token_id": 5}, "vision-dim": {"vision_dim": 10**9}, "anyres": {"anyres": {"grids": 1}},
        "anyres-list": {"anyres": []}, "anyres-huge": {"anyres": {"grids": [[10**9, 10**9]]}}, "unread": {"unread_parameters": 3},
        "recipe": {"recipe": []}, "auto-map": {"auto_map": []}, "quantised": {"quantization_config": {"quant_method": "x"}},
        "quantised-list": {"quantization_config": []}, "type-list": {"model_type": ["vlm"]}, "type-unknown": {"model_type": "q"},
        "type-gone": {"model_type": ...}, "type-family": {"model_type": "llava"}, "type-text": {"model_type": "llama"},
        "sub-configs": {"sub_configs": 3}, "attention": {"_attn_implementation": "no_such"},
        "attribute-map": {"attribute_map": {"hidden_size": "x"}}, "version": {"transformers_version": []},
    }  # fmt: skip
    may_pass = ("recipe", "auto-map", "sub-configs", "attribute-map", "version", "patches", "vision-dim", "prefix",
                "unread", "attention", "anyres-list", "patches-text", "connector-null")  # fmt: skip
    for name, change in composed.items():
        add(f"config-{name}", set_json("config.json", change), kinds=("composed",), harmless=name in may_pass)
    heads: dict[str, dict[str, Any]] = {
        "null": {"heads": None}, "text": {"heads": "label"}, "number": {"heads": [3]}, "unknown": {"heads.0.x": 1},
        "task": {"heads.0.task": "no_such"}, "pooling": {"heads.0.pooling": "no_such"}, "layer": {"heads.0.layer": 99},
        "layer-text": {"heads.0.layer": "x"}, "labels": {"heads.0.labels": 3}, "no-labels": {"heads.0.labels": []},
        "many": {"heads.0.labels": list(range(10_000))}, "type": {"heads.0.type": "os:system"},
        "options": {"heads.0.options": {"hidden_size": 10**9}}, "name": {"heads.0.name": 3}, "token": {"heads.0.token_id": "x"},
        "name-odd": {"heads.0.name": "a.b"}, "threshold": {"heads.0.threshold": "x"}, "temperature": {"heads.0.temperature": 0},
        "suffix": {"suffix_ids": ["x"]}, "suffix-far": {"suffix_ids": [10**9]}, "media": {"media_token_ids": "x"},
        "body-list": {"body_config": []}, "body-text": {"body_config": "vlm"}, "body-self": {"body_config.model_type":
        "vlm_prediction"}, "body-unknown": {"body_config.model_type": "no_such"}, "body-empty": {"body_config": {}},
    }  # fmt: skip
    for name, change in heads.items():
        add(f"heads-{name}", set_json("config.json", change), kinds=("prediction",))


# Adapters


def make_broken_adapters() -> None:
    """What an adapter says of itself and of its base."""
    source = f"sources.{WHOLE_CHECKPOINT}"
    bases: dict[str, dict[str, Any]] = {
        "sources-list": {"sources": []}, "sources-empty": {"sources": {}}, "sources-text": {"sources": "base"},
        "source-null": {source: None}, "source-number": {f"{source}.name": 3}, "source-extra": {f"{source}.x": 1},
        "source-empty": {f"{source}.name": ""}, "source-gone": {f"{source}.name": "/no/such"},
        "source-other": {"sources": {"else": {"name": "/no/such", "revision": None, "fingerprint": ""}}},
        "fingerprint": {f"{source}.fingerprint": "0"}, "fingerprint-number": {f"{source}.fingerprint": 0},
        "model-text": {"model": "llama"}, "model-list": {"model": []}, "model-empty": {"model": {}},
    }  # fmt: skip
    for name, change in bases.items():
        add(f"base-{name}", set_json("base.json", change), kinds=("adapter",), file="base.json",
            harmless=name in ("model-empty",))  # fmt: skip
    add("base-itself", base_is(lambda folder: folder), kinds=("adapter",), file="base.json")
    add("base-in-circle", base_in_circle, kinds=("adapter",), file="base.json")
    settings: dict[str, dict[str, Any]] = {
        "rank-0": {"r": 0}, "rank-negative": {"r": -1}, "rank-huge": {"r": 10**9}, "rank-text": {"r": "x"}, "rank-nan":
        {"r": float("nan")}, "targets-unknown": {"target_modules": ["no.such"]}, "targets-number": {"target_modules": 3},
        "targets-regex": {"target_modules": "(a+)+$" * 3}, "targets-none": {"target_modules": None},
        "targets-empty": {"target_modules": []}, "type": {"peft_type": "NO_SUCH"}, "type-other": {"peft_type": "PREFIX_TUNING"},
        "alpha": {"lora_alpha": "x"}, "rank-pattern": {"rank_pattern": {".*": 10**9}}, "rank-pattern-text": {"rank_pattern": "x"},
        "bias": {"bias": "no_such"}, "init": {"init_lora_weights": "pissa_niter_999999999"}, "dora": {"use_dora": True},
        "unknown-key": {"no_such_key": 1}, "auto-mapping": {"auto_mapping": {"base_model_class": "os", "parent_library": "os"}},
    }  # fmt: skip
    may_pass = ("unknown-key", "auto-mapping", "targets-none", "init", "rank-negative")
    for name, change in settings.items():
        add(f"adapter-{name}", set_json("adapter_config.json", change), kinds=("adapter",), harmless=name in may_pass)


def base_is(find: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Let an adapter name another folder as its base, with its right fingerprint."""

    def change(folder: Path) -> None:
        Base({WHOLE_CHECKPOINT: make_source(str(find(folder)), None)}).write(folder)

    return change


def base_in_circle(folder: Path) -> None:
    """An adapter on an adapter on the first one."""
    other = folder.with_name(f"{folder.name}-other")
    shutil.copytree(folder, other)
    base_is(lambda folder: other)(folder)
    base_is(lambda folder: folder.with_name(folder.name.removesuffix("-other")))(other)


# Templates, tokenizers and processors


def make_broken_processors() -> None:
    """Chat templates that never end, and tokenizers and image processors that are none."""
    templates = {
        "loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "loop-huge": "{% for i in range(10**9) %}{% endfor %}", "power": "{{ 10 ** (10 ** 9) }}",
        "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "times": "{{ 'x' * 10 ** 10 }}",
        "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "syntax": "{% for %}", "lipsum":
        "{{ lipsum(n=10**8) }}", "center": "{{ 'x'.center(10**10) }}", "format": "{{ '%9999999999d' % 1 }}",
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "import": "{% include '/etc/passwd' %}",
        "undefined": "{{ messages[99].content.x }}", "raises": "{{ raise_exception('no') }}", "divides": "{{ 1 / 0 }}",
        "nesting": "{% if 1 %}" * 3000 + "x" + "{% endif %}" * 3000, "brackets": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    }  # fmt: skip
    for name, text in templates.items():
        add(f"template-{name}", write_bytes("chat_template.jinja", text.encode()), file="chat_template.jinja")
    add("template-huge", lambda folder: (folder / "chat_template.jinja").open("ab").truncate(1 << 30),
        file="chat_template.jinja")  # fmt: skip
    tokenizers: dict[str, dict[str, Any]] = {
        "model-gone": {"model": ...}, "model-type": {"model.type": "NO_SUCH"}, "vocab-list": {"model.vocab": []},
        "vocab-text": {"model.vocab": {"a": "x"}}, "merges": {"model.merges": [["no", "such"]]}, "version": {"version": 3},
        "added-far": {"added_tokens.0.id": 10**7}, "added-negative": {"added_tokens.0.id": -1},
        "regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y|(a|a)*b"}, "behavior": "Isolated",
        "invert": False}}, "regex-broken": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((("}, "behavior":
        "Isolated", "invert": False}}, "regex-repeats": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex":
        "((a{1000}){1000}){1000}"}, "behavior": "Isolated", "invert": False}},
        "normalizer-regex": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(\\s*)*x|(e|e)*q"}, "content": ""}},
        "normalizer-grows": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String":
        "a"}, "content": "aaaaaaaaaa"}] * 30}}, "decoder": {"decoder": {"type": "NO_SUCH"}},
        "padding": {"padding": {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "x"}}, "truncation": {"truncation": {"max_length": 0, "strategy": "LongestFirst",
        "stride": 0, "direction": "Right"}},
    }  # fmt: skip
    may_pass = ("version", "decoder", "normalizer-grows", "padding", "truncation", "added-negative", "regex", "normalizer-regex")
    for name, change in tokenizers.items():
        add(f"tokenizer-{name}", set_json("tokenizer.json", change), kinds=("composed", "family"), harmless=name in may_pass)
    settings: dict[str, dict[str, Any]] = {
        "class": {"tokenizer_class": "NoSuch"}, "class-list": {"tokenizer_class": []}, "class-other": {"tokenizer_class":
        "T5Tokenizer"}, "no-pad": {"pad_token": None}, "pad-unknown": {"pad_token": "<no such>"}, "pad-list": {"pad_token": []},
        "eos-number": {"eos_token": 3}, "added": {"added_tokens_decoder": []}, "added-far": {"added_tokens_decoder":
        {"99999999": {"content": "<far>", "special": True}}}, "length": {"model_max_length": "x"},
        "template-list": {"chat_template": [1]},
    }  # fmt: skip
    for name, change in settings.items():
        add(f"tokenizer-config-{name}", set_json("tokenizer_config.json", change), kinds=("composed", "family"),
            harmless=name not in ("pad-list", "eos-number"))  # fmt: skip
    generation: dict[str, Any] = {
        "eos-text": {"eos_token_id": "x"}, "eos-nested": {"eos_token_id": [[1]]}, "eos-far": {"eos_token_id": 10**9},
        "tokens": {"max_new_tokens": "x"}, "temperature": {"temperature": "hot"}, "cache": {"cache_implementation": "no"},
        "custom": {"custom_generate": "evil/repo"}, "beams": {"num_beams": 10**9}, "bad-words": {"bad_words_ids": [["x"]]},
        "sequence-bias": {"sequence_bias": 3}, "forced": {"forced_bos_token_id": 10**9}, "watermark": {"watermarking_config": 3},
        "suppress": {"suppress_tokens": [10**9]}, "pad-far": {"pad_token_id": 10**9}, "min-length": {"min_new_tokens": 10**9},
        "stop": {"stop_strings": 3}, "assistant": {"assistant_early_exit": 10**9}, "return": {"num_return_sequences": 10**9},
    }  # fmt: skip
    for name, change in generation.items():
        add(f"generation-{name}", set_json("generation_config.json", change), kinds=("composed", "family"), harmless=True)
    images: dict[str, dict[str, Any]] = {
        "size-text": {"size": "large"}, "size-huge": {"size": {"height": 10**9, "width": 10**9}, "crop_size": {"height": 10**9,
        "width": 10**9}}, "size-zero": {"size": {"height": 0, "width": 0}, "crop_size": {"height": 0, "width": 0}},
        "size-negative": {"size": {"height": -1, "width": 9}, "crop_size": {"height": -1, "width": 9}},
        "size-other": {"crop_size": {"height": 31, "width": 31}, "size": {"height": 31, "width": 31}},
        "size-keys": {"size": {"x": 1}}, "size-list": {"size": [1, 2, 3]}, "mean-short": {"image_mean": [0.5]},
        "mean-long": {"image_mean": [0.5] * 4}, "mean-text": {"image_mean": "x"}, "std-zero": {"image_std": [0, 0, 0]},
        "std-nan": {"image_std": [float("nan")] * 3}, "std-text": {"image_std": ["a"] * 3}, "scale": {"rescale_factor": "x"},
        "scale-huge": {"rescale_factor": 1e300}, "resample": {"resample": 99}, "resample-text": {"resample": "x"},
        "class": {"image_processor_type": "NoSuch"}, "class-list": {"image_processor_type": []},
    }  # fmt: skip
    may_pass = ("size-list", "class", "class-list", "mean-text")
    for name, change in images.items():
        dotted = {f"image_processor.{key}": value for key, value in change.items()}
        add(f"images-{name}", set_json("processor_config.json", dotted), kinds=("composed", "family"),
            harmless=name in may_pass)  # fmt: skip
    processors: dict[str, dict[str, Any]] = {
        "tokens": {"tokens_per_image": 10**9}, "tokens-text": {"tokens_per_image": "x"}, "tokens-zero": {"tokens_per_image": 0},
        "mode": {"image_mode": "no_such"}, "token": {"image_token": 3}, "token-unknown": {"image_token": "<no such>"},
        "token-empty": {"image_token": ""}, "anyres": {"anyres": 3}, "anyres-huge": {"anyres": {"grids": [[10**5, 10**5]],
        "side": 24}}, "beside": {"beside": [3]}, "class": {"processor_class": "NoSuch"},
    }  # fmt: skip
    for name, change in processors.items():
        add(f"processor-{name}", set_json("processor_config.json", change), kinds=("composed",), harmless=name in
            ("mode", "class"))  # fmt: skip
    add("readme-only", readme_only)
    add("processor-gone", lambda folder: (folder / "processor_config.json").unlink(), kinds=("composed", "family"))
    add("tokenizer-gone", lambda folder: (folder / "tokenizer.json").unlink(), kinds=("composed", "family"))


def readme_only(folder: Path) -> None:
    """Leave nothing but a README."""
    for file in folder.iterdir():
        file.unlink()
    (folder / "README.md").write_text("# A model\n")


for make in (make_special_files, make_broken_json, make_broken_weights, make_broken_indexes, make_broken_configurations,
             make_broken_adapters, make_broken_processors):  # fmt: skip
    make()

CASES = [(kind, name) for name, mutation in MUTATIONS.items() for kind in mutation.kinds]
"""Every hostile checkpoint: a kind, and the name of what is done to it."""


def save_hostile(kind: str, name: str, whole: Path, folder: Path) -> None:
    """Write a hostile checkpoint: a copy of a whole one of that kind, and what is done to it."""
    shutil.copytree(whole, folder)
    MUTATIONS[name].change(folder)
