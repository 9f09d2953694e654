"""The loss in chunks, in the call of the vocabulary head: values and gradients are those of whole logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families.test_family_packing import make_rows
from tests.families.tiny_families import TINY, save_family
from tests.logits import supervised_logits
from tests.tiny_parts import LANGUAGE_MODELS, Parts
from tests.train.step.test_packing import Ready, gradients, items
from vlm.assembly.family import load_family_config, load_family_model
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES
from vlm.models import text_loss
from vlm.models.text_loss import SupervisedScores, mean_loss, supervised_loss, token_losses


def check_chunks(model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> SupervisedScores:
    """Compare loss and gradients with those of whole logits."""
    model.train()
    plain = supervised_loss(*supervised_logits(model, batch), None)
    plain.backward()
    wanted = gradients(model)
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 3 * model.config.get_text_config().vocab_size)
    compute = SupervisedScores(model)
    losses, targets, outputs = compute(batch)
    assert compute.in_head
    assert "forward" not in vars(model.get_output_embeddings())
    assert outputs.logits is None
    assert losses.shape == targets.shape
    loss = mean_loss(losses, None)
    loss.backward()
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], atol=1e-6, rtol=1e-4, msg=key)
    return compute


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_composed_models_loss_in_chunks_is_the_loss(parts: Parts, name: str, monkeypatch: pytest.MonkeyPatch):
    model, processor = parts.model("clip", name)
    compute = check_chunks(model, Ready(processor)(items(processor)), monkeypatch)
    assert (compute.softcap is not None) == (name == "gemma2")


def load_tiny_family(name: str, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A family's model and a batch; `settings` are of its language model."""
    save_family(name, folder)
    config = load_family_config(str(folder))
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    model = load_family_model(str(folder), config, dtype=torch.float32)
    processor = load_family_processor(str(folder), FAMILIES[TINY[name].model_type])
    return model, dict(Collator.of(processor, dummy_image(processor))(make_rows(processor)))


@pytest.mark.parametrize("name", TINY)
def test_a_familys_loss_in_chunks_is_the_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, batch = load_tiny_family(name, tmp_path)
    check_chunks(model, batch, monkeypatch)


def test_logits_of_a_family_are_capped_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As those of PaliGemma 2; the model caps them itself afterwards."""
    model, batch = load_tiny_family("paligemma", tmp_path, final_logit_softcapping=0.5)
    assert check_chunks(model, batch, monkeypatch).softcap == 0.5
    assert model.config.get_text_config().final_logit_softcapping == 0.5
    with torch.no_grad():
        assert supervised_logits(model, batch)[0].abs().max() < 0.5


def test_a_cap_that_the_model_does_not_use_is_not_used_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, batch = load_tiny_family("gemma3", tmp_path, final_logit_softcapping=0.5)
    assert check_chunks(model, batch, monkeypatch).softcap is None


@pytest.mark.parametrize("fault", ["scaled", "cut", "without its head", "twice"])
def test_a_model_that_uses_its_head_in_another_way_is_found(parts: Parts, fault: str, monkeypatch: pytest.MonkeyPatch):
    model, processor = parts.model("clip", "llama")
    batch = Ready(processor)(items(processor))
    forward = type(model).forward

    def changed(self: Any, **inputs: Any) -> Any:
        if fault == "twice":
            forward(self, **inputs)
        outputs: Any = forward(self, **inputs)
        if fault == "scaled":
            outputs.logits = outputs.logits * 1.001
        elif fault == "cut":
            outputs.logits = outputs.logits[..., :-1]
        elif fault == "without its head":
            with torch.no_grad():
                outputs.logits = torch.zeros(len(outputs.logits), self.config.get_text_config().vocab_size)
        return outputs

    monkeypatch.setattr(type(model), "forward", changed)
    assert not SupervisedScores(model).prove(batch)


def test_a_batch_without_supervision_has_a_loss_of_zero_with_a_graph(parts: Parts):
    """Every rank runs the same backward pass, and decides the same."""
    model, processor = parts.model("clip", "llama")
    batch = Ready(processor)(items(processor))
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    compute = SupervisedScores(model)
    loss = mean_loss(compute(batch)[0], None)
    assert compute.in_head
    assert loss == 0
    loss.backward()
    assert gradients(model)


class LargestLogits(TorchDispatchMode):
    """Counts the rows of the largest tensor of logits that any operation makes, forward and backward."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.vocabulary, self.width, self.rows = vocabulary, width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                rows = tensor.numel() // self.vocabulary
                self.rows = max(self.rows, rows if rows != self.width else 0)  # not the weights
        return made


