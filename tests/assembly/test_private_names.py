"""Libraries that have lost a private name are refused, and every private name in use is in the list."""

import ast
import inspect
import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

import vlm
from tests.fixtures import compose_config
from vlm.assembly.private_names import PRIVATE_NAMES, PrivateName, check_private_names, find_problem
from vlm.models import VLMForConditionalGeneration, VLMForPrediction
from vlm.train.hooks import PRIVATE_HOOKS
from vlm.train.run import run

NAMES = [name for library in PRIVATE_NAMES.values() for name in library]
LISTED = {name.name for name in (*NAMES, *PRIVATE_HOOKS)}

NOT_PRIVATE = {"_actions", "_asdict", "_exit", "_open", "_replace", "_run_exitfuncs"}
"""Names with an underscore that their library documents, or that every Python has had for long."""

SOURCE = Path(vlm.__file__).parent


def take_away(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a library lose a name, as a rename would."""
    module, _, path = name.owner.partition(":")
    *outer, last = path.split(".")
    parent = reduce(getattr, filter(None, outer), pytest.importorskip(module))
    owner = getattr(parent, last) if last else parent
    if inspect.ismodule(owner):
        monkeypatch.delattr(owner, name.name)
        return
    if inspect.isfunction(owner):
        monkeypatch.setattr(parent, last, lambda *args, **kwargs: None)
        return
    for kind in owner.__mro__:
        if name.name in vars(kind):
            monkeypatch.delattr(kind, name.name)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_name_that_is_gone_is_refused(name: PrivateName, monkeypatch: pytest.MonkeyPatch):
    take_away(name, monkeypatch)
    library = name.module.partition(".")[0]
    with pytest.raises(ImportError, match=rf"^{library} [\d.]+.*{name.name}.*{re.escape(name.reason)}"):
        check_private_names([name])
    with pytest.raises(ImportError, match=f"^{library}"):
        check_private_names()


def test_a_method_that_is_called_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("transformers").PreTrainedModel, "_init_weights", lambda self, submodule: None)
    with pytest.raises(ImportError, match="_init_weights no longer has the parameter module"):
        check_private_names()


def test_an_owner_that_is_gone_is_named():
    assert find_problem(PrivateName("pathlib:Path.walk_backwards", "_x", "")) == "pathlib.Path.walk_backwards is gone"


def test_a_library_that_is_not_loaded_is_passed_over():
    check_private_names([PrivateName("a_library_that_nobody_has:Thing", "_name", "nothing")])


def test_a_run_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, common: list[str]):
    take_away(next(name for name in NAMES if name.name == "_supports_sdpa"), monkeypatch)
    with pytest.raises(ImportError, match="_supports_sdpa is gone"):
        run(compose_config("pretrain-smol", common), "pretrain-smol")


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_private_attributes_of_others_are_listed(file: Path):
    """Those of `self` and `cls` are not: `test_private_methods_that_our_classes_override_are_listed` has them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = {node.attr for node in ast.walk(tree) if is_private(node) and is_self(node)} | {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    used = {node.attr for node in ast.walk(tree) if is_private(node) and not is_self(node)}
    assert used - own <= LISTED | NOT_PRIVATE


def is_private(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")


def is_self(node: ast.AST) -> bool:
    assert isinstance(node, ast.Attribute)
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_private_methods_that_our_classes_override_are_listed():
    """`_auto_class` is set by `register_for_auto_class`."""
    for kind in (VLMForConditionalGeneration, VLMForPrediction):
        ours = [base for base in kind.__mro__ if base.__module__.startswith("vlm")]
        theirs = [base for base in kind.__mro__ if base not in ours]
        own = {name for base in ours for name in vars(base) if name.startswith("_") and not name.startswith("__")}
        overridden = {name for name in own if any(name in vars(base) for base in theirs)}
        assert overridden
        assert overridden <= LISTED | {"_auto_class"}
