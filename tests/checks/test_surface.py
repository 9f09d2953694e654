"""What only the command line may ask for: marked in the schema, and found by value, whatever the spelling."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

import vlm
from tests.fixtures import compose_config
from vlm.checks.fields import ConfigError
from vlm.checks.run import check
from vlm.checks.surface import check_plain_values, check_surface, find_reaching, named_by_user
from vlm.config import named
from vlm.config.dataset_schema import MixtureSourceConfig
from vlm.config.model_schema import EncoderConfig, HeadConfig
from vlm.config.named import import_named, permit_names
from vlm.config.packaged import run_names
from vlm.config.rules import get_reach
from vlm.config.schema import RunConfig
from vlm.train.objectives.table import make_objective

CANARY = "canary_of_the_schema:Thing"
SOURCE = Path(vlm.__file__).parent


def full_config() -> RunConfig:
    """A run with an element in every list and mapping of the schema."""
    config = compose_config("head-binary", ["dataset.path=a.json"])
    config.model.head.extra_heads = {"other": HeadConfig(task="binary")}
    config.model.visual_encoder.extra_encoders = [EncoderConfig("owner/encoder")]
    config.dataset.sources = {"one": MixtureSourceConfig(path="a.json")}
    return config


def leaves(node: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Dataclass, field and dotted key of every value of a configuration that is no section."""
    for field in fields(node):
        value, key = getattr(node, field.name), f"{path}{field.name}"
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        nested = [(name, child) for name, child in children if is_dataclass(child)]
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        elif nested:
            for name, child in nested:
                yield from leaves(child, f"{key}.{name}.")
        else:
            yield node, field, key


def takes_text(field: Any) -> bool:
    """Whether a field can hold a name: text, anything, or a list of these."""
    kinds = {field.type, *get_args(field.type)}
    return bool({str, Any, list[str], list[Any]} & kinds)


KEYS = [key for _, field, key in leaves(full_config()) if takes_text(field)]


@pytest.mark.parametrize("run", run_names())
def test_the_shipped_runs_reach_nothing(run: str):
    assert not list(find_reaching(compose_config(run, ["dataset.path=a.json"])))


def test_every_key_that_takes_a_name_is_marked(monkeypatch: pytest.MonkeyPatch):
    """A name in any key: where an importer sees it, the surface refuses the key, and the command line lets it pass."""
    asked: list[str] = []
    get_attribute = named._get_attribute
    spy = lambda name: asked.append(name) if name == CANARY else get_attribute(name)  # noqa: E731
    monkeypatch.setattr(named, "_get_attribute", spy)
    reached = set()
    for key in KEYS:
        config = full_config()
        node, field, _ = next(leaf for leaf in leaves(config) if leaf[2] == key)
        setattr(node, field.name, [CANARY] if isinstance(getattr(node, field.name), list) else CANARY)
        asked.clear()
        permit_names([CANARY])
        use_names(config)
        if asked:
            reached.add(re.sub(r"\.(one|other|0)\b", ".*", key))
            assert key in [found.key for found in find_reaching(config)], f"{key} reaches an importer: mark it"
            assert CANARY in named_by_user(config)
    assert reached >= {
        "dataset.format", "dataset.sources.*.format", "model.connector.type", "model.head.type",
        "model.head.extra_heads.*.type", "trainer.objective", "trainer.optim", "trainer.eval_metrics",
    }  # fmt: skip


def use_names(config: RunConfig) -> None:
    """What a run does with the names in its configuration, without its model and its data."""
    from vlm.assembly.compose import register_connector_class
    from vlm.assembly.heads import register_head_class
    from vlm.data.records.formats import get_reader
    from vlm.evaluation.text_metrics import get_metric
    from vlm.models.connectors import CONNECTORS
    from vlm.models.heads import HEADS
    from vlm.train.optimizers import import_named as import_optimizer

    optim, heads = config.trainer.optim, config.model.head.by_name.values()
    steps: list[Any] = [
        lambda: check(config, make_objective(config)), lambda: make_objective(config),
        lambda: register_connector_class(config.model.connector.type),
        *(lambda head=head: register_head_class(head.type) for head in heads),
        *(lambda source=source: get_reader(source.format) for source in (config.dataset, *sources(config))),
        *(lambda name=name: get_metric(name) for name in config.trainer.eval_metrics),
        lambda: import_optimizer(optim, "trainer.optim") if isinstance(optim, str) else None,
    ]  # fmt: skip
    for step in steps:
        try:
            step()
        except (ValueError, TypeError, AttributeError):
            continue
        finally:
            CONNECTORS.pop(CANARY, None)
            HEADS.pop(CANARY, None)


def sources(config: RunConfig) -> Iterator[MixtureSourceConfig]:
    yield from config.dataset.sources.values()


def test_modules_are_imported_by_name_in_known_places_only():
    """Another way from a name to a module has to come through `import_named`, which asks for a permission."""
    ways = re.compile(
        r"\b(import_module|__import__|locate|instantiate|get_class|exec|eval|run_path|run_module|loads)\b"
    )
    found = {}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                is_method = isinstance(node.func, ast.Attribute) and called in ("eval", "loads")
                if ways.fullmatch(called) and not is_method:
                    found.setdefault(file.relative_to(SOURCE).as_posix(), set()).add(called)
    assert found == {
        "__init__.py": {"import_module"},  # its own lazy attributes
        "assembly/private_names.py": {"import_module"},  # a list in this package
        "cli/completion.py": {"import_module"},  # the table of commands
        "cli/data.py": {"import_module"},  # a table of its tools
        "cli/main.py": {"import_module"},  # a table of commands
        "config/named.py": {"import_module"},
        "evaluation/text_metrics.py": {"import_module"},  # a table of libraries
        "inference/verify/engines.py": {"import_module"},  # a table of engines
    }


