"""The image-text models that the installed transformers has, read without importing it."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from vlm.families.table import FAMILIES

MAPPING_FILE = "models/auto/modeling_auto.py"
MAPPING_NAME = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
"""transformers' table of the types that `AutoModelForImageTextToText` opens; importing its file imports torch."""


def transformers_version() -> str:
    """Return the version of the installed transformers."""
    return version("transformers")


@cache
def image_text_types() -> dict[str, str]:
    """Return model type -> class name, of every type that transformers opens as an image-text model, in its order.

    Raises:
        ImportError: transformers no longer has that table.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ImportError("transformers is not installed")
    for node in ast.parse((Path(spec.origin).parent / MAPPING_FILE).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(to, "id", None) == MAPPING_NAME for to in node.targets):
            return dict(_read_pairs(node.value))
    raise ImportError(f"transformers {transformers_version()}: {MAPPING_FILE} has no {MAPPING_NAME}")


def is_family_type(model_type: object) -> bool:
    """Return whether a type may be a family: it has a row, or transformers opens it as an image-text model."""
    return model_type in FAMILIES or model_type in image_text_types()


def _read_pairs(node: ast.expr) -> Iterator[tuple[str, str]]:
    """Yield the pairs of strings of a dictionary written as a list of pairs."""
    for pair in ast.walk(node):
        if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
            key, value = pair.elts
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                yield str(key.value), str(value.value)
