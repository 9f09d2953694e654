"""The configuration reference is what the schema says, and every key of ours has a docstring."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.fixtures import compose_config
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import OWN_TRAINER_FIELDS, TRAINING_ARGUMENT_FIELDS, TrainerConfig
from vlm.config.serving_schema import ServingConfig

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_configuration", DOCS / "write_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_make_docs_writes(reference: ModuleType):
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == reference.write(), "run `make docs`"


def test_every_key_of_ours_is_explained(reference: ModuleType):
    rows = re.findall(
        r"^\| `(\w+)` \|(.*)\|([^|]*)\|$", "".join(reference.sections(TrainerConfig, "trainer")), re.MULTILINE
    )
    assert {name for name, _, _ in rows} >= OWN_TRAINER_FIELDS - {
        "unfreeze", "learning_rate", "weight_decay", "lora", "preference", "distillation",
    }  # fmt: skip
    assert [name for name, _, meaning in rows if not meaning.strip()] == []
    for section in re.findall(r"^## [\w.]+\n\n(.*)$", reference.write(), re.MULTILINE):
        assert section.endswith(".")


def test_a_row_has_the_type_default_and_bounds(reference: ModuleType):
    page = reference.write()
    assert "| `max_frames` | integer | `8` | at least 1 | The maximum number of frames" in page
    assert "| `over_length` | string | `error` | `error`, `skip`, `truncate`, `split` | What to do with" in page
    assert "| `hf_name` | string | required |  | Hub name" in page
    assert "## dataset.sources.NAME\n" in page
    assert all(f"| `{name}` |" in page for name in TRAINING_ARGUMENT_FIELDS)
    assert all(f"| `{field.name}` |" in page for field in fields(DatasetConfig))


def test_names_of_the_page_are_keys(reference: ModuleType):
    config = compose_config("pretrain-smol", ["dataset.path=a.json"])
    for section in re.findall(r"^## ([\w.]+)$", reference.write(), re.MULTILINE):
        node: object = SimpleNamespace(serving=ServingConfig()) if section == "serving" else config
        for name in section.removesuffix(".NAME").split("."):
            node = getattr(node, name)
