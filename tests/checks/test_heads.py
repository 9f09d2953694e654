"""Every refusal of prediction heads: the keys, what was given, what is allowed; the tables are those of the code."""

from pathlib import Path

import pytest

from tests.fixtures import check_config, compose_config
from vlm.checks.fields import ConfigError
from vlm.config.choices import GROUP_BY_MODALITY_LENGTH, HEAD_TYPES, LOSS_OPTIONS, LOSSES
from vlm.config.derived import caches_features, embedding_row_keys, extra_tokens
from vlm.config.packaged import packaged_names, run_names
from vlm.train.objectives.table import make_objective

RUN = "head-binary"
EXTRA = "model.head.extra_heads.quality"
CONNECTOR = ["trainer.unfreeze.train_connector=true"]
REFUSALS = {
    "profile": (["trainer.profile=true"], "trainer.profile=true: runs that train heads are neither profiled"),
    "peak": (["trainer.peak_tflops=5"], "trainer.peak_tflops=5.0: runs that train heads are neither profiled"),
    "task": (["model.head.task=rank"], "model.head.task=rank: allowed are null, binary, multiclass, multilabel, "
             "regression, ordinal, pairwise"),
    "name": (["model.head.name=a-b"], "model.head: 'a-b' is not a head's name; use letters, digits and _"),
    "name beside": ([f"{EXTRA}.task=regression", "model.head.name=quality"],
                    f"{EXTRA}: the first head has that name (model.head.name)"),
    "no task beside": ([f"{EXTRA}.pooling=mean"], f"{EXTRA}.task=null: allowed are binary, "),
    "pooling": (["model.head.pooling=cls"], "model.head.pooling=cls: allowed are last, mean, image, text, attention, "
                "query, token, first, alltoken"),
    "token alone": (["model.head.token=MARK"], "model.head.pooling=last, model.head.token=MARK: each needs the "
                    "other"),
    "pooling=token alone": (["model.head.pooling=token"], "model.head.pooling=token, model.head.token=None: "),
    "loss": (["model.head.loss=ce"], "model.head.loss=ce: for task=binary allowed are bce, focal"),
    "loss beside": ([f"{EXTRA}.task=regression", f"{EXTRA}.loss=ce"],
                    f"{EXTRA}.loss=ce: for task=regression allowed are mse, huber"),
    "type": (["model.head.type=tree"], "model.head.type=tree: allowed are linear, mlp, identity, or package.module:"),
    "option": (["model.head.options.num_layers=3"], "model.head.options.num_layers=3: linear does not take it; allowed "
               "are input_norm, dropout"),
    "loss option": (["model.head.loss_options.gamma=1"], "model.head.loss_options.gamma=1: bce does not take it; "
                    "allowed are none"),
    "threshold": (["model.head.threshold_by=recall"], "model.head.threshold_by=recall: allowed are f1, accuracy, "
                  "youden, none"),
    "threshold of a number": (["model.head.task=regression", "model.head.threshold_by=youden"],
                              "model.head.threshold_by=youden: task=regression has no threshold"),
    "smoothing": (["model.head.label_smoothing=1"], "model.head.label_smoothing=1.0: a share from 0 to below 1 is"),
    "smoothing of a number": (["model.head.task=regression", "model.head.label_smoothing=0.1"],
                              "model.head.label_smoothing=0.1: task=regression has no labels to choose among"),
    "weight": (["model.head.weight=0"], "model.head.weight=0.0: a number above 0 is needed"),
    "lonely weight": (["model.head.weight=2"], "model.head.weight=2.0: there is no other loss; leave it out"),
    "one label": (["model.head.task=multiclass", "model.head.labels=[a]"], "model.head.labels=['a']: at least two are"),
    "three labels of two": (["model.head.labels=[a,b,c]"], "model.head.labels=['a', 'b', 'c']: task=binary needs two"),
    "labels of a number": (["model.head.task=regression", "model.head.labels=[a,b]"],
                           "model.head.labels=['a', 'b']: task=regression has no labels to choose among"),
    "weights of a number": (["model.head.task=pairwise", "model.head.class_weights=balanced"],
                            "model.head.class_weights=balanced: task=pairwise has no labels to choose among"),
    "class weights": (["model.head.class_weights=rare"], "model.head.class_weights=rare: balanced, a list of numbers "
                      "above 0, or null is needed"),
    "class weights below 0": (["model.head.class_weights=[1,-1]"], "model.head.class_weights=[1, -1]: balanced, a "),
    "too many class weights": (["model.head.labels=[a,b]", "model.head.class_weights=[1,2,3]"],
                               "model.head.class_weights=[1, 2, 3]: one for each of 2 labels is needed"),
    "generation below 0": (["model.head.generation_weight=-1"], "model.head.generation_weight=-1.0: 0 or more is"),
    "generation with a query": (["model.head.generation_weight=1", "model.head.pooling=query"],
                                "model.head.generation_weight=1.0: pooling=query puts a token after the"),
    "generation of a frozen body": (["model.head.generation_weight=1"],
                                    "model.head.generation_weight=1.0: no part that generates replies trains; "
                                    "unfreeze"),
    "stream": (["dataset.streaming=true", "trainer.max_steps=3"],
               "dataset.streaming=true: records are counted and split before a head trains"),
    "truncate": (["dataset.over_length=truncate"], "dataset.over_length=truncate: a head reads the end of a prompt"),
    "two tests": (["dataset.test_path=x.json", "dataset.test_split=0.1"], "dataset.test_path and dataset.test_split: "),
    "test split": (["dataset.test_split=1"], "dataset.test_split=1.0: a share from 0 to below 1 is needed"),
    "pictures of no test": (["dataset.test_image_folder=."], "dataset.test_image_folder=.: it has no effect without "
                            "dataset.test_path"),
    "no evaluation": (["dataset.eval_split=0"], "dataset.eval_split=0.0: temperature and threshold are chosen on"),
    "evaluation below 0": (["dataset.eval_split=-0.1"], "dataset.eval_split=-0.1: a share from 0 to below 1, or null, "
                          "is needed"),
    "one fold": (["dataset.folds=1"], "dataset.folds=1: at least 2, or null, is needed"),
    "folds and a share": (["dataset.folds=3", "dataset.eval_split=0.1"],
                          "dataset.folds=3 and dataset.eval_split=0.1: choose one"),
    "folds and records": (["dataset.folds=3", "dataset.eval_path=x.json"],
                          "dataset.folds=3 and dataset.eval_path=x.json: choose one"),
    "folds and a part of evaluation": (["dataset.folds=3", "dataset.max_eval_samples=9"],
                                       "dataset.folds=3 and dataset.max_eval_samples=9: choose one"),
    "folds of a moving body": (["dataset.folds=3", *CONNECTOR],
                               "dataset.folds=3: hidden states are computed once, but "
                               "trainer.unfreeze.train_connector=true does not allow that"),
    "folds without a cache": (["dataset.folds=3", "dataset.cache_features=false"], "dataset.folds=3: hidden states are "
                              "computed once, but dataset.cache_features=false does not allow that"),
    "cache of a moving body": (["dataset.cache_features=true", "model.head.pooling=query"],
                               "dataset.cache_features=true: hidden states are computed once, but "
                               "model.head.pooling=query does not allow that"),
    "cache of new tokens": (["dataset.cache_features=true", "model.language_model.new_tokens=[MARK]"],
                            "dataset.cache_features=true: hidden states are computed once, but "
                            "model.language_model.new_tokens=['MARK'] does not allow that"),
    "cache of joint training": (["dataset.cache_features=true", "model.head.generation_weight=1", *CONNECTOR],
                                "dataset.cache_features=true: hidden states are computed once, but "
                                "trainer.unfreeze.train_connector=true does not allow that"),
    "cache of adapters": (["dataset.cache_features=true", "trainer.lora.language_model.r=4"],
                          "dataset.cache_features=true: hidden states are computed once, but "
                          "trainer.lora.language_model.r=4 does not allow that"),
    "cache under ZeRO-3": (["dataset.cache_features=true", "trainer.deepspeed=zero3"],
                           "dataset.cache_features=true: hidden states are computed once, but "
                           "trainer.deepspeed=zero3 does not allow that"),
    "grouping what is computed": ([f"trainer.train_sampling_strategy={GROUP_BY_MODALITY_LENGTH}"],
                                  f"trainer.train_sampling_strategy={GROUP_BY_MODALITY_LENGTH}: hidden states are "
                                  "computed once in this run"),
    "no rate": (["trainer.learning_rate.head_learning_rate=null"], "trainer.learning_rate.head_learning_rate=null: a "
                "positive number is needed, because model.head.task=binary"),
    "no rate of a query": (["model.head.pooling=query", "trainer.learning_rate.language_model_learning_rate=null"],
                           "trainer.learning_rate.language_model_learning_rate=null: a positive number is needed, "
                           "because model.head.pooling=query"),
    "no rate of new tokens": (["model.language_model.new_tokens=[MARK]",
                               "trainer.learning_rate.language_model_learning_rate=0"],
                              "trainer.learning_rate.language_model_learning_rate=0.0: a positive number is needed, "
                              "because model.language_model.new_tokens=['MARK']"),
}  # fmt: skip
"""Overrides -> how the message begins."""

