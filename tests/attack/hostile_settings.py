"""Hostile settings: configurations, adapters, templates, tokenizers and processors, and code that nobody asked for.

`hostile_settings.jsonl` has a row for each change of a JSON file: the kinds that it fits, the values that it sets by
dotted keys, the file whose name the refusal must have, and whether it may be harmless.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.attack.mutations import KINDS, WEIGHTS, WHOLE_KINDS, add, set_json, write_bytes
from vlm.assembly.adapter_base import WHOLE_CHECKPOINT, Base, make_source

ROWS = Path(__file__).with_name("hostile_settings.jsonl")
AUTO_CLASSES = (
    "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor",
    "AutoModelForImageTextToText", "Connector", "Head.label",
)  # fmt: skip
CANARY = "canary"
"""The file that code out of a hostile checkpoint would write beside the checkpoint."""


def make_rows() -> None:
    """The rows of `hostile_settings.jsonl`."""
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        values = row["set"] | dict.fromkeys(row.get("remove", []), ...)
        add(
            row["name"], set_json(row["file"], values), kinds=tuple(row["kinds"]), file=row.get("named", ""),
            harmless=row.get("harmless", False),
        )  # fmt: skip


def make_broken_configurations() -> None:
    """Values of `config.json` that no model has."""
    prefixes = {"composed": "", "family": "", "prediction": "body_config."}
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")
    values = {
        "huge": 10**9, "zero": 0, "negative": -1, "text": "many", "fraction": 1.5, "nan": float("nan"), "list": [1],
        "null": None, "yes": True,
    }  # fmt: skip
    for kind, prefix in prefixes.items():
        for size in sizes:
            for name, value in values.items():
                add(f"{kind}-text-{size}-{name}", set_json("config.json", {f"{prefix}text_config.{size}": value}),
                    kinds=(kind,), harmless=name == "null")  # fmt: skip
        for size in ("num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_channels"):
            for name in ("huge", "zero", "text"):
                change = set_json("config.json", {f"{prefix}vision_config.{size}": values[name]})
                add(f"{kind}-vision-{size}-{name}", change, kinds=(kind,))
        for part in ("text_config", "vision_config"):
            for name, value in (("unknown", "no_such_model"), ("list", ["llama"]), ("number", 3), ("self", "vlm"),
                                ("gone", ...)):  # fmt: skip
                add(f"{kind}-{part}-type-{name}", set_json("config.json", {f"{prefix}{part}.model_type": value}),
                    kinds=(kind,), harmless=name == "gone")  # fmt: skip
            for name, value in (("list", []), ("text", "llama"), ("null", None), ("empty", {})):
                add(f"{kind}-{part}-{name}", set_json("config.json", {f"{prefix}{part}": value}), kinds=(kind,),
                    harmless=name in ("null", "empty", "list"))  # fmt: skip
        others: dict[str, tuple[str, object]] = {
            "layers-1": ("text_config.num_hidden_layers", 1), "pad-far": ("text_config.pad_token_id", 10**9),
            "dtype": ("dtype", "float999"), "rope": ("text_config.rope_parameters", "all"),
            "activation": ("text_config.hidden_act", "no_such"),
        }  # fmt: skip
        for name, (key, value) in others.items():
            add(f"{kind}-{name}", set_json("config.json", {prefix + key: value}), kinds=(kind,))


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


def make_broken_templates() -> None:
    """Chat templates that never end, or are none, and folders without what a processor needs."""
    add("base-itself", base_is(lambda folder: folder), kinds=("adapter",), file="base.json")
    add("base-in-circle", base_in_circle, kinds=("adapter",), file="base.json")
    templates = {
        "loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "loop-huge": "{% for i in range(10**9) %}{% endfor %}", "power": "{{ 10 ** (10 ** 9) }}",
        "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "times": "{{ 'x' * 10 ** 10 }}",
        "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "syntax": "{% for %}", "lipsum":
        "{{ lipsum(n=10**8) }}", "center": "{{ 'x'.center(10**10) }}", "format": "{{ '%9999999999d' % 1 }}",
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "import": "{% include '/etc/passwd' %}",
        "undefined": "{{ messages[99].content.x }}", "raises": "{{ raise_exception('no') }}", "divides": "{{ 1 / 0 }}",
        "nesting": "{% if 1 %}" * 3000 + "x" + "{% endif %}" * 3000,
        "brackets": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    }  # fmt: skip
    for name, text in templates.items():
        add(f"template-{name}", write_bytes("chat_template.jinja", text.encode()), file="chat_template.jinja")
    add("template-huge", lambda folder: (folder / "chat_template.jinja").open("ab").truncate(1 << 30),
        file="chat_template.jinja")  # fmt: skip
    add("readme-only", readme_only)
    add("processor-gone", lambda folder: (folder / "processor_config.json").unlink(), kinds=("composed", "family"))
    add("tokenizer-gone", lambda folder: (folder / "tokenizer.json").unlink(), kinds=("composed", "family"))


def readme_only(folder: Path) -> None:
    """Leave nothing but a README."""
    for file in folder.iterdir():
        file.unlink()
    (folder / "README.md").write_text("# A model\n")


def make_code() -> None:
    """Checkpoints whose files would run code: all write `CANARY` beside the folder if they do."""
    add("code-pickle", only_pickle(WEIGHTS, "pytorch_model.bin"), kinds=WHOLE_KINDS)
    add("code-pickled-adapter", only_pickle("adapter_model.safetensors", "adapter_model.bin"), kinds=("adapter",))
    add(
        "code-pickled-rest",
        only_pickle("non_lora_trainables.safetensors", "non_lora_trainables.bin"),
        kinds=("adapter",),
    )
    classes = dict.fromkeys(AUTO_CLASSES, "evil.Evil")
    for kind in KINDS:
        add(
            f"code-auto-map-{kind}",
            with_evil(set_json("config.json", {"auto_map": classes})),
            kinds=(kind,),
            harmless=True,
        )
    add("code-unknown-type", with_evil(set_json("config.json", {"auto_map": classes, "model_type": "evil"})))
    for file in ("tokenizer_config.json", "processor_config.json"):
        add(
            f"code-{file}",
            with_evil(set_json(file, {"auto_map": classes})),
            kinds=("composed", "family"),
            harmless=True,
        )
    add("code-connector", with_evil(set_json("config.json", {"connector.type": "evil:Evil"})), kinds=("composed",))
    add("code-head", with_evil(set_json("config.json", {"heads.0.type": "evil:Evil"})), kinds=("prediction",))
    add("code-head-map", with_evil(set_json("config.json", {"heads.0.type": "evil:Evil", "auto_map": classes})),
        kinds=("prediction",))  # fmt: skip
    add("code-generate", with_evil(set_json("generation_config.json", {"custom_generate": "."})),
        kinds=("composed", "family"), harmless=True)  # fmt: skip
    mapping = {"parent_library": "evil", "base_model_class": "Evil"}
    settings = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": "/no/such", "auto_mapping": mapping}
    add("code-adapter-beside", with_evil(set_json("adapter_config.json", settings)), kinds=WHOLE_KINDS)


def with_evil(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Put modules into the folder that write the canary when they are imported."""

    def write(folder: Path) -> None:
        change(folder)
        text = f"open({str(folder.parent / CANARY)!r}, 'w').write('imported')\nclass Evil: pass\n"
        (folder / "evil.py").write_text(text)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(text)

    return write


class RunsCode:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        """Say what unpickling calls."""
        return open, (str(self.canary), "w")


def only_pickle(file: str, pickle: str) -> Callable[[Path], None]:
    """Put a pickle that runs code in place of weights."""

    def write(folder: Path) -> None:
        (folder / file).unlink()
        torch.save({"weight": RunsCode(folder.parent / CANARY)}, folder / pickle)

    return write


for make in (make_rows, make_broken_configurations, make_broken_templates, make_code):
    make()