@pytest.mark.parametrize("kind", ["composed", "family"])
def test_no_tensor_of_all_positions_and_the_vocabulary_exists(
    kind: str, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if kind == "composed":
        model, processor = parts.model("clip", "llama")
        batch = Ready(processor)(items(processor))
    else:
        model, batch = load_tiny_family("qwen2.5-vl", tmp_path)
    text = model.config.get_text_config()
    number = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert number != text.hidden_size
    monkeypatch.setattr(text_loss, "MAX_LOGITS", text.vocab_size * 8)
    with LargestLogits(text.vocab_size, text.hidden_size) as counted:
        mean_loss(SupervisedScores(model)(batch)[0], None).backward()
    assert 0 < counted.rows <= 8
    with LargestLogits(text.vocab_size, text.hidden_size) as counted:
        mean_loss(token_losses(*supervised_logits(model, batch)), None).backward()
    assert counted.rows == number  # the count can tell


def test_several_scores_of_a_position_are_computed_at_once(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    model, processor = parts.model("clip", "llama")
    batch = Ready(processor)(items(processor))
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 3 * model.config.get_text_config().vocab_size)

    def score(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.stack([token_losses(logits, targets), logits.float().logsumexp(dim=-1)], dim=-1)

    with torch.no_grad():
        scores, targets, _ = SupervisedScores(model, score)(batch)
        torch.testing.assert_close(scores, score(supervised_logits(model, batch)[0], targets))


def test_logits_of_less_precision_are_widened_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 64)
    logits = torch.randn(10, 32, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.arange(10)
    loss = supervised_loss(logits, targets, None)
    loss.backward()
    wide = logits.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, targets)
    expected.backward()
    assert wide.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, wide.grad.bfloat16())


def test_another_score_needs_no_further_proof(parts: Parts):
    """An evaluation uses what was found out before training, caps included."""
    model, processor = parts.model("clip", "gemma2")
    batch = Ready(processor)(items(processor))
    compute = SupervisedScores(model, lambda logits, targets: logits[:, 0].float())
    with torch.no_grad():
        compute.prove(batch)
        other = compute.with_score(token_losses)
        assert (other.in_head, other.softcap) == (True, model.config.get_text_config().final_logit_softcapping)
        torch.testing.assert_close(other(batch)[0], token_losses(*supervised_logits(model, batch)))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_states_and_their_head_give_the_logits_of_supervised_positions(parts: Parts, name: str):
    model, processor = parts.model("clip", name)
    batch = Ready(processor)(items(processor))
    expected, _ = supervised_logits(model, batch)
    states, head = SupervisedScores(model).read_states(batch)
    assert states.shape == (len(expected), model.config.get_text_config().hidden_size)
    assert not states.requires_grad
    torch.testing.assert_close(head(states[2:4]), expected[2:4])
    assert "forward" not in vars(model.get_output_embeddings())


def test_states_of_a_model_that_changes_its_logits_are_these(parts: Parts):
    model, processor = parts.model("clip", "llama")
    batch = Ready(processor)(items(processor))
    expected, _ = supervised_logits(model, batch)
    scores = SupervisedScores(model)
    scores.in_head = False
    states, head = scores.read_states(batch)
    torch.testing.assert_close(head(states), expected)


def test_further_rows_go_with_their_positions(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """In the head's call and outside of it, in chunks, also when they are computed again for the gradient."""
    model, processor = parts.model("clip", "llama")
    batch = Ready(processor)(items(processor))
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 3 * model.config.get_text_config().vocab_size)
    sizes: list[int] = []

    def score(logits: torch.Tensor, targets: torch.Tensor, row: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        assert torch.equal(row, targets)
        assert torch.equal(pair, torch.stack([targets, targets], dim=1))
        sizes.append(len(row))
        return token_losses(logits, targets)

    for in_head in (True, False):
        scores = SupervisedScores(model, score)
        scores.in_head = in_head
        losses, _, _ = scores(batch, aligned=(targets, torch.stack([targets, targets], dim=1)))
        losses.sum().backward()
    assert max(sizes) <= 3
    assert sum(sizes) == 4 * len(targets)