WITHOUT_A_HEAD = {
    "dataset.test_path=x.json": "dataset.test_path=x.json: it needs a prediction head, such as",
    "dataset.test_split=0.1": "dataset.test_split=0.1: it needs a prediction head",
    "dataset.test_image_folder=.": "dataset.test_image_folder=.: it needs a prediction head",
    "dataset.folds=3": "dataset.folds=3: it needs a prediction head",
    "model.head.pooling=mean": "model.head.pooling=mean: there is no head; choose one, such as",
    "model.head.type=mlp": "model.head.type=mlp: there is no head; choose one",
    "model.head.generation_weight=1": "model.head.generation_weight=1.0: there is no head; choose one",
    f"{EXTRA}.task=regression": "model.head.extra_heads=quality: there is no head; choose one",
}
"""A key that nothing comes of -> how the message begins."""


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of records; `x.json` is there too."""
    monkeypatch.chdir(tmp_path)
    for name in ("records.json", "x.json"):
        (tmp_path / name).write_text("[]")
    return tmp_path / "records.json"


def refused(name: str, records: Path, *overrides: str) -> str:
    config = compose_config(name, [f"dataset.path={records}", *overrides])
    with pytest.raises(ConfigError) as error:
        check_config(config)
    return str(error.value)


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_the_keys(records: Path, overrides: list[str], message: str):
    assert refused(RUN, records, *overrides).startswith(message)


@pytest.mark.parametrize(("override", "message"), WITHOUT_A_HEAD.items())
def test_keys_that_nothing_comes_of_are_refused(records: Path, override: str, message: str):
    assert refused("pretrain-smol", records, override).startswith(message)


def test_records_to_measure_on_are_there(records: Path, tmp_path: Path):
    assert refused(RUN, records, "dataset.test_path=y.json").startswith("dataset.test_path=y.json: no such file")
    said = refused(RUN, records, "dataset.test_path=x.json", "dataset.test_image_folder=y")
    assert said.startswith("dataset.test_image_folder=y: no such folder")
    (tmp_path / "0.tar").touch()
    said = refused(RUN, records, f"dataset.test_path={tmp_path / '0.tar'}")
    assert said.endswith("tar shards are for training only; give evaluation records in another form")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["dataset.folds=3"],
        ["dataset.test_split=0.1", "dataset.eval_split=0.1"],
        ["dataset.test_path=x.json", "dataset.eval_path=x.json"],
        ["model.head.type=mlp", "model.head.options.num_layers=3", "model.head.options.dropout=0.1"],
        ["model.head.type=mine:Head", "+model.head.options.depth=3"],
        ["model.head.loss=focal", "model.head.loss_options.gamma=1", "model.head.class_weights=balanced"],
        ["model.head.labels=[no,yes]", "model.head.class_weights=[1,2]", "model.head.threshold_by=none"],
        ["model.head.pooling=token", "model.head.token=MARK", "model.language_model.new_tokens=[MARK]"],
        ["model.head.pooling=query", "dataset.cache_features=false"],
        [f"{EXTRA}.task=regression", f"{EXTRA}.weight=2", "model.head.weight=0.5", f"{EXTRA}.layer=-2"],
        [f"{EXTRA}.task=regression", f"{EXTRA}.loss=huber", f"{EXTRA}.loss_options.delta=2"],
        ["model.head.generation_weight=0.5", *CONNECTOR],
        ["trainer.deepspeed=zero3"],
        [f"trainer.train_sampling_strategy={GROUP_BY_MODALITY_LENGTH}", *CONNECTOR],
    ],
)
def test_what_can_be_run_passes(records: Path, overrides: list[str]):
    check_config(compose_config(RUN, [f"dataset.path={records}", *overrides]))


@pytest.mark.parametrize("name", [name for name in run_names() if name.startswith("head-")])
@pytest.mark.parametrize(
    "head", [name for name in packaged_names("vlm.config", "model/head", ".yaml") if name not in ("none", "embedding")]
)
def test_every_head_passes_on_every_run(records: Path, name: str, head: str):
    config = compose_config(name, [f"dataset.path={records}", f"model/head={head}"])
    check_config(config)
    assert config.model.head.task == head
    assert make_objective(config).training_keys() == {"head": f"model.head.task={head}"}


def test_heads_beside_need_no_plus():
    words = ["dataset.path=a.json", f"{EXTRA}.task=multiclass", f"{EXTRA}.labels=[low,high]",
             f"{EXTRA}.pooling=query", f"{EXTRA}.options.dropout=0.5",
             "model.head.extra_heads.age.task=regression"]  # fmt: skip
    config = compose_config(RUN, words)
    heads = config.model.head.by_name
    assert {name: one.task for name, one in heads.items()} == {
        "label": "binary", "quality": "multiclass", "age": "regression"
    }  # fmt: skip
    assert heads["quality"].labels == ["low", "high"]
    assert heads["quality"].options == {"dropout": 0.5}
    assert extra_tokens(config.model) == ["<|query:quality|>"]
    assert embedding_row_keys(config) == {"language_model": f"{EXTRA}.pooling=query"}


def test_hidden_states_are_computed_once_where_the_body_stays():
    kept = {
        "frozen": [], "connector": CONNECTOR, "adapter": ["trainer.lora.visual_encoder.r=2"],
        "query": ["model.head.pooling=query"], "told": ["dataset.cache_features=false"],
        "sharded": ["trainer.deepspeed=zero3"], "zero2": ["trainer.deepspeed=zero2"],
    }  # fmt: skip
    found = {
        name: caches_features(compose_config(RUN, ["dataset.path=a.json", *words])) for name, words in kept.items()
    }
    assert [name for name, yes in found.items() if yes] == ["frozen", "zero2"]


# The tables


@pytest.mark.parametrize(
    "head", [name for name in packaged_names("vlm.config", "model/head", ".yaml") if name not in ("none", "embedding")]
)
def test_a_heads_yaml_declares_all_options(head: str):
    """Each is set on the command line without a plus."""
    options = dict.fromkeys(name for names in HEAD_TYPES.values() for name in names)
    of_losses = [name for loss in LOSSES[head] for name in LOSS_OPTIONS.get(loss, ())]
    given = compose_config(RUN, ["dataset.path=a.json", f"model/head={head}"]).model.head
    assert set(given.options) == set(options)
    assert list(given.loss_options) == of_losses
