"""The trial of a run's family: what is refused, what may be done without, and what is known from an earlier run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.tiny_families import save_family
from tests.fixtures import check_config, compose_config
from vlm.assembly.family_trial import kept, table
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.verdicts import DisprovedError, NotProvableError, Verdicts, describe_unused, read_unused
from vlm.assembly.resolve import resolve_model
from vlm.checks.fields import ConfigError
from vlm.families.processing import FamilyProcessor
from vlm.train.family_trial import check_family, check_videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-Interleave."""
    root = tmp_path_factory.mktemp("family")
    save_family("llava-interleave", root)
    return root


@pytest.fixture(autouse=True)
def quick_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs that pass at once; the real ones are tested in `tests/assembly/family_trial`."""
    for name in table.PROOFS:
        monkeypatch.setitem(table.PROOFS, name, lambda subject: None)


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Callable[..., Verdicts]:
    """`start(*overrides)` tries the family of a run, with an empty cache at first."""

    def try_it(*overrides: str) -> tuple[str, ...]:
        words = ["dataset.path=x", f"model.hf_name={folder}", f"dataset.cache_dir={tmp_path}", *overrides]
        config = compose_config("finetune-llava-onevision", ["trainer.packing=false", *words])
        return check_family(config, *resolve_model(config))

    return try_it


def fail(subject: Subject) -> None:
    raise DisprovedError("the replies are not supervised")


def give_up(subject: Subject) -> None:
    raise NotProvableError("its template refuses images")


def test_a_failed_proof_refuses_the_run(start: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(table.PROOFS, "labels", fail)
    for words in ((), ("model.unproved=true",)):
        with pytest.raises(
            ValueError, match=r"model\.hf_name=.*model_type=llava\) failed its trial.*labels \(the repl"
        ):
            start(*words)


def test_a_proof_that_cannot_be_made_may_be_done_without(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(table.PROOFS, "labels", give_up)
    with pytest.raises(ValueError, match=r"could be proved.*labels \(its template refuses.*model\.unproved=true"):
        start()
    with caplog.at_level(logging.INFO, "vlm.train.family_trial"):
        start("model.unproved=true")
    assert "labels: not made: its template refuses images" in caplog.text
    monkeypatch.setitem(table.PROOFS, "labels", lambda subject: None)
    start()  # what was not proved is not kept


def test_packing_is_refused_where_samples_see_each_other(start: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(table.PROOFS, "packing", fail)
    start()
    with pytest.raises(ValueError, match=r"packing \(the replies.*trainer\.packing=false pads"):
        start("trainer.packing=true")


def test_what_no_reply_depends_on_reaches_the_run_from_a_new_and_from_a_kept_trial(
    start: Callable[..., Verdicts], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    forms = ("model.language_model.layers.*.indexer.", "model.gate")
    monkeypatch.setitem(table.PROOFS, "gradients", lambda subject: describe_unused(forms))
    with caplog.at_level(logging.INFO, "vlm.train.family_trial"):
        assert read_unused(start()) == forms
    assert "gradients: proved: no reply depends on model.language_model.layers.*.indexer., model.gate" in caplog.text
    monkeypatch.setattr(kept, "try_family", None)
    assert read_unused(start()) == forms


class Records:
    """Records that have videos or none."""

    def __init__(self, has_videos: bool):
        self.has_videos = has_videos


def test_videos_refuse_records_that_have_some(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(proof: Callable[[Subject], None], *words: str, has_videos: bool = True) -> None:
        monkeypatch.setitem(table.PROOFS, "videos", proof)
        names = [f"model.hf_name={folder}", f"dataset.cache_dir={tmp_path / proof.__name__}", "dataset.path=x"]
        config = compose_config("finetune-llava-onevision", ["trainer.packing=false", *names, *words])
        model_config, processor = resolve_model(config)
        records: Any = [Records(False), Records(has_videos)]
        check_videos(config, model_config, check_family(config, model_config, processor), records)

    start(fail, has_videos=False)
    for words in ((), ("model.unproved=true",)):
        with pytest.raises(
            ValueError,
            match=r"model_type=llava\): records have videos, but .*failed: the replies",
        ):
            start(fail, *words)
    with pytest.raises(ValueError, match=r"not made: its template.*frames as images.*model\.unproved=true trains"):
        start(give_up)
    start(give_up, "model.unproved=true")


def test_a_trial_is_kept(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    start()
    monkeypatch.setattr(kept, "try_family", None)
    with caplog.at_level(logging.INFO, "vlm.train.family_trial"):
        start()
    assert "Proved for llava, on a small model (known from an earlier trial): parts, gradients, labels" in caplog.text
    (file,) = tmp_path.glob("family_trials/*.json")
    assert '"labels": "proved"' in file.read_text()


def test_what_a_trial_depends_on_makes_another_one(folder: Path):
    config = compose_config("finetune-llava-onevision", ["dataset.path=x", f"model.hf_name={folder}"])
    model_config, processor = resolve_model(config)
    assert isinstance(processor, FamilyProcessor)
    digests = [kept.digest_trial(model_config, processor), kept.digest_trial(model_config, processor, "eager")]
    model_config.vision_feature_layer = -2
    digests.append(kept.digest_trial(model_config, processor))
    processor.chat_template = f"{processor.chat_template} "
    digests.append(kept.digest_trial(model_config, processor))
    assert len(set(digests)) == len(digests)
    model_config.name_or_path = "elsewhere"
    assert kept.digest_trial(model_config, processor) == digests[-1]


def test_a_composed_model_is_not_tried_and_the_key_is_refused():
    config = compose_config("pretrain-smol", ["dataset.path=tests", "model.unproved=true"])
    with pytest.raises(ConfigError, match=r"model\.unproved=true: it is for whole models"):
        check_config(config)
