"""Learning from a teacher: the loss is the plain one, live and kept logits agree, and runs resume exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.families.tiny_families import save_family
from tests.fixtures import check_config, compose_config, losses
from tests.tiny_parts import Parts
from tests.train.distillation.distillation_runs import (
    EVALUATED,
    KEY,
    STATES,
    STUDENT,
    VOCABULARY,
    save_narrow,
    train_teacher,
)
from vlm.assembly.adapter_folder import NON_LORA_WEIGHTS
from vlm.assembly.checkpoint import Checkpoint, open_checkpoint
from vlm.checks.fields import ConfigError
from vlm.data.feature_cache.store import FORMAT_FILE
from vlm.models import text_loss
from vlm.runs.read import RunDirectory
from vlm.train.distillation.data import TEACHER_ROWS
from vlm.train.distillation.divergences import encode_rows
from vlm.train.distillation.teacher import Teacher
from vlm.train.objectives.distillation import Distillation
from vlm.train.trainer import VLMTrainer


@pytest.fixture(scope="module")
def teacher(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned model of the tiny parts."""
    return train_teacher(train, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def distil(train: Callable[..., Path], teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    """`distil(name, *overrides)` runs to its end, with a cache of this test's own."""

    def start(name: str, *overrides: str) -> Path:
        words = [*STUDENT, f"{KEY}.teacher={teacher}", f"dataset.cache_dir={tmp_path / 'cache'}", *overrides]
        return train("distil-smol", tmp_path / name, *words)

    return start


@pytest.fixture(scope="module")
def narrow(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model half as wide as the teacher's, with the same tokenizer."""
    return save_narrow(world, tmp_path_factory.mktemp("narrow"))


def logged(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


# The loss


def small_batch(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of tokens without images, some of them supervised, one row padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.get_text_config().vocab_size - 1, (2, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, 2:5] = labels[1, 7:] = -100
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def objective_of(parts: Parts, teacher: Any, **options: object) -> Distillation:
    """An objective whose teacher is open, as `load_data` leaves it."""
    words = [f"{KEY}.{name}={value}" for name, value in options.items()]
    objective = Distillation(compose_config("distil-smol", ["dataset.path=x", *words]))
    objective.teacher = object.__new__(Teacher)
    objective.teacher.args = SimpleNamespace(bf16=False, fp16=False, deepspeed=None, device=torch.device("cpu"))
    scores = text_loss.SupervisedScores(teacher)
    objective.teacher.__dict__ |= {"model": teacher, "scores": scores, "processor": None}
    objective.vocabulary, objective.shares_inputs = teacher.config.get_text_config().vocab_size, True
    return objective


@pytest.fixture(scope="module")
def pair(parts: Parts) -> tuple[Any, Any]:
    """A student and a teacher of another architecture with the same vocabulary."""
    return parts.model("clip", "llama")[0], parts.model("clip", "qwen2", seed=1)[0]


def plain_loss(student: Any, teacher: Any, batch: dict[str, Tensor], weight: float, temperature: float) -> Tensor:
    """The loss from whole logits, in a line each."""
    supervised = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = student(**inputs).logits[:, :-1][supervised]
    with torch.no_grad():
        p = (teacher(**inputs).logits[:, :-1][supervised] / temperature).softmax(-1)
    forward = (p * (p.log() - (own / temperature).log_softmax(-1))).sum(-1).mean()
    label = nn.functional.cross_entropy(own, batch["labels"][:, 1:][supervised])
    return weight * label + (1 - weight) * temperature**2 * forward


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [VOCABULARY, 3])
def test_loss_and_gradients_are_the_plain_ones(
    parts: Parts, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, chunk: int
):
    """In one chunk and in several; and of the teacher's logits, none at a position that is not supervised."""
    student, teacher = pair
    batch = small_batch(student)
    expected = plain_loss(student, teacher, batch, 0.3, 2.0)
    expected.backward()
    wanted = gradients(student)
    vocabulary = student.config.get_text_config().vocab_size
    monkeypatch.setattr(text_loss, "MAX_LOGITS", chunk * vocabulary)
    seen: list[int] = []
    linear = nn.functional.linear

    def counted(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is teacher.get_output_embeddings().weight:
            seen.append(given.numel() // given.shape[-1])
        return linear(given, weight, bias)

    objective = objective_of(parts, teacher, label_weight=0.3, temperature=2.0)
    objective.teacher.scores.in_head = True
    monkeypatch.setattr(nn.functional, "linear", counted)
    trainer = SimpleNamespace(model=student, processor=None)
    loss, _ = objective.compute_loss(trainer, student, batch, None)
    loss.backward()
    number = int((batch["labels"][:, 1:] != -100).sum())
    assert max(seen) <= min(chunk, number)
    assert sum(seen) == number * (1 if chunk == VOCABULARY else 2)  # once more in the backward pass
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = gradients(student)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_shifted_positions_would_be_seen(parts: Parts, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    student, teacher = pair
    batch = small_batch(student)
    with torch.no_grad():
        expected = plain_loss(student, teacher, batch, 0.3, 2.0)
    objective = objective_of(parts, teacher, label_weight=0.3, temperature=2.0)
    read = Teacher.read

    def shifted(self: Teacher, *given: Any, **named: Any) -> Any:
        found = read(self, *given, **named)
        return type(found)(found.states.roll(1, 0), found.head, found.image_features)

    monkeypatch.setattr(Teacher, "read", shifted)
    with torch.no_grad():
        loss, _ = objective.compute_loss(SimpleNamespace(model=student, processor=None), student, batch, None)
    assert abs(float(loss - expected)) > 1e-4  # the plain loss is met to 1e-5


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_kept_logits_of_the_whole_vocabulary_are_the_live_ones(parts: Parts, pair: tuple[Any, Any], divergence: str):
    student, teacher = pair
    batch = small_batch(student)
    trainer = SimpleNamespace(model=student, processor=None)
    live = objective_of(parts, teacher, label_weight=0, temperature=1.5, divergence=divergence)
    kept = objective_of(parts, teacher, label_weight=0, temperature=1.5, divergence=divergence, top_k=VOCABULARY)
    few = objective_of(parts, teacher, label_weight=0, temperature=1.5, divergence=divergence, top_k=8)
    read = live.teacher.read(batch, live.vocabulary)
    with torch.no_grad():
        found = []
        for objective in (live, kept, few):
            rows = encode_rows(read.head(read.states), objective.options.top_k or 1, 1.5)
            inputs = batch | ({TEACHER_ROWS: rows} if objective.options.top_k else {})
            found.append(float(objective.compute_loss(trainer, student, inputs, None)[0]))
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert found[2] < found[0]


def test_a_batch_without_a_supervised_token_has_a_loss_of_0(parts: Parts, pair: tuple[Any, Any]):
    student, teacher = pair
    batch = small_batch(student) | {"labels": torch.full((2, 9), -100)}
    for top_k in (0, 8):
        objective = objective_of(parts, teacher, top_k=top_k)
        loss, _ = objective.compute_loss(SimpleNamespace(model=student, processor=None), student, batch, 7)
        loss.backward()
        assert float(loss) == 0


# Runs


def test_runs_agree_however_the_teacher_is_asked(
    distil: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Padded and packed, live and kept; a cache that is there needs no weight of the teacher."""
    live = distil("live", *EVALUATED)
    terms = [logged(live, name) for name in ("loss", "label_loss", "divergence")]
    for loss, label, divergence in zip(*terms, strict=True):
        assert loss == pytest.approx(0.5 * label + 0.5 * 2**2 * divergence, abs=1e-3)
    (agreement,), (divergence,) = logged(live, "eval_agreement"), logged(live, "eval_divergence")
    assert 0 <= agreement <= 1
    assert divergence > 0
    packed = distil("packed", *EVALUATED, "trainer.packing=true")
    assert losses(packed) == pytest.approx(losses(live), abs=2e-4)
    found = [RunDirectory(folder) for folder in (live, packed)]
    of_records = [run.records_at(run.step) for run in found]
    assert of_records[0] is not None
    assert of_records[1] is not None
    assert of_records[0].records == of_records[1].records
    for name in ("loss", "blank_loss", "divergence", "agreement"):
        sums = [one.metrics[name] for one in of_records if one is not None]
        assert np.allclose(sums[0].sums, sums[1].sums, rtol=1e-2, atol=1e-2)
        assert sums[0].counts.tolist() == sums[1].counts.tolist()
    kept = distil("kept", *EVALUATED, f"{KEY}.top_k={VOCABULARY}")
    assert losses(kept) == pytest.approx(losses(live), abs=2e-3)
    assert logged(kept, "eval_divergence") == pytest.approx([divergence], abs=1e-3)
    assert logged(kept, "eval_agreement") == pytest.approx([agreement], abs=0.05)
    load = Checkpoint.load_model
    monkeypatch.setattr(Checkpoint, "load_model", lambda self, *args, **named: pytest.fail("it is loaded"))
    again = distil("again", *EVALUATED, f"{KEY}.top_k={VOCABULARY}")
    assert losses(again) == losses(kept)
    monkeypatch.setattr(Checkpoint, "load_model", load)
    stores = [len(list(tmp_path.glob(f"cache/teacher_logits/*/*/{FORMAT_FILE}")))]
    distil("other", *EVALUATED, f"{KEY}.top_k={VOCABULARY}", f"{KEY}.temperature=3")
    stores.append(len(list(tmp_path.glob(f"cache/teacher_logits/*/*/{FORMAT_FILE}"))))
    assert stores == [2, 4], "training and evaluation records; what another temperature makes of them"


@pytest.mark.parametrize("average", [pytest.param("token", marks=pytest.mark.slow), "micro_batch"])
def test_packed_steps_are_padded_ones(distil: Callable[..., Path], average: str):
    """With accumulation, states as targets, and both averages."""
    words = [*STATES, "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=4",
             f"trainer.loss_average={average}"]  # fmt: skip
    padded, packed = distil("padded", *words), distil("packed", *words, "trainer.packing=true")
    assert losses(packed) == pytest.approx(losses(padded), abs=2e-4)
    for name in ("hidden_state_loss", "image_feature_loss"):
        assert logged(packed, name) == pytest.approx(logged(padded, name), abs=1e-4)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let runs die in the middle of a step; returns what ends that."""
    original = VLMTrainer.training_step

    def dies(self: VLMTrainer, *args: Any, **named: Any) -> Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **named)

    monkeypatch.setattr(VLMTrainer, "training_step", dies)
    return lambda: monkeypatch.setattr(VLMTrainer, "training_step", original)


def test_a_killed_run_goes_on_exactly(distil: Callable[..., Path], narrow: Path, monkeypatch: pytest.MonkeyPatch):
    """With matrices that map states to a wider teacher, which checkpoints hold and finished models do not."""
    words = [*STATES, "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.max_steps=4"]
    words += [f"model.language_model.hf_name={narrow}"]
    whole = distil("whole", *words)
    mend = stop_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distil("killed", *words)
    mend()
    resumed = distil("killed", *words)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    expected, found = (load_file(folder / "final" / "model.safetensors") for folder in (whole, resumed))
    assert not [name for name in expected if "distillation" in name]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    held = load_file(resumed / "checkpoint-4" / "trained.safetensors")
    assert {name for name in held if "distillation" in name} == {
        f"distillation.{name}_loss.weight" for name in ("hidden_state", "image_feature")
    }
    open_checkpoint(whole / "final").load_model()


@pytest.mark.slow
def test_adapters_and_the_best_model_are_saved_without_matrices(distil: Callable[..., Path], narrow: Path):
    words = [
        *STATES, *EVALUATED, f"model.language_model.hf_name={narrow}", "trainer.lora.language_model.r=2",
        "trainer.unfreeze.train_language_model=false", "trainer.keep_best=eval_divergence",
        "trainer.save_strategy=epoch",
    ]  # fmt: skip
    run = distil("adapter", *words)
    for folder in (run / "final", run / "best"):
        assert not [name for name in load_file(folder / NON_LORA_WEIGHTS) if "distillation" in name]
        open_checkpoint(folder).load_model()


@pytest.mark.parametrize("top_k", [0, VOCABULARY])
def test_a_teacher_with_another_encoder_has_inputs_of_its_own(
    distil: Callable[..., Path], parts: Parts, monkeypatch: pytest.MonkeyPatch, top_k: int
):
    """Four tokens of an image in place of nine; what is compared are the same ids, one by one."""
    read, compared = Teacher.read, []

    def noted(self: Teacher, inputs: dict[str, Tensor], *given: Any, **named: Any) -> Any:
        compared.append(int((inputs["input_ids"] == self.processor.image_token_id).sum()) % 9)
        return read(self, inputs, *given, **named)

    monkeypatch.setattr(Teacher, "read", noted)
    words = [f"model.visual_encoder.hf_name={parts.encoder('dinov2')}", f"{KEY}.top_k={top_k}", *EVALUATED]
    folder = distil("run", *words, *(["trainer.packing=true"] if top_k else []))
    assert len(losses(folder)) == 3
    assert logged(folder, "eval_divergence")[0] > 0
    assert compared
    assert not any(compared)


def test_other_supervised_tokens_are_refused(distil: Callable[..., Path]):
    with pytest.raises(ValueError, match=r"records.json, record 0: record '0': the teacher's template and tokenizer"):
        distil("run", "dataset.template=plain")


def test_packed_rows_of_another_processor_are_refused(distil: Callable[..., Path], parts: Parts):
    words = [f"model.visual_encoder.hf_name={parts.encoder('dinov2')}", "trainer.packing=true"]
    with pytest.raises(ValueError, match=r"its ids, pixels or positions differ .* cache its logits"):
        distil("run", *words)


@pytest.mark.parametrize(
    "name", ["llava-1.5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-vl", "idefics3"))]
)
def test_families_learn_from_a_teacher(name: str, train_whole: Callable[..., Path], tmp_path: Path):
    """Two steps with every target, from a teacher that is the student: it has nothing to teach but labels."""
    save_family(name, tmp_path / "model")
    words = [
        f"{KEY}.teacher={tmp_path / 'model'}", *STATES, *STUDENT, "trainer.max_steps=2", "trainer.warmup_steps=0",
        "dataset.template=null", "dataset.max_length=2048", "trainer.per_device_train_batch_size=4",
    ]  # fmt: skip
    folder = train_whole("distil-smol", tmp_path / "model", tmp_path / "run", *words)
    names = ("divergence", "hidden_state_loss", "image_feature_loss")
    first, second = zip(*(logged(folder, term) for term in names), strict=True)
    assert max(first) < 1e-6
    assert min(second) > 0
    assert losses(folder)[0] == pytest.approx(0.5 * logged(folder, "label_loss")[0], abs=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"trainer.distillation.teacher=null: name the checkpoint to distil"),
        ([f"{KEY}.teacher=no/such/folder"], r"trainer.distillation.teacher=no/such/folder: no such folder"),
        ([f"{KEY}.teacher=a/b", f"{KEY}.label_weight=1"], r"label_weight=1: the teacher would have no effect"),
        ([f"{KEY}.teacher=a/b", f"{KEY}.top_k=8", f"{KEY}.hidden_states_weight=1"],
         r"top_k=8: states of the teacher are not cached"),
        ([f"{KEY}.teacher=a/b", "dataset.cache_features=true"], r"the teacher reads images in every step"),
        ([f"{KEY}.teacher=a/b", f"{KEY}.image_features_weight=1",
          "trainer.learning_rate.connector_learning_rate=null", "trainer.unfreeze.train_connector=false"],
         r"image_features_weight: a matrix that maps states of different widths"),
        ([f"{KEY}.teacher=a/b", f"{KEY}.divergence=l2"], r"allowed are forward, reverse, jensen_shannon"),
        ([f"{KEY}.teacher=a/b", f"{KEY}.temperature=0"], r"a number above 0 is needed"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(tmp_path: Path, overrides: list[str], message: str):
    (tmp_path / "a.json").write_text("[]")
    config = compose_config("distil-smol", [f"dataset.path={tmp_path / 'a.json'}", *overrides])
    with pytest.raises(ConfigError, match=message):
        check_config(config)