def test_pickles_that_run_code_are_read_in_one_place_only():
    found = [
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        if re.search(r"weights_only=False|allow_pickle=True|pickle\.loads?\(|joblib", file.read_text(encoding="utf-8"))
    ]
    assert found == ["train/checkpoints/deepspeed_shards.py"]


def test_a_name_that_nobody_permitted_is_not_imported():
    with pytest.raises(ValueError, match=r"dataset.format=os:system: it is not imported, since neither"):
        import_named("os:system", "dataset.format")
    permit_names(["os"])
    with pytest.raises(ValueError, match=r"a name of the form package.module:attribute is needed"):
        import_named("os", "dataset.format")


REACHING = [
    "dataset.format=evil.module", "dataset.format='evil:read'", "dataset.allow_pipe=true",
    "dataset.follow_links=true", "dataset.cache_dir=/tmp/x", "dataset.path=https://host/a.tar",
    "dataset.path='pipe:ls'",
    "dataset.path='zip://a::https://host/b.parquet'", "dataset.eval_path=s3://bucket/a.json", "model.head.type=a:B",
    "model.connector={type: 'os:system'}", "model={connector: {type: 'os:system'}}", "model.trust_remote_code=true",
    "model.visual_encoder.trust_remote_code=yes", "model.language_model={trust_remote_code: on}",
    "model.visual_encoder.extra_encoders=[{hf_name: a, trust_remote_code: true}]", "trainer.optim=a:B",
    "trainer.objective=a:B", "trainer.eval_metrics=[anls,'a:b']", "trainer.deepspeed=settings.json",
    "+trainer.deepspeed={zero_optimization: {offload_param: {nvme_path: /x}}}", "trainer.report_to=wandb",
    "trainer.report_to=[tensorboard,clearml]", "trainer.hub_token=secret", "trainer.hub_model_id=owner/name",
    "trainer.push_to_hub=true", "trainer.torch_compile_backend=evil", "trainer.ddp_backend=evil",
    "trainer.resume_from_checkpoint=/elsewhere/checkpoint-1", "trainer.fsdp_config=a.json", "trainer.output_dir=/x",
    "trainer.accelerator_config=a.json", "++trainer.debug=underflow_overflow", "trainer.trackio_space_id=a/b",
    "trainer.alert_command=[touch,/tmp/x]",
]  # fmt: skip
"""Overrides, in several spellings."""


@pytest.mark.parametrize("override", REACHING)
def test_what_reaches_further_is_refused_by_its_value(override: str):
    with pytest.raises(ConfigError, match=r"^[\w.]+=.* set on the command line only$"):
        check_surface(compose_config("finetune-smol", ["dataset.path=a.json", override]))


@pytest.mark.parametrize(
    "override",
    [
        "dataset.format=alpaca", "dataset.path=hf://owner/name", "dataset.path='a folder/a:b.json'",
        "trainer/deepspeed=zero3", "trainer.deepspeed=zero2", "trainer.report_to=none", "trainer.report_to=[]",
        "trainer.optim=muon", "trainer.eval_metrics=[anls]", "trainer.torch_compile_backend=inductor",
        "trainer.hub_token=null", "trainer.deepspeed=null", "trainer.resume_from_checkpoint=never",
        "trainer.push_to_hub=false",
    ],
)  # fmt: skip
def test_what_stays_within_a_run_is_taken(override: str):
    check_surface(compose_config("finetune-smol", ["dataset.path=a.json", override]))


def test_a_key_that_the_caller_bounds_is_taken():
    check_surface(compose_config("finetune-smol", ["trainer.output_dir=/x"]), allowed=["trainer.output_dir"])


def test_new_arguments_of_transformers_are_marked_until_they_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    from vlm.config.reach import training_argument_reach

    reach = training_argument_reach("run_this_at_the_end", None)["reach"]
    assert not reach.is_harmless("rm -rf /")
    assert training_argument_reach("max_steps", -1) == {}


@pytest.mark.parametrize(
    "content",
    [{"a": "${oc.env:HOME}"}, {"a": [{"b": "x ${oc.env:HOME}"}]}, {"${oc.env:HOME}": 1}, {"a": {"b": "${a}"}}],
)
def test_an_interpolation_is_found_wherever_it_stands(content: dict[str, Any]):
    with pytest.raises(ConfigError, match="is not filled in here"):
        check_plain_values(OmegaConf.create(content))


def test_a_message_shows_little_of_a_value():
    config = compose_config("finetune-smol", ["dataset.path=a.json"])
    config.dataset.format = "x:" + "y" * 10_000
    with pytest.raises(ConfigError) as refused:
        check_surface(config)
    assert len(str(refused.value)) < 250


def test_a_message_shows_no_secret():
    for override in ("trainer.hub_token=a-secret-of-mine", "dataset.path=https://me:a-secret-of-mine@host/a.tar"):
        with pytest.raises(ConfigError, match=r"=.*\*\*\*.* set on the command line only") as refused:
            check_surface(compose_config("finetune-smol", ["dataset.path=a.json", override]))
        assert "a-secret-of-mine" not in str(refused.value)


def test_every_reach_says_what_it_does():
    reaches = [reach for _, field, _ in leaves(full_config()) if (reach := get_reach(field)) is not None]
    assert len(reaches) > 30
    assert all(re.match(r"(may )?[a-z]+ ", reach.effect) for reach in reaches)
