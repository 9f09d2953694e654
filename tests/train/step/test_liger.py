"""Liger's kernels are put where they belong; they themselves need a GPU.

Liger changes classes of transformers for the whole process, so each test has one of its own.
"""

import sys

import pytest
import torch

from tests import waiting
from tests.forked import Ended, run_forked
from tests.tiny_parts import Parts
from vlm.train.step.liger import apply_liger_kernels

pytest.importorskip("liger_kernel", reason="the extra liger is not installed")

BEGIN = """
import sys
import torch
from pathlib import Path
from tests.tiny_parts import Parts
from vlm.train.step.liger import apply_liger_kernels

model, _ = Parts(Path(sys.argv[1])).model("clip", sys.argv[2])
"""
CHANGED = """
changed = apply_liger_kernels(model, {"rope": False})
assert "model.layers.0.mlp" in changed, changed
assert "model.norm" in changed, changed
assert not any("forward" in vars(module) for module in model.visual_encoder.modules())
"""
SAME = """
torch.nn.Module.to(model, "cuda")
ids = torch.arange(8, device="cuda")[None]
plain = model(input_ids=ids).logits
apply_liger_kernels(model, {"rope": False})
torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=1e-4, rtol=1e-4)
"""


def done(parts: Parts, language_model: str, code: str) -> Ended:
    """Run code in a process of its own, and return how it ended."""
    (ended,) = run_forked(["-c", BEGIN + code, str(parts.root), language_model])
    return ended


def test_the_inner_language_model_is_changed(parts: Parts):
    found = done(parts, "llama", CHANGED)
    assert found.returncode == 0, found.stderr


@pytest.mark.gpu
def test_the_kernels_compute_the_same(parts: Parts):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = waiting.run([sys.executable, "-c", BEGIN + SAME, str(parts.root), "llama"])
    assert found.returncode == 0, found.stderr


def test_a_language_model_that_liger_does_not_know_is_an_error(parts: Parts):
    found = done(parts, "phi", "apply_liger_kernels(model, None)")
    assert "ValueError: trainer.use_liger_kernel=true: Liger has no kernel for model_type=phi" in found.stderr


@pytest.mark.parametrize("name", ["cross_entropy", "fused_linear_cross_entropy"])
def test_its_losses_are_refused(parts: Parts, name: str):
    model, _ = parts.model("clip", "llama")
    with pytest.raises(ValueError, match=rf"liger_kernel_config\.{name}=true: the loss is computed only at supervised"):
        apply_liger_kernels(model, {name: True})
