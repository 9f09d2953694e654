"""Every key of the schema is known by what its change means to a run that goes on."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import combinations

import pytest

from tests.fixtures import compose_config
from vlm.config.dataset_schema import MixtureSourceConfig
from vlm.config.schema import RunConfig
from vlm.train.resume.key_classes import CHANGES_RUN, CLASSES, IMPOSSIBLE, SAFE, START, KeyClass, class_of


def walk(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a section of the schema; `*` stands for the name of a source."""
    for field in fields(kind):
        section = field.default_factory
        if field.name == "sources":
            yield from walk(MixtureSourceConfig, f"{prefix}sources.*.")
        elif section is not MISSING and isinstance(section, type) and is_dataclass(section):
            yield from walk(section, f"{prefix}{field.name}.")
        elif field.name != "extra_heads":  # their keys are those of `model.head`
            yield f"{prefix}{field.name}"


def test_every_key_of_the_schema_has_a_class():
    keys = set(walk(RunConfig))
    assert sorted(keys - CLASSES.keys()) == [], "say in key_classes.py what a change of these keys means"
    assert sorted(CLASSES.keys() - keys) == [], "the schema does not have these keys any more"


def test_a_key_has_one_class():
    for first, second in combinations((START, SAFE, CHANGES_RUN, IMPOSSIBLE), 2):
        assert not first & second


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("trainer.num_train_epochs", KeyClass.SAFE),
        ("trainer.learning_rate.connector_learning_rate", KeyClass.CHANGES_RUN),
        ("trainer.deepspeed.zero_optimization.stage", KeyClass.CHANGES_RUN),
        ("trainer.optim", KeyClass.IMPOSSIBLE),
        ("model.connector.options.num_layers", KeyClass.IMPOSSIBLE),
        ("model.head.extra_heads.colour.task", KeyClass.IMPOSSIBLE),
        ("model.head.extra_heads.colour.weight", KeyClass.CHANGES_RUN),
        ("dataset.sources.talk.weight", KeyClass.CHANGES_RUN),
        ("dataset.sources.talk.options.prompt", KeyClass.CHANGES_RUN),
        ("dataset.sources.talk.path", KeyClass.SAFE),
        ("trainer.a_key_of_another_transformers", KeyClass.CHANGES_RUN),
        ("trainer.dataloader_num_workers", KeyClass.SAFE),
        ("trainer.eval_steps", KeyClass.SAFE),
    ],
)
def test_the_class_of_a_key(key: str, kind: KeyClass):
    assert class_of(key, compose_config("pretrain-smol", ["dataset.path=x"])) is kind


def test_workers_and_evaluations_matter_where_the_order_or_the_rate_depends_on_them():
    config = compose_config("pretrain-smol", ["dataset.path=x", "dataset.streaming=true"])
    for key in ("trainer.dataloader_num_workers", "trainer.seed", "dataset.sources.talk.weight"):
        assert class_of(key, config) is KeyClass.IMPOSSIBLE
    assert class_of("dataset.sources.talk.path", config) is KeyClass.SAFE
    config = compose_config("pretrain-smol", ["dataset.path=x", "trainer.lr_scheduler_type=reduce_lr_on_plateau"])
    assert class_of("trainer.eval_steps", config) is KeyClass.CHANGES_RUN
