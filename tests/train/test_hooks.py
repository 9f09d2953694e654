"""A release of transformers that has lost a method which the trainer overrides is refused, and the method named."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from transformers import Trainer

from vlm.assembly.private_names import PrivateName
from vlm.train import batches, trainer
from vlm.train.checkpoints import trainer as checkpoints
from vlm.train.guards import trainer as guards
from vlm.train.hooks import PRIVATE_HOOKS, PUBLIC_HOOKS, check_hooks
from vlm.train.trainer import VLMTrainer

HOOKS = (*PRIVATE_HOOKS, *PUBLIC_HOOKS)
WITH_PARAMETERS = [hook for hook in HOOKS if hook.parameters]


def name(hook: PrivateName) -> str:
    return hook.name


def test_the_installed_version_has_them_all():
    assert check_hooks(VLMTrainer) is VLMTrainer


@pytest.mark.parametrize("hook", HOOKS, ids=name)
def test_a_hook_that_is_gone_is_named(hook: PrivateName, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Trainer, hook.name)
    with pytest.raises(ImportError, match=rf"transformers .*Trainer\.{hook.name} is gone.*{re.escape(hook.reason)}"):
        check_hooks(VLMTrainer)


@pytest.mark.parametrize("hook", WITH_PARAMETERS, ids=name)
def test_a_parameter_that_is_gone_is_named(hook: PrivateName, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, hook.name, lambda self: None)
    assert hook.parameters
    with pytest.raises(ImportError, match=rf"Trainer\.{hook.name} no longer has the parameter {hook.parameters[0]}"):
        check_hooks(VLMTrainer)


def test_a_parameter_that_is_new_is_named_where_it_has_no_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, metrics=None: None)
    check_hooks(VLMTrainer)
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, metrics: None)
    with pytest.raises(ImportError, match=r"Trainer\._save_checkpoint now needs the parameter metrics too"):
        check_hooks(VLMTrainer)


def test_the_class_is_not_made_without_a_hook(monkeypatch: pytest.MonkeyPatch):
    """So no run begins: importing the trainer fails."""
    monkeypatch.delattr(Trainer, "_load_from_checkpoint")
    with pytest.raises(ImportError, match="_load_from_checkpoint is gone"):
        importlib.reload(trainer)
    assert trainer.VLMTrainer is VLMTrainer


def test_an_override_that_is_not_listed_is_found():
    class Careless(VLMTrainer):
        def _finalize_training(self, *args: object, **kwargs: object) -> None:
            """Overridden without a word."""

    with pytest.raises(AssertionError, match="_finalize_training"):
        check_hooks(Careless)


def find_private_names(module: ModuleType) -> set[str]:
    """Private names of `Trainer` that a module uses, whether through `self`, `super()` or a trainer."""
    tree = ast.parse(Path(inspect.getfile(module)).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    return {attribute for attribute in used if hasattr(Trainer, attribute) and not attribute.startswith("__")}


@pytest.mark.parametrize("module", [trainer, batches, checkpoints, guards], ids=lambda module: module.__name__)
def test_every_private_method_that_is_called_is_listed(module: ModuleType):
    assert find_private_names(module) <= {hook.name for hook in PRIVATE_HOOKS}


def test_private_methods_that_are_called_are_found():
    assert all(map(find_private_names, (batches, checkpoints, guards)))
