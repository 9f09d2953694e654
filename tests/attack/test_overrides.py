"""Overrides that nobody meant: each is composed and checked, or refused in a few lines, and none raises anything else.

The command lines are drawn by a seed, so that a failure repeats: `refuse(random_words(Random(SEED + number)))`.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlm.checks.compose import compose_overrides, make_run_config, open_mapping_key, with_config
from vlm.checks.fields import ConfigError
from vlm.checks.messages import explain
from vlm.checks.run import check
from vlm.config.packaged import group_names, packaged_names, run_names
from vlm.config.schema import RunConfig
from vlm.config.secrets import MASK
from vlm.config.shown import presentable
from vlm.train.objectives.table import make_objective

SEED = 1905
NUM_SHORT, NUM_LONG = 40, 2000
MAX_CHARACTERS, MAX_LINES = 6000, 70
"""The longest message that is allowed: our own lists of allowed names are its longest part."""

NUMBERS = [
    "0",
    "-1",
    "1",
    "5",
    "1.5",
    "-inf",
    "inf",
    "nan",
    "1e999",
    "-1e999",
    "0x7f",
    "1_000",
    "9" * 40,
    "-0.0",
    "007",
]
WORDS = ["null", "true", "false", "''", "~", "~/x", "none", "auto", "x", "ключ", "a b", "a,b", "a:b", "os:system",
         "pipe:cat", "package.module:Class", "..", "/", "/dev/null", "hf://a/b", "hf://", "file:///etc/passwd", "a\tb",
         "-", "--", "-cn", "*", "&a", "*a", "!!python/object:os.system", "%", "@", "#", "|", ">", "\\", "\\n",
         "\ud83d", '"\ud83d"', '"a\0b"', "\x1b[31m", '"\x1b[31m"', "\u202e", "1,2", "choice(1,2)", "range(1,9)",
         "glob(*)", "sort(1,2)", "shuffle(1,2)", "int(x)", "float(1)", "json_str(x)", "extend_list(1)"]  # fmt: skip
INTERPOLATIONS = ["${nothing}", "${model}", "${trainer}", "${trainer.seed}", "${oc.env:HOME}", "${oc.env:NOT_THERE}",
                  "${now:%Y}", "${hydra:runtime.cwd}", "${oc.decode:x}", "${oc.create:[1]}", "${.}", "${..}", "${...x}",
                  "${", "${}", "${${x}}", "'${oc.select:x,y}'", "${oc.dict.keys:trainer}", "???"]  # fmt: skip
NESTED = ["[]", "{}", "[1]", "[[1]]", "[{a: b}]", "{a: 1}", "{a: {b: {c: [1]}}}", "{1: 2}", "{null: 1}", "{a: ${x}}",
          "[1,a,null,true]", "[" * 30 + "]" * 30, "[" * 400 + "]" * 400, "{a: " * 300 + "1" + "}" * 300, "[[[[", "}}}}",
          "{hf_name: x}", "{path: x.json}", "[{hf_name: 5}]", "{task: binary, labels: [a, b]}"]  # fmt: skip
LONG = ["A" * 300, "A" * 33_000, "/" + "a/" * 3000, "[" + "a," * 2000 + "a]", "x" * 5000 + ".json"]
VALUES = [*NUMBERS, *WORDS, *INTERPOLATIONS, *NESTED, *LONG]
MARKS = ("", "=", "{", "[", '"', "'", ",", "$", "~", "\t", "é")
PREFIXES = ["", "", "", "", "", "", "+", "++", "~", "+~", "~~"]


def schema_keys(kind: Any = RunConfig, path: str = "") -> Iterator[str]:
    """Every key and section of the schema."""
    for field in fields(kind):
        key = f"{path}{field.name}"
        yield key
        if is_dataclass(field.default_factory):
            yield from schema_keys(field.default_factory, f"{key}.")


KEYS = list(schema_keys())
CHOICES = [
    f"{group}={name}" for group in group_names() for name in packaged_names("vlm.config", group, ".yaml")
]  # fmt: skip
OTHER_KEYS = ["", "x", "a.b.c", "trainer.", ".trainer", "trainer..seed", "trainer[seed]", "ключ", "hydra", "hydra.run",
              "hydra.run.dir", "hydra/launcher", "_target_", "trainer._target_", "defaults", "_self_",
              "dataset.sources", "dataset.sources.a",
              "dataset.sources.a.path", "dataset.sources.a.weight", "dataset.options.x",
              "model.connector.options", "model.connector.options.x.y", "model.head.extra_heads", "a" * 3000,
              "model.head.extra_heads.a.task", "model.visual_encoder.extra_encoders.0", "trainer.seed.x", "1", "null",
              "model.visual_encoder.extra_encoders.x.y", "trainer.optim_args", "trainer/lora@trainer.unfreeze",
              "model/head@_global_", "model@a", "trainer/deepspeed@:pkg", "\ud83d", "\x1b[1m"]  # fmt: skip


def random_words(random: Random) -> list[str]:
    """One to three overrides."""
    return [_random_word(random) for _ in range(random.choice((1, 1, 1, 2, 3)))]


def _random_word(random: Random) -> str:
    draw = random.random()
    if draw < 0.1:
        return _mutated(random.choice(CHOICES), random)
    key = random.choice(OTHER_KEYS if draw < 0.25 else group_names() if draw < 0.35 else KEYS)
    value = random.choice(VALUES)
    if random.random() < 0.15:
        value = _mutated(value, random)
    word = f"{random.choice(PREFIXES)}{key}={value}"
    return _mutated(word, random) if random.random() < 0.1 else word


def _mutated(text: str, random: Random) -> str:
    """A text with a few characters removed, doubled or replaced."""
    letters = list(text)
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(letters) + 1)
        letters[place : place + random.randint(0, 2)] = random.choice(
            ("", "=", "{", "[", '"', "'", ",", "$", "~", "\t", "é")
        )
    return "".join(letters)


@contextmanager
def hydra_context() -> Iterator[None]:
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema", node=RunConfig)
    with initialize_config_module("vlm.config", version_base="1.3"):
        yield


def refuse(words: list[str]) -> str | None:
    """Compose and check overrides as a run does; return the refusal, None where there is none."""
    try:
        config = make_run_config(compose_overrides("pretrain-smol", list(map(open_mapping_key, words))))
        check(config, make_objective(config))
    except (HydraException, OmegaConfBaseException, YAMLError, ConfigError) as error:  # as `with_config` does
        return presentable(explain(error))
    return None


@pytest.mark.parametrize(
    "numbers",
    [range(NUM_SHORT), pytest.param(range(NUM_SHORT, NUM_SHORT + NUM_LONG), marks=pytest.mark.attack)],
    ids=["short", "long"],
)
def test_an_override_is_taken_or_refused_in_a_few_lines(
    numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    taken = 0
    Path("records.json").write_text("[]")
    with hydra_context():
        for number in numbers:
            words = ["dataset.path=records.json", *random_words(Random(SEED + number))]
            said = refuse(words)
            taken += said is None
            if said is not None:
                assert said.strip(), words
                assert len(said) <= MAX_CHARACTERS, (words, len(said))
                assert said.count("\n") < MAX_LINES, words
                assert said.replace("\n", "").replace("\t", "").isprintable(), words
                said.encode()
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]
    assert taken < len(numbers)


def test_every_section_refuses_every_scalar():
    sections = [key for key in KEYS if any(other.startswith(f"{key}.") for other in KEYS)]
    values = ["-inf", "5", "null", "true", "[1]", "${trainer.seed}", "1,2"]
    with hydra_context():
        for section, value in list(itertools.product(sections, values))[::9]:
            assert refuse(["dataset.path=records.json", f"{section}={value}"]), (section, value)


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("dataset.options=${trainer}", "it is a section; refer to one of its keys"),
        ("dataset.options=${trainer.seed}", "a mapping is needed"),
        ("dataset.options.x=${model}", "it is a section"),
        ("dataset.options={a: {b: [${trainer.lora}]}}", "dataset.options.a.b[0]=${trainer.lora}: it is a section"),
        (
            "dataset.sources={a: {path: x, options: ${trainer.lora}}}",
            "dataset.sources.a.options=${trainer.lora}: it is",
        ),
        ("model.visual_encoder.extra_encoders=${trainer.seed}", "a list is needed"),
        ("trainer/lora=5", "trainer/lora=5: it is a section"),
        ("trainer/lora=null", "trainer/lora=null: it is a section"),
    ],
)
def test_a_reference_to_what_does_not_fit_is_refused(override: str, refusal: str):
    with hydra_context():
        assert refusal in (refuse(["dataset.path=records.json", override]) or "")


def test_secrets_are_masked_in_refusals_and_listings(capsys: pytest.CaptureFixture[str]):
    """Hydra prints the configuration for `--cfg job`, and repeats what it cannot parse."""
    for words in (["trainer.hub_token=hush1234", "--cfg", "job"], ["trainer.hub_token=[hush1234,hush5678]"],
                  ["trainer.hub_token=hush{1234"], ["+dataset.options.password=hush5678,hush"],
                  ["trainer.hub_token=choice(hush1234,hush5678)"], ["--token=hush\x1b[31m"]):  # fmt: skip
        try:
            with_config(["-cn", "pretrain-smol", *words], lambda *_: None, make_objective)
        except SystemExit as end:
            print(end)
        printed = "".join(capsys.readouterr())
        assert MASK in printed
        assert "hush" not in printed
        assert "\x1b" not in printed


def test_keys_and_choices_are_those_of_the_schema():
    assert {"trainer", "trainer.seed", "model.head.labels", "dataset.sources"} <= set(KEYS)
    assert "model/head=binary" in CHOICES
    assert "pretrain-smol" in run_names()
