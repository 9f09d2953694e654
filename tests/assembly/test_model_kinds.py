"""Kinds of models: what lies under heads, and who asks for classes."""

import ast
from pathlib import Path

import vlm
from tests.assembly.test_checkpoint import heads_on
from tests.tiny_parts import Parts
from vlm.assembly.model_kinds import get_body, get_body_config, get_language_model, is_composed_model

SOURCE = Path(vlm.__file__).parent
MODEL_CLASSES = {
    "VLMConfig", "VLMPredictionConfig", "VLMForConditionalGeneration", "VLMForPrediction", "VLMProcessor",
}  # fmt: skip
MAY_ASK = ("assembly/model_kinds.py", "hub/")


def test_parts_of_a_model_are_found_under_heads(parts: Parts):
    model = heads_on(parts)
    body = get_body(model)
    assert is_composed_model(body)
    assert not is_composed_model(model)
    assert get_body(body) is body
    assert get_body_config(model.config) is model.config.body_config
    assert get_language_model(model) is get_language_model(body) is body.language_model


def class_checks(file: Path) -> list[str]:
    """The model classes that a file asks for: by `isinstance`, `issubclass`, the type or a pattern."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith(("isi", "issub")):
            asked = list(ast.walk(node.args[1])) if len(node.args) > 1 else []
        elif isinstance(node, ast.MatchClass):
            asked = list(ast.walk(node.cls))
        elif isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Call) and isinstance(side.func, ast.Name) and side.func.id == "type"
            for side in (node.left, *node.comparators)
        ):
            asked = [inner for side in (node.left, *node.comparators) for inner in ast.walk(side)]
        else:
            continue
        names = {getattr(inner, "id", None) or getattr(inner, "attr", None) for inner in asked}
        found += sorted(name for name in names & MODEL_CLASSES if name)
    return found


def test_one_module_asks_for_the_classes_of_models():
    """Others call its functions, or what every model and processor has."""
    found = {str(file.relative_to(SOURCE)): class_checks(file) for file in sorted(SOURCE.rglob("*.py"))}
    assert {name: classes for name, classes in found.items() if classes and not name.startswith(MAY_ASK)} == {}
    assert set(found["assembly/model_kinds.py"]) == MODEL_CLASSES - {"VLMProcessor"}
