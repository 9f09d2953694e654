"""Objectives: chosen by name, one file each, and nobody outside those files asks which objective a run has."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vlm
from tests.fixtures import check_config, compose_config, losses
from vlm.checks.fields import ConfigError
from vlm.config.packaged import packaged_names, run_names
from vlm.config.schema import RunConfig
from vlm.train.objectives.base import Objective
from vlm.train.objectives.distillation import Distillation
from vlm.train.objectives.embedding import Embedding
from vlm.train.objectives.generation import Generation
from vlm.train.objectives.prediction import Prediction
from vlm.train.objectives.preference import Preference
from vlm.train.objectives.table import OBJECTIVES, make_objective

SOURCE = Path(vlm.__file__).parent
OWN_FILES = ("train/objectives/", "config/model_schema.py")
"""Where it may be asked which objective a run has."""

NAMED = {"distil-smol": Distillation}
"""The runs that name another objective than that of their model."""

HEADS = [name for name in packaged_names("vlm.config", "model/head", ".yaml") if name != "none"]


# Nobody asks


CLASSES = {"Objective", *(path.partition(":")[2] for path in OBJECTIVES.values())}


def last_name(node: ast.AST) -> str:
    """The name that a dotted expression ends with."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def tells(node: ast.AST) -> bool:
    """Whether an expression tells which objective a run has: its name, or whether it has a head."""
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr == "objective" or (node.attr == "task" and last_name(node.value) == "head")


def compares(node: ast.Compare) -> bool:
    """Whether an objective is compared with anything, or a task with None: comparisons of tasks are about tasks."""
    values = [node.left, *node.comparators]
    is_task = any(isinstance(value, ast.Attribute) and value.attr == "task" for value in values)
    return any(last_name(value) == "objective" for value in values) or (
        is_task and any(ast.unparse(value) == "None" for value in values)
    )


def asks(node: ast.AST) -> bool:
    """Whether a node tells objectives apart, or looks at `config.trainer.objective`."""
    match node:
        case ast.Compare():
            return compares(node)
        case ast.If() | ast.IfExp() | ast.While():
            return tells(node.test)
        case ast.BoolOp():
            return any(map(tells, node.values))
        case ast.UnaryOp():
            return tells(node.operand)
        case ast.Match():
            return tells(node.subject)
        case ast.Attribute(attr="objective", value=ast.Attribute(attr="trainer")):
            return "config" in last_name(node.value.value)
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass")):
            return bool(CLASSES & {last_name(name) for name in ast.walk(node.args[1])})
    return False


def questions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that ask which objective a run has; an `assert` tells the type checker something, and asks nothing."""
    asserted = {id(node.test) for node in ast.walk(tree) if isinstance(node, ast.Assert)}
    yield from (node for node in ast.walk(tree) if asks(node) and id(node) not in asserted)


@pytest.mark.parametrize(
    "code",
    [
        "config.model.head.task is None", "requested.task is not None", "config.trainer.objective == 'generation'",
        "1 if config.model.head.task else 2", "not config.model.head.task", "config.model.head.task or 'none'",
        "isinstance(objective, Prediction)", "isinstance(it, (int, objectives.Generation))", "config.trainer.objective",
        "objective == 'prediction'",
    ],
)  # fmt: skip
def test_questions_are_known(code: str):
    assert list(questions(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["head.task == 'multilabel'", "one.task in TASKS", "trainer.objective.evaluate(trainer, data)", "heads.by_name"],
)
def test_other_expressions_are_no_questions(code: str):
    assert not list(questions(ast.parse(code)))


def test_nobody_asks_which_objective_a_run_has():
    asked = []
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if not name.startswith(OWN_FILES):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            asked += [f"{name}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}" for node in questions(tree)]
    assert not asked


# How one is chosen


def test_every_objective_of_the_table_can_be_made():
    for name in OBJECTIVES:
        objective = make_objective(compose_config("head-binary", ["dataset.path=a.json", f"trainer.objective={name}"]))
        assert type(objective).__module__ == f"vlm.train.objectives.{name}"
        assert isinstance(objective, Objective)


def test_objectives_are_known_before_torch_is():
    modules = [path.partition(":")[0] for path in OBJECTIVES.values()]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", run_names())
def test_runs_choose_the_objective_of_their_head_or_records(name: str):
    config = compose_config(name, ["dataset.path=a.json"])
    embeds = config.model.head.task == "embedding"
    kind = Embedding if embeds else Prediction if config.model.head.by_name else NAMED.get(name, Generation)
    kind = Preference if config.dataset.format == "preference" else kind
    objectives = {
        Embedding: "embedding", Prediction: "prediction", Distillation: "distillation", Generation: None,
        Preference: "preference",
    }  # fmt: skip
    assert config.trainer.objective == objectives[kind]
    assert type(make_objective(config)) is kind


@pytest.mark.parametrize("head", HEADS)
def test_a_head_brings_its_objective(head: str):
    config = compose_config("pretrain-smol", ["dataset.path=a.json", f"model/head={head}"])
    assert config.model.head.task == head
    assert config.trainer.objective == ("embedding" if head == "embedding" else "prediction")
    without = compose_config("head-binary", ["dataset.path=a.json", f"model/head={head}", "model/head=none"])
    assert type(make_objective(without)) is Generation


def test_a_head_without_an_objective_is_trained():
    """As a YAML of the user's own may name one, and as runs recorded it before there were objectives."""
    config = compose_config("pretrain-smol", ["dataset.path=a.json", "model.head.task=regression"])
    assert config.trainer.objective is None
    assert type(make_objective(config)) is Prediction
    assert make_objective(config).training_keys() == {"head": "model.head.task=regression"}
    assert config.trainer.objective == "prediction", "the run directory records it"


