"""Liger's kernels are put where they belong; they themselves need a GPU."""

import pytest
import torch

from tests.tiny_parts import Parts
from vlm.train.liger import use_liger

pytest.importorskip("liger_kernel", reason="the extra liger is not installed")


def test_the_inner_language_model_is_changed(parts: Parts):
    model, _ = parts.model("clip", "llama")
    changed = use_liger(model, {"rope": False})
    assert "model.layers.0.mlp" in changed
    assert "model.norm" in changed
    assert not any("forward" in vars(module) for module in model.visual_encoder.modules())


@pytest.mark.gpu
def test_the_kernels_compute_the_same(parts: Parts):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, _ = parts.model("clip", "llama")
    torch.nn.Module.to(model, "cuda")
    ids = torch.arange(8, device="cuda")[None]
    plain = model(input_ids=ids).logits
    use_liger(model, {"rope": False})
    torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=1e-4, rtol=1e-4)


def test_a_language_model_that_liger_does_not_know_is_an_error(parts: Parts):
    model, _ = parts.model("clip", "phi")
    with pytest.raises(ValueError, match="Liger knows nothing of model_type=phi"):
        use_liger(model, None)
