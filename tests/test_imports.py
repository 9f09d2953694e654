"""Who may import whom: read from the source, imports within functions included."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlm

SOURCE = Path(vlm.__file__).parent
ROOMS = {
    "models": {"models"},
    "config.training_fields": set(),
    "config.schema": {"config.training_fields"},
    "config.lora_problems": {"config.schema"},
    "config.encoder_problems": {"config.schema"},
    "config.cache_problems": {"config.schema", "config.lora_problems"},
    "config.packing_problems": {"config.schema"},
    "config.step_problems": {"config.schema"},
    "config.head_problems": {"config.schema", "config.lora_problems"},
    "config.check": {
        "config.training_fields",
        "config.schema",
        "config.cache_problems",
        "config.encoder_problems",
        "config.head_problems",
        "config.lora_problems",
        "config.packing_problems",
        "config.step_problems",
        "data.formats",
        "data.paths",
    },
    "config.explain": {"config.schema", "config.check"},
    "config.overview": {"config.check"},
    "data": {"data", "config.schema"},
    "build": {"models", "config.schema", "data", "families", "quantization", "anyres", "encoders", "heads"},
    "heads": {"models", "config.schema", "config.head_problems", "data.encode", "data.labels"},
    "anyres": {"models", "config.schema"},
    "encoders": {"models", "config.schema"},
    # an import composes as a run does, without one
    "hub": {"hub", "models", "build", "encoders", "config.schema", "config.lora_problems"},
    "hub.push_command": {"hub", "adapters"},
    "hub.publishing": {"hub", "models", "families", "config.lora_problems"},
    "adapters": {
        "adapters",
        "build",
        "encoders",
        "models",
        "families",
        "quantization",
        "config.schema",
        "config.lora_problems",
    },
    "quantization": {"families"},
    "inference": {"inference", "models", "data", "families", "config.schema", "adapters.folder", "quantization"},
    "inference.model_options": {"inference", "config.schema", "config.check", "adapters", "__main__"},
    "inference.eval_command": {"inference", "config.schema", "data", "adapters", "models"},
    "inference.eval": {"inference", "config.schema", "config.check", "data"},
    "inference.generate_command": {"inference", "config.schema", "data", "adapters"},
    "inference.chat": {"inference", "config.schema"},
    "inference.predict_command": {"inference", "config.schema", "data", "adapters"},
    "inference.serve_command": {"inference"},
    "families.table": set(),
    "families.listing": {"families", "models", "config.check"},
    "families": {"families", "models", "data"},
    "train": {
        "train",
        "build",
        "data",
        "families",
        "config.schema",
        "models",
        "inference.generate",
        "inference.metrics",
        "inference.text_metrics",
        "inference.calibration",
        "inference.intervals",
        "inference.scores",
        "inference.score_plots",
        "adapters",
        "quantization",
        "anyres",
        "encoders",
        "heads",
        "config.head_problems",
    },
    "tiny": {"data"},
}
"""Module or package -> what of `vlm` it may import."""

ENTRIES = {"__init__", "__main__", "cli", "demo", "web"}
"""Modules and packages that see everything."""

HUB_CODE = {"numpy", "torch", "transformers", "PIL", *sys.stdlib_module_names}
"""What the files that travel with checkpoints may import, besides their siblings."""

FILES = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in sorted(SOURCE.rglob("*.py"))}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Level (0: absolute) and module of every import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
            if node.module in ("vlm", "vlm.config"):  # `from vlm import data`
                yield from ((0, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("name", [name for name in FILES if not within(name, ENTRIES)])
def test_imports_keep_to_the_frame(name: str):
    if name.endswith("__init__") and name != "models.__init__":
        assert not [module for _, module in imports(FILES[name])], "a package's own file imports nothing"
        return
    room = max((room for room in ROOMS if within(name, {room})), key=len, default=None)
    assert room is not None, f"{name} is in no room: say in ROOMS what it may import"
    for level, module in imports(FILES[name]):
        if level == 0 and module.split(".")[0] == "vlm" and module != "vlm":
            assert within(module.removeprefix("vlm."), ROOMS[room]), f"{name} may not import {module}"


@pytest.mark.parametrize("name", [name for name in FILES if within(name, {"models"})])
def test_hub_code_imports_what_travels_with_it(name: str):
    siblings = {name.removeprefix("models.") for name in FILES if within(name, {"models"})}
    for level, module in imports(FILES[name]):
        if level:
            assert level == 1, f"{name}: only siblings are copied into checkpoints"
            assert module in siblings, f"{name}: write `from .x import Y`; other forms are not copied"
        else:
            assert module.split(".")[0] in HUB_CODE, f"{name} may not import {module}"


def test_every_room_exists():
    assert all(any(within(name, {room}) for name in FILES) for room in ROOMS)
    assert all(any(within(name, {entry}) for name in FILES) for entry in ENTRIES)
