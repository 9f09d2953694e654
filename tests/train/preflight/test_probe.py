"""A probe leaves nothing behind: a run with a preflight is the run without one, to the bit."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures import losses
from tests.train.preflight.conftest import WORDS
from vlm.checks.compose import open_mapping_key
from vlm.config.schema import RunConfig
from vlm.train.preflight.probe import MAX_TIMED, NUM_UNTIMED, batch_shape, quiet_config

SHORT = (*WORDS, "trainer.max_steps=3", "trainer.save_strategy=no")


def test_a_run_with_a_preflight_is_the_same_to_the_bit(train: Callable[..., Path], tmp_path: Path):
    plain = train("finetune-smol", tmp_path / "plain", *SHORT)
    inspected = train("finetune-smol", tmp_path / "inspected", *SHORT, open_mapping_key("preflight=true"))
    assert losses(inspected) == losses(plain)
    weights, same = (load_file(run / "final" / "model.safetensors") for run in (plain, inspected))
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert "What would go wrong" in (inspected / "preflight.html").read_text(encoding="utf-8")
    assert not (plain / "preflight.html").exists()


def test_a_probe_saves_evaluates_and_answers_nothing(config: RunConfig, tmp_path: Path):
    probing = quiet_config(config, tmp_path)
    assert probing.trainer.output_dir == str(tmp_path)
    assert (probing.trainer.save_strategy, probing.trainer.eval_strategy, probing.trainer.num_samples) == (
        "no",
        "no",
        0,
    )
    assert probing.trainer.max_steps == NUM_UNTIMED + MAX_TIMED
    assert config.trainer.output_dir is None  # the run's own configuration stays


def test_the_shape_of_a_batch_is_what_its_memory_depends_on():
    labels = torch.full((2, 7), -100)
    labels[:, 5:] = 3
    row = {"input_ids": torch.zeros(2, 7), "labels": labels, "pixel_values": torch.zeros(3, 3, 8, 8)}
    shape = batch_shape(row)
    assert (shape.rows, shape.tokens, shape.images, shape.supervised, shape.lengths) == (2, 7, 3, 4, ())
    assert batch_shape({**row, "cu_seq_lens_q": torch.tensor([0, 3, 7])}).lengths == (3, 4)
