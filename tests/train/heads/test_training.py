"""What of a model with prediction heads trains: parts, adapters, rows of embeddings, several heads at once."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    set_seed,
)

from tests.fixtures import check_config, compose_config, head_words, losses
from tests.train.heads.head_runs import CONNECTOR, SHORT, alone, ask, logged, rewritten, scores_of
from tests.waiting import wait_until
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.config.dataset_schema import SourceConfig
from vlm.config.derived import embedding_row_keys
from vlm.models import VLMForConditionalGeneration
from vlm.train.arguments import training_arguments
from vlm.train.heads.data import explain_label_key
from vlm.train.model import prepare
from vlm.train.objectives.prediction import Prediction
from vlm.train.objectives.table import make_objective
from vlm.train.parts import Part, parameter_groups, table
from vlm.train.trainer import VLMTrainer


@pytest.fixture
def prepared(common: list[str], labelled: Path) -> Callable[..., tuple[Any, list[Part], Any]]:
    """`prepared(*overrides)`: the model, its parts and its processor, as a run has them before it trains."""

    def build(*overrides: str) -> tuple[Any, list[Part], Any]:
        config = compose_config("head-classification", [*common, *head_words(labelled, "colour"), *overrides])
        check_config(config)
        objective = make_objective(config)
        body_config, processor = resolve_model(config)
        args = training_arguments(config.trainer, [*objective.training_keys(), *embedding_row_keys(config)])
        objective.load_data(body_config, processor, args)
        set_seed(args.seed)
        model = objective.wrap_model(load_weights(config, body_config, processor, torch.float32, args.seed), args)
        return model, prepare(model, config, args, processor), processor

    return build


def training(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_trainable_parameter_is_in_exactly_one_group(prepared: Any):
    model, parts, _ = prepared(
        *CONNECTOR, "model.head.pooling=attention", "trainer.lora.language_model.r=2",
        "model.head.extra_heads.level.task=ordinal", "dataset.options.label_key=[colour,level]",
        "model.head.name=colour",
        "model.language_model.new_tokens=[MARK]", "trainer.weight_decay.head_weight_decay=0.3",
        "trainer.learning_rate.connector_learning_rate=3e-4",
    )  # fmt: skip
    decayed = {name for name in training(model) if not name.endswith("bias")}
    groups = {group["name"]: group for group in parameter_groups(parts, decayed)}
    assert set(groups) == {"connector.decay", "connector.no_decay", "language_model.decay", "language_model.no_decay",
                           "head.decay", "head.no_decay"}  # fmt: skip
    found = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {groups[name]["lr"] for name in ("head.decay", "head.no_decay")} == {2e-2}
    assert groups["connector.decay"]["lr"] == 3e-4
    assert groups["language_model.decay"]["lr"] == 1e-2
    assert (groups["head.decay"]["weight_decay"], groups["head.no_decay"]["weight_decay"]) == (0.3, 0.0)
    embeddings = model.get_input_embeddings().weight
    assert any(one is embeddings for one in groups["language_model.no_decay"]["params"])
    lines = [line.split() for line in table(parts).splitlines()]
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    said = ["head", "multiclass", "at", "attention,", "ordinal", "at", "last"]
    assert lines[-2][: len(said) + 1] == [*said, f"{heads:,}"]


def test_what_no_head_reads_gets_no_gradient(prepared: Any):
    """The vocabulary head, and with `layer` whatever stands behind that hidden state."""
    whole = ["trainer.unfreeze.train_language_model=true"]
    body = "body.language_model."
    names = training(prepared(*whole)[0])
    assert f"{body}model.layers.1.mlp.up_proj.weight" in names
    assert f"{body}lm_head.weight" not in names
    for layer, kept in {"1": {0}, "-2": {0}, "0": set(), "2": {0, 1}, "-1": {0, 1}}.items():
        model, parts, _ = prepared(*whole, f"model.head.layer={layer}")
        names = training(model)
        layers = {int(name.split(".")[4]) for name in names if name.startswith(f"{body}model.layers.")}
        assert layers == kept, layer
        assert (f"{body}model.norm.weight" in names) == (kept == {0, 1})
        out = model(**batch_of(model), labels=torch.tensor([0.0, 1.0]))
        out.loss.backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names
        assert parts[-1].name == "head"
    assert f"{body}lm_head.weight" in training(prepared(*whole, "model.head.generation_weight=1")[0])


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    """Two prompts of which one shows a picture."""
    image = model.config.media_token_ids[0]
    patches = 9
    ids = torch.tensor([[5, *[image] * patches, 6, 7], [8, 9, 10, *[0] * (patches)]])
    mask = torch.tensor([[1] * (patches + 3), [1, 1, 1, *[0] * patches]])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, 24, 24)}


@pytest.fixture(scope="module")
def tied(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model of `world` with one matrix for both ends of its vocabulary."""
    folder = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(world / "language_model")
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "language_model").save_pretrained(folder)
    return folder


