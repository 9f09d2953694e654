"""Who may import whom: read from the source, imports within functions included."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vlm

SOURCE = Path(vlm.__file__).parent
ORDER = (
    "config",
    "clusters",
    "models",
    "data",
    "families",
    "checks",
    "assembly",
    "hub",
    "inference",
    "evaluation",
    "runs",
    "train",
    "web",
    "cli",
    "demo",
    "__main__",
    "__init__",
)
"""The packages from the lowest to the highest: each imports itself and what stands before it."""

ALONE = ("clusters", "config", "models")
"""Packages that import no other one."""

HUB_CODE = {"numpy", "torch", "transformers", "PIL", *sys.stdlib_module_names}
"""What the files that travel with checkpoints may import, besides their siblings."""

SLOW = {
    "bitsandbytes", "datasets", "deepspeed", "gguf", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pandas",
    "peft", "scipy", "sklearn", "tensorboard", "timm", "xllamacpp",
}  # fmt: skip
"""Packages that are imported within the functions that use them, since a plain command needs none of them."""

PLAIN = (
    "cli.train", "train.run", "train.objectives.generation", "cli.generate", "inference.generate_file",
    "inference.conversation", "data.tools.show", "hub.importing", "hub.exporting",
)  # fmt: skip
"""What a plain run, a question, a look at records, and import and export of checkpoints import."""

WITHOUT_TORCH = (
    "checks.run",
    "checks.heads",
    "runs.watch",
    "runs.read",
    *(f"data.tools.{name}" for name in ("clean", "convert", "download", "write")),
)
"""What takes less time than importing torch would: the checks, and work on records and images, in many processes."""

FILES = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in sorted(SOURCE.rglob("*.py"))}


Import = ast.Import | ast.ImportFrom


@cache
def find_imports(file: Path) -> tuple[list[Import], list[Import]]:
    """Parse a file, and return all its imports, and those that it makes when it is imported itself.

    The rest is not kept: whole trees of all files would slow every later collection of garbage down.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    everywhere = [node for node in ast.walk(tree) if isinstance(node, Import)]
    return everywhere, [node for node in tree.body if isinstance(node, Import)]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Level (0: absolute) and module of every import."""
    for node in find_imports(file)[0]:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        else:
            yield node.level, node.module or ""
            if node.module in ("vlm", "vlm.config"):  # `from vlm import data`
                yield from ((0, f"{node.module}.{alias.name}") for alias in node.names)


@cache
def targets(name: str) -> set[str]:
    """The files of `vlm` that a file imports, at its top or within a function."""
    found = set()
    for node in find_imports(FILES[name])[0]:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif node.level:
            modules = [f"vlm.{name.rpartition('.')[0]}.{node.module}"]
        else:
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            inner = module.removeprefix("vlm.") if module.startswith("vlm.") else None
            found |= {one for one in (inner, f"{inner}.__init__") if one in FILES}
    return found - {name}


def top_imports(name: str) -> Iterator[tuple[str, str]]:
    """Module and name of every import that a file makes when it is imported itself; without a name, an empty one."""
    for node in find_imports(FILES[name])[1]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        else:
            package = f"vlm.{name.rpartition('.')[0]}." if node.level else ""
            yield from ((f"{package}{node.module}", alias.name) for alias in node.names)


def imported_with(name: str, found: set[str]) -> set[str]:
    """The files of `vlm` that are imported when one is, itself included; adds to `found`."""
    if name not in found:
        found.add(name)
        for module, attribute in top_imports(name):
            inner = module.removeprefix("vlm.") if module.startswith("vlm.") else ""
            for file in {inner, f"{inner}.{attribute}", f"{inner}.__init__"} & FILES.keys():
                imported_with(file, found)
    return found


def room(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name: str):
    assert room(name) in ORDER, f"{name} is in no package of ORDER"
    if name.endswith("__init__") and name not in ("__init__", "models.__init__"):
        assert not list(imports(FILES[name])), "a package's own file imports nothing"
    place = ORDER.index(room(name))
    allowed = {room(name)} if room(name) in ALONE else set(ORDER[: place + 1])
    assert {one for one in targets(name) if room(one) not in allowed} == set()


def test_plain_commands_import_nothing_slow_that_they_do_not_need():
    files = set[str]()
    for name in PLAIN:
        imported_with(name, files)
    assert {"train.trainer", "assembly.encoders", "train.lora", "train.monitor.plots"} <= files
    slow = [
        (name, module, attribute)
        for name in sorted(files)
        for module, attribute in top_imports(name)
        if module.split(".")[0] in SLOW or attribute.startswith("Timm")  # transformers imports timm with those
    ]
    assert slow == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_needs_no_model_imports_no_torch(name: str):
    packages = {module.split(".")[0] for file in imported_with(name, set()) for module, _ in top_imports(file)}
    assert not packages & {"torch", "torchvision", "transformers"}


def test_no_file_imports_itself_through_others():
    graph = TopologicalSorter({name: targets(name) for name in FILES})
    graph.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", [name for name in FILES if room(name) == "models"])
def test_hub_code_imports_what_travels_with_it(name: str):
    siblings = {name.removeprefix("models.") for name in FILES if room(name) == "models"}
    for level, module in imports(FILES[name]):
        if level:
            assert level == 1, f"{name}: only siblings are copied into checkpoints"
            assert module in siblings, f"{name}: write `from .x import Y`; other forms are not copied"
        else:
            assert module.split(".")[0] in HUB_CODE, f"{name} may not import {module}"


def test_every_room_exists():
    assert {room(name) for name in FILES} == set(ORDER)