@pytest.mark.parametrize(
    ("run", "overrides", "message"),
    [
        ("pretrain-smol", ["trainer.objective=other"],
         r"other: allowed are generation, distillation, prediction, embedding, preference, or package.module"),
        ("pretrain-smol", ["trainer.objective=no_such:Mine"],
         r"trainer.objective=no_such:Mine: No module named 'no_such'"),
        ("pretrain-smol", ["trainer.objective=json:Mine"],
         r"trainer.objective=json:Mine: module 'json' has no attribute"),
        ("pretrain-smol", ["trainer.objective=json:JSONDecoder"],
         r"trainer.objective=json:JSONDecoder: a subclass of vlm.train.objectives.base:Objective is needed"),
        ("pretrain-smol", ["trainer.objective=prediction"],
         r"trainer.objective=prediction: there is no head; choose one"),
        ("head-binary", ["trainer.objective=generation"],
         r"model.head.task=binary: trainer.objective=generation trains no head; leave one of them out"),
    ],
)  # fmt: skip
def test_wrong_objectives_are_refused(tmp_path: Path, run: str, overrides: list[str], message: str):
    (tmp_path / "a.json").write_text("[]")
    config = compose_config(run, [f"dataset.path={tmp_path / 'a.json'}", *overrides])
    with pytest.raises(ConfigError, match=message):
        check_config(config)


# An objective of the user's own

Z_LOSS = '''
from vlm.train.objectives.generation import Generation

WEIGHT = 0.01


class ZLoss(Generation):
    """Replies, with normalisers of the vocabulary's logits kept near 1 (PaLM, arXiv:2204.02311, section 5)."""

    def refusals(self):
        """Yield what a run cannot have with it."""
        yield from super().refusals()
        if self.config.trainer.packing:
            yield "trainer.packing=true: trainer.objective=z_loss:ZLoss is for padded batches; leave it out"

    num_losses = 0

    def training_metrics(self, trainer):
        """Return how many losses there were since the last log."""
        number, self.num_losses = self.num_losses, 0
        return {"losses": number}

    def token_losses(self, logits, targets):
        """Return the losses of tokens, and what the normalisers add."""
        return super().token_losses(logits, targets) + WEIGHT * logits.float().logsumexp(dim=-1).square()

    def compute_loss(self, trainer, model, inputs, num_items_in_batch):
        """Return the loss of a batch, and count it."""
        self.num_losses += 1
        return super().compute_loss(trainer, model, inputs, num_items_in_batch)

    def evaluate(self, trainer, dataset):
        """Return the metrics of text generation and one more."""
        return {**super().evaluate(trainer, dataset), "answer": 42.0}
'''
EVALUATED = ["dataset.eval_split=0.25", "trainer.eval_strategy=epoch", "trainer.num_train_epochs=1"]


def test_an_objective_of_the_users_own_trains(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "z_loss.py").write_text(Z_LOSS)
    plain = train("pretrain-smol", tmp_path / "plain", *EVALUATED)
    folder = train("pretrain-smol", tmp_path / "run", *EVALUATED, "trainer.objective=z_loss:ZLoss")
    assert losses(folder)[0] > losses(plain)[0] + 0.01
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(line["eval_answer"] for line in logged if "eval_loss" in line) == 42
    assert [line["losses"] for line in logged if "loss" in line] == [1] * len(losses(folder))
    assert (folder / "final" / "model.safetensors").is_file()
    assert (folder / "samples.md").is_file()
    assert "objective: z_loss:ZLoss" in (folder / "config.yaml").read_text()


def test_an_objective_of_the_users_own_refuses(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "z_loss.py").write_text(Z_LOSS)
    config: RunConfig = compose_config(
        "finetune-smol", [*common, "trainer.objective=z_loss:ZLoss", "trainer.packing=true"]
    )
    with pytest.raises(ConfigError, match="z_loss:ZLoss is for padded batches"):
        check_config(config)