EMBEDDINGS = "body.language_model.model.embed_tokens.weight"
VOCABULARY = "body.language_model.lm_head.weight"


@pytest.mark.parametrize("kind", ["untied", "tied", "untied, replies too"])
def test_new_tokens_train_alone(
    train_head: Callable[..., Path], prepared: Any, labelled: Path, tied: Path, told: list[dict[str, Any]],
    tmp_path: Path, kind: str,
):  # fmt: skip
    """Every other row stays as it is, bit by bit; the tokens are in the saved model and its tokenizer."""
    words = ["model.head.pooling=query", "model.language_model.new_tokens=[MARK]", f"dataset.test_path={labelled}"]
    if kind == "tied":
        words.append(f"model.language_model.hf_name={tied}")
    if kind == "untied, replies too":
        words[0] = "model.head.generation_weight=1"
        words[1:1] = ["dataset.format=tests.train.heads.head_runs:answered", "dataset.options={}"]
    words += rewritten(labelled, tmp_path, lambda index, record: record.update(prompt=f"MARK {record['prompt']}"))
    words += ["trainer.weight_decay.language_model_weight_decay=0.5", "trainer.optim=adamw_torch"]
    before = {name: value.clone() for name, value in prepared(*words)[0].state_dict().items()}
    folder = train_head("head-classification", "colour", tmp_path / "run", *words, *SHORT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    tokens = ["MARK"] if kind == "untied, replies too" else ["MARK", "<|query:label|>"]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer("MARK", add_special_tokens=False)["input_ids"] == ids[:1]
    after = AutoModelForSequenceClassification.from_pretrained(folder / "final").state_dict()
    changed = {name for name in before if not name.startswith("heads.") and not torch.equal(before[name], after[name])}
    expected = {EMBEDDINGS, VOCABULARY} if kind != "untied" else {EMBEDDINGS}
    assert changed == expected
    for name in expected:
        moved = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
        assert moved == sorted(ids), name
    assert AutoProcessor.from_pretrained(folder / "final").tokenizer.get_vocab()["MARK"] == ids[0]
    held = load_file(next((folder).glob("final/*.safetensors")))
    assert any(name.endswith("embed_tokens.weight") for name in held)


REPLIES = ["dataset.format=tests.train.heads.head_runs:answered", "dataset.options={}"]


def test_a_head_and_its_connector_train_together(
    train_head: Callable[..., Path], labelled: Path, told: list[dict[str, Any]], prepared: Any, tmp_path: Path
):
    words = [*CONNECTOR, "trainer.learning_rate.connector_learning_rate=1e-3", "trainer.num_train_epochs=10",
             "model.head.pooling=image", f"dataset.test_path={labelled}"]  # fmt: skip
    before = {name: value.clone() for name, value in prepared(*words)[0].state_dict().items()}
    folder = train_head("head-classification", "colour", tmp_path / "run", *words)
    assert losses(folder)[-1] < 0.5 * losses(folder)[0]
    predictor = alone(folder / "final")
    np.testing.assert_allclose(ask(predictor, labelled)["label"], told[-1]["test"]["label"].outputs, atol=1e-4)
    after = predictor.model.state_dict()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector", "label"}


def test_replies_are_learnt_beside_the_head(
    train_head: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both losses fall; the vocabulary head runs where replies are learnt, on their positions, and never else."""
    seen: list[int] = []
    parts: list[tuple[float, float]] = []
    forward = VLMForConditionalGeneration.forward
    compute = Prediction.compute_loss

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        if "logits_to_keep" in named and self.language_model.training:  # not in the proofs before the first step
            seen.append(int(named["logits_to_keep"].sum()))
        return forward(self, *given, **named)

    def apart(self: Any, trainer: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        with torch.no_grad():
            both = model(**inputs).loss.item()
            alone = model(**{name: value for name, value in inputs.items() if name != "text_labels"}).loss.item()
        parts.append((alone, both - alone))
        return compute(self, trainer, model, inputs, num_items_in_batch)

    monkeypatch.setattr(VLMForConditionalGeneration, "forward", counted)
    monkeypatch.setattr(Prediction, "compute_loss", apart)
    words = ["trainer.num_train_epochs=6", "trainer.unfreeze.train_language_model=true", "trainer.eval_strategy=epoch"]
    words.append("model.head.generation_weight=0.5")
    train_head("head-classification", "colour", tmp_path / "run", *REPLIES, *words)
    heads, replies = np.array(parts).T
    assert heads[-5:].mean() < 0.7 * heads[:5].mean()
    assert replies[-5:].mean() < 0.7 * replies[:5].mean()
    assert replies.min() > 0
    assert len(seen) == 2 * len(parts)  # of the three passes of a step, two learn replies; evaluation never does
    assert min(seen) > 0
    seen.clear()
    train_head("head-classification", "colour", tmp_path / "other", *REPLIES, *CONNECTOR, *SHORT)
    assert not seen


def test_a_batch_without_replies_trains_as_well(train_head: Callable[..., Path], labelled: Path, tmp_path: Path):
    """Every rank's pass runs through the same modules, whatever its records hold."""
    words = ["trainer.unfreeze.train_language_model=true", "model.head.generation_weight=0.5"]
    folder = train_head("head-classification", "colour", tmp_path / "run", *words, *SHORT)
    assert np.isfinite(losses(folder)).all()


SEVERAL = [
    "model.head.name=colour", "dataset.options.label_key=[colour,light,tags]",
    "model.head.extra_heads.light.task=regression",
    "model.head.extra_heads.light.pooling=mean", "model.head.extra_heads.tags.task=multilabel",
    "model.head.extra_heads.tags.type=mlp",
    "model.head.extra_heads.tags.pooling=attention", "model.head.extra_heads.light.weight=0.5",
]  # fmt: skip


def without_some(index: int, record: dict) -> None:
    """Each record lacks one of three labels, or none."""
    if index % 4 < 3:
        record[("colour", "light", "tags")[index % 4]] = None


def test_several_heads_learn_from_what_each_has(
    train_head: Callable[..., Path], labelled: Path, told: list[dict[str, Any]], tmp_path: Path
):
    words = [*SEVERAL, *rewritten(labelled, tmp_path, without_some), "model.head.pooling=image",
             f"dataset.test_path={labelled}", "trainer.num_train_epochs=30", "trainer.eval_strategy=epoch"]  # fmt: skip
    folder = train_head("head-classification", "colour", tmp_path / "run", *words)
    sizes = {name: len(said.outputs) for name, said in told[-1]["evaluation"].items()}
    assert sum(sizes.values()) < 3 * 12
    assert scores_of(folder, head="colour")["accuracy"] == 1
    assert scores_of(folder, head="light")["r2"] > 0.8
    assert scores_of(folder, head="tags")["exact_match"] > 0.8
    predictor = alone(folder / "final")
    assert [head.name for head in predictor.heads] == ["colour", "light", "tags"]
    found = ask(predictor, labelled)
    for name, said in told[-1]["test"].items():
        np.testing.assert_allclose(found[name], said.outputs, rtol=1e-4, atol=1e-3)
    for name in sizes:
        assert (folder / "scores" / "evaluation" / name).is_dir()
    names = {key for line in logged(folder) for key in line}
    assert {"eval_colour_loss", "eval_colour_accuracy", "eval_light_r2", "eval_tags_f1"} <= names


def test_a_head_without_records_to_measure_on_is_refused(
    train_head: Callable[..., Path], labelled: Path, tmp_path: Path
):
    records = json.loads(labelled.read_text())
    for record in records:
        record["light"] = None
    (tmp_path / "other.json").write_text(json.dumps(records))
    words = [*SEVERAL, f"dataset.eval_path={tmp_path / 'other.json'}", "dataset.eval_split=null"]
    with pytest.raises(ValueError, match=r"head light: none of 48 eval records has a label for it"):
        train_head("head-classification", "colour", tmp_path / "run", *words)


def test_folds_hold_each_record_out_once(
    train_head: Callable[..., Path], told: list[dict[str, Any]], labelled: Path, tmp_path: Path
):
    words = ["dataset.folds=3", "dataset.eval_split=null", "model.head.pooling=image", "trainer.num_train_epochs=30",
             f"dataset.test_path={labelled}"]  # fmt: skip
    folder = train_head("head-classification", "colour", tmp_path / "run", *words)
    assert len(told[-1]["evaluation"]["label"].outputs) == 48
    assert scores_of(folder, "folds")["accuracy"] == 1
    assert (folder / "scores" / "folds").is_dir()
    found = ask(alone(folder / "final"), labelled)["label"]
    np.testing.assert_allclose(found, told[-1]["test"]["label"].outputs, rtol=1e-4, atol=1e-4)
    assert scores_of(folder, "test")["accuracy"] == 1  # the head that is saved has learnt, from all records
    assert losses(folder)[-1] < 0.3 * losses(folder)[0]
    steps = [len(losses(folder / "folds" / str(number))) for number in range(3)]
    assert steps == [4 * 30] * 3
    assert len(losses(folder)) == 6 * 30


def test_a_signal_in_a_fold_ends_the_run_which_begins_again(
    train_head: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    words = ["dataset.folds=2", "dataset.eval_split=null", "trainer.num_train_epochs=1"]
    step = VLMTrainer.training_step

    def asked(self: VLMTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: self.stop_on_signal.listener.received)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", asked)
    with caplog.at_level("INFO", logger="vlm.train"), pytest.raises(SystemExit) as ended:
        train_head("head-classification", "colour", tmp_path / "run", *words)
    assert ended.value.code == 75
    assert "folds have no checkpoints: the same command starts with the first fold" in caplog.text
    assert not (tmp_path / "run" / "folds" / "1").exists()


def test_what_is_measured_on_is_held_out(train_head: Callable[..., Path], labelled: Path, tmp_path: Path):
    folder = train_head(
        "head-binary", "bright", tmp_path / "split", *SHORT, "dataset.test_split=0.25", "dataset.max_eval_samples=5"
    )
    data = json.loads((folder / "data.json").read_text())
    assert {role: one["samples"] for role, one in data.items()} == {"train": 27, "eval": 5, "test": 12}
    found = json.loads((folder / "scores.json").read_text())
    assert found["test"]["label"]["note"] == "nothing was tuned on these records"
    assert "tuned on these records" in found["evaluation"]["label"]["note"]
    folder = train_head(
        "head-binary", "bright", tmp_path / "paths", *SHORT, f"dataset.eval_path={labelled}", "dataset.eval_split=null",
        f"dataset.test_path={labelled}", "dataset.max_eval_samples=20",
    )  # fmt: skip
    data = json.loads((folder / "data.json").read_text())
    assert {role: one["samples"] for role, one in data.items()} == {"train": 48, "eval": 20, "test": 48}


def test_pictures_of_other_records_lie_elsewhere(
    train_head: Callable[..., Path], labelled: Path, told: list[dict[str, Any]], tmp_path: Path
):
    """The same records over other pictures are other hidden states."""
    (tmp_path / "labelled").mkdir()
    for record in json.loads(labelled.read_text()):
        name = Path(record["image"]).name
        other = (int(name.split(".")[0]) + 1) % 48
        (tmp_path / "labelled" / name).write_bytes((labelled.parent / "labelled" / f"{other}.png").read_bytes())
    words = [f"dataset.test_path={labelled}", f"dataset.test_image_folder={tmp_path}", *SHORT]
    train_head("head-regression", "light", tmp_path / "run", *words, "dataset.eval_split=0.5")
    other = told[-1]["test"]["label"].outputs
    train_head("head-regression", "light", tmp_path / "same", words[0], *SHORT, "dataset.eval_split=0.5")
    np.testing.assert_allclose(other[:-1], told[-1]["test"]["label"].outputs[1:], atol=1e-3)


def test_accumulated_steps_are_those_of_a_larger_batch(train_head: Callable[..., Path], tmp_path: Path):
    words = ["trainer.max_steps=4", "trainer.train_sampling_strategy=sequential", "trainer.max_grad_norm=0"]
    whole = train_head("head-classification", "colour", tmp_path / "whole", *words)
    parts = ["trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2"]
    folder = train_head("head-classification", "colour", tmp_path / "parts", *words, *parts)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)


def test_rare_labels_count_more_where_they_are_balanced(
    train_head: Callable[..., Path], labelled: Path, tmp_path: Path
):
    rare = rewritten(labelled, tmp_path, lambda index, record: record.update(bright=["no", "yes"][index % 6 == 0]))
    folder = train_head("head-binary", "bright", tmp_path / "run", *rare, *SHORT, "model.head.class_weights=balanced")
    weights = alone(folder / "final").heads[0].class_weights
    assert weights is not None
    assert weights == pytest.approx([36 / (2 * 30), 36 / (2 * 6)])
    given = ["model.head.class_weights=[1,3]", "model.head.label_smoothing=0.1", "model.head.loss=focal",
             "model.head.loss_options.gamma=1"]  # fmt: skip
    folder = train_head("head-binary", "bright", tmp_path / "given", *rare, *SHORT, *given)
    settings = alone(folder / "final").heads[0]
    assert (settings.class_weights, settings.label_smoothing) == ([1.0, 3.0], 0.1)
    assert (settings.loss, settings.loss_options) == ("focal", {"gamma": 1})


@pytest.mark.parametrize(
    "trained", [pytest.param([], id="frozen"), pytest.param(CONNECTOR, id="connector", marks=pytest.mark.slow)]
)
def test_half_precision(
    train_head: Callable[..., Path], labelled: Path, told: list[dict[str, Any]], tmp_path: Path, trained: list[str]
):
    """Heads stay in full precision, and the saved model says what was measured as far as bfloat16 can."""
    words = ["trainer.bf16=true", f"dataset.test_path={labelled}", *trained]
    folder = train_head("head-classification", "colour", tmp_path / "run", *words)
    predictor = alone(folder / "final")
    assert {str(one.dtype) for one in predictor.model.heads.parameters()} == {"torch.float32"}
    assert predictor.model.get_input_embeddings().weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = ask(predictor, labelled)["label"]
    np.testing.assert_allclose(found, told[-1]["test"]["label"].outputs, atol=0.05)


def test_the_key_of_labels_and_what_names_another_are_told():
    told = explain_label_key(SourceConfig(path="a.json"))
    assert (
        told == "Labels are read from `label`; dataset.format=labelled dataset.options.label_key=KEY reads another key"
    )
    told = explain_label_key(SourceConfig(path="a.csv", format="labelled", options={"label_key": "shape"}))
    assert told == "Labels are read from `shape`; dataset.options.label_key=KEY names another key"
