"""Packed rows in training: no sample sees another, losses and gradients are those of the samples one by one."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.fixtures import check_config, compose_config, losses
from tests.logits import supervised_losses
from tests.tiny_parts import LANGUAGE_MODELS, Parts, picture
from vlm.assembly import packed_attention as attention
from vlm.assembly.packed_attention import use_packed_attention
from vlm.assembly.packed_rows import check_packing
from vlm.checks.fields import ConfigError
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.data.blank_images import dummy_image
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.evaluation.loss import row_losses
from vlm.models import text_loss
from vlm.models.text_loss import SupervisedScores
from vlm.train.objectives.generation import Generation

TEXTS = ("<image>a red circle and a blue square", "no picture here", "two: <image> and <image>, both red", "a")


def items(processor: Any) -> list[dict[str, Any]]:
    """Encoded texts; what follows the last image, or the first token, is supervised."""
    found, number = [], 0
    for text in TEXTS:
        ids = processor.tokenize(text)[0]
        seen = [picture(number + index) for index in range(text.count("<image>"))]
        number += len(seen)
        start = max([0, *(place for place, token in enumerate(ids) if token == processor.image_token_id)]) + 1
        labels = [IGNORE_INDEX] * start + ids[start:]
        pixels = processor.pixel_values(seen) if seen else None
        found.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return found


class Ready:
    """A collator's batches, a dummy image where they have none, with pixels as a model reads them."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.padded = Collator(processor.tokenizer.pad_token_id, dummy_image(processor))

    def __call__(self, samples: list[dict[str, Any]], *, packed: bool = False) -> dict[str, Any]:
        """Padded, or packed."""
        batch = (PackingCollator(self.padded) if packed else self.padded)(samples)
        return batch | {"pixel_values": self.processor.normalise(batch["pixel_values"])}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Those that there are, taken off the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def forward_one_by_one(
    model: Any, samples: list[dict[str, Any]], collate: Ready
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits at all supervised positions, and gradients of the summed loss, of samples in batches of their own."""
    logits = []
    for sample in samples:
        batch = collate([sample])
        outputs = model(**batch, num_items_in_batch=1)
        outputs.loss.backward()
        logits.append(outputs.logits.detach())
    return torch.cat(logits), gradients(model)


def packed(model: Any, samples: list[dict[str, Any]], collate: Ready) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same of samples in one row."""
    batch = collate(samples, packed=True)
    with use_packed_attention(model.config.get_text_config()):
        outputs = model(**batch, num_items_in_batch=1, use_cache=False)
        outputs.loss.backward()
    return outputs.logits.detach(), gradients(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_packed_row_is_its_samples_one_by_one(parts: Parts, name: str, attention: str):
    model, processor = parts.model("clip", name)
    if attention == "sdpa" and name == "gemma2":
        pytest.skip("transformers runs Gemma 2, whose attention is capped, in eager mode")
    model.language_model.set_attn_implementation(attention)
    model.train()
    collate = Ready(processor)
    if attention == "flex_attention":  # it knows no backward on a CPU, and compiling it takes a minute
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            batches = [collate([sample]) for sample in items(processor)]
            expected = torch.cat([model(**batch).logits for batch in batches])
            found = model(**collate(items(processor), packed=True), use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        return
    expected, wanted = forward_one_by_one(model, items(processor), collate)
    logits, found = packed(model, items(processor), collate)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    assert "connector.layers.0.weight" in found or any(key.startswith("connector.") for key in found)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], atol=1e-5, rtol=1e-4, msg=key)


def test_without_blocks_samples_leak(parts: Parts):
    """The comparison can fail: the same row, attended to as one sample, gives other logits."""
    model, processor = parts.model("clip", "llama")
    collate = Ready(processor)
    expected, _ = forward_one_by_one(model, items(processor), collate)
    batch = collate(items(processor), packed=True)
    leaking = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (leaking - expected).abs().max() > 1e-3


def test_the_look_before_training_finds_models_that_mix_samples(parts: Parts):
    model, processor = parts.model("clip", "llama")
    check_packing(model, processor)
    assert model.language_model.config._attn_implementation == "sdpa"

    class Mixing(torch.nn.Module):
        """Adds what stands before in a row, whosever it is, as a state space model does."""

        config = model.config
        device = model.device

        def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
            found = model(input_ids=input_ids, **inputs)
            found.logits = found.logits + found.logits.cumsum(1)
            return found

    with pytest.raises(ValueError, match="the logits of a sample depend on the sample before it"):
        check_packing(Mixing(), processor)


# Runs


def told(folder: Path, name: str) -> list[Any]:
    """What a run logged under a name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


BRIEF = ("trainer.learning_rate.language_model_learning_rate=1e-3", "trainer.num_samples=0")
PACKED = (*BRIEF, "trainer.packing=true", "trainer.max_tokens_per_batch=256")


@pytest.mark.parametrize("strategy", ["step", "best_fit"])
def test_a_resumed_packed_run_goes_on_where_it_was(train: Callable[..., Path], tmp_path: Path, strategy: str):
    words = (
        *PACKED, f"trainer.packing_strategy={strategy}", "trainer.per_device_train_batch_size=4",
        "trainer.train_sampling_strategy=random", "trainer.num_train_epochs=2", "trainer.save_strategy=steps",
        "trainer.save_steps=3",
        "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0",
    )  # fmt: skip
    whole = train("finetune-smol", tmp_path / "whole", *words)
    train("finetune-smol", tmp_path / "half", *words, "trainer.max_steps=3")
    half = train("finetune-smol", tmp_path / "half", *words)
    assert losses(half) == pytest.approx(losses(whole), abs=1e-6)


def test_a_run_computes_its_loss_in_pieces(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = train("finetune-smol", tmp_path / "plain", *PACKED, "trainer.max_steps=2")
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 5000)
    asked: list[int] = []
    token_losses = Generation.token_losses

    def watched(self: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(logits.numel())
        return token_losses(self, logits, targets)

    monkeypatch.setattr(Generation, "token_losses", watched)
    found = train("finetune-smol", tmp_path / "pieces", *PACKED, "trainer.max_steps=2")
    assert len(asked) > 10
    assert max(asked) <= 5000
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "trainer.packing_strategy=best_fit",  # the run groups samples
            "best_fit and trainer.train_sampling_strategy=group_by_modality_length: best_fit chooses the samples of a "
            "row",
        ),
        (
            ["dataset.streaming=true", "trainer.train_sampling_strategy=random"],
            "64: the lengths of a stream are not known in advance; at least dataset.max_length=2048",
        ),
        ("trainer.max_tokens_per_batch=0", "at least 1, or null, is needed"),
        (
            [
                "trainer.packing_strategy=best_fit",
                "trainer.train_sampling_strategy=random",
                "trainer.dataloader_drop_last=true",
            ],
            "there is no last batch to drop",
        ),
        ("dataset.streaming=true", "a stream cannot be grouped; choose random"),
        ("trainer.packing_strategy=tight", "allowed are step, best_fit"),
    ],
)
def test_what_does_not_go_with_packing_is_refused(common: list[str], word: str | list[str], message: str):
    further = [word] if isinstance(word, str) else word
    words = [*common, *BRIEF, "trainer.packing=true", "trainer.max_tokens_per_batch=64", "trainer.max_steps=2"]
    words += further
    with pytest.raises(ConfigError, match=message):
        check_config(compose_config("finetune-smol", words))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.max_tokens_per_batch=64", r"it needs trainer\.packing=true"),
        ("trainer.packing_strategy=best_fit", r"without trainer\.packing=true it has no effect"),
    ],
)
def test_settings_of_packing_are_refused_without_it(common: list[str], word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_config(compose_config("finetune-smol", [*common, "trainer.packing=false", word]))


@pytest.mark.parametrize("strategy", ["step", "best_fit"])
def test_a_stream_is_packed_without_what_cannot_be_used(
    train: Callable[..., Path], tmp_path: Path, world: Path, strategy: str
):
    """Records that are too long, or whose picture is missing, among the first ones."""
    records = json.loads((world / "records.json").read_text())
    records[1]["conversations"][1]["value"] = "blue " * 300
    records[2]["image"] = "missing.png"
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    words = ["dataset.streaming=true", f"dataset.path={path}", "dataset.max_length=128", "dataset.over_length=skip",
             "dataset.on_bad_sample=skip", "trainer.max_tokens_per_batch=null", "trainer.max_steps=2",
             "trainer.train_sampling_strategy=random", f"trainer.packing_strategy={strategy}"]  # fmt: skip
    assert len(losses(train("finetune-smol", tmp_path / "run", *PACKED, *words))) == 2


@pytest.mark.parametrize("strategy", ["step", "best_fit"])
def test_a_stream_whose_samples_may_be_longer_than_a_row_is_refused(
    train: Callable[..., Path], tmp_path: Path, strategy: str
):
    words = [
        f"trainer.packing_strategy={strategy}",
        "dataset.streaming=true",
        "dataset.max_length=null",
        "trainer.max_steps=2",
        "trainer.max_tokens_per_batch=99",
    ]
    with pytest.raises(ValueError, match=r"max_tokens_per_batch=99: a sample of the stream may have \d"):
        train("finetune-smol", tmp_path / "run", *PACKED, *words)


HALF = ("trainer.bf16=true", "trainer.max_steps=2")
NEW_ROWS = ("trainer.unfreeze.train_language_model=false", "model.language_model.new_tokens=['<here>']")


@pytest.mark.parametrize("further", [(), NEW_ROWS], ids=["all trains", "new tokens"])
def test_a_packed_run_in_half_precision_attends_in_it(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: tuple[str, ...]
):
    """What the kernel for samples of different lengths gets is in bfloat16, though rotations are in float32, and that
    it rounds otherwise than the one for single samples is no reason to refuse it."""
    seen = []

    def kernel(query: Any, key: Any, value: Any, sizes: Any, **options: Any) -> torch.Tensor:
        seen.append({query.dtype, key.dtype, value.dtype})
        groups = query.shape[1] // key.shape[1]
        wide = [query.double(), *(one.double().repeat_interleave(groups, dim=1) for one in (key, value))]
        rows = [torch.nn.functional.scaled_dot_product_attention(*(one[:, :, a:b] for one in wide), is_causal=True)
                for a, b in pairwise(sizes[0].tolist())]  # fmt: skip
        return torch.cat(rows, dim=2).transpose(1, 2).to(query.dtype)

    monkeypatch.setattr(attention, "_supports_varlen_kernel", lambda query: query.dtype == torch.bfloat16)
    monkeypatch.setattr(attention, "_varlen_attention", kernel)
    found = losses(train("finetune-smol", tmp_path / "run", *PACKED, *HALF, *further))
    assert len(found) == 2
    assert seen
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)


def test_logits_stay_in_half_precision_until_their_piece(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where the language model gives all of them at once; accelerate would widen all."""
    plain = train("finetune-smol", tmp_path / "plain", *PACKED, *HALF)
    monkeypatch.setattr(SupervisedScores, "prove", lambda self, inputs: False)
    seen = []
    token_losses = Generation.token_losses

    def watched(self: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return token_losses(self, logits, targets)

    monkeypatch.setattr(Generation, "token_losses", watched)
    found = train("finetune-smol", tmp_path / "run", *PACKED, *HALF)
    assert set(seen) == {torch.bfloat16}
    assert losses(found) == pytest.approx(losses(plain), abs=2e-2)


@pytest.mark.parametrize(
    ("settings", "handed_on", "refused"),
    [
        ({"sliding_window": 4}, None, True),
        ({"sliding_window": 4}, 4, False),
        ({"sliding_window": 16}, None, False),
        ({"sliding_window": 4, "use_sliding_window": False}, None, False),
        ({"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, None, False),
        ({"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]}, None, True),
        ({}, None, False),
    ],
)
def test_a_window_that_only_masks_know_is_refused(settings: dict[str, Any], handed_on: int | None, refused: bool):
    layer = torch.nn.Module()
    layer.config, layer.layer_idx = SimpleNamespace(**settings), 0  # pyright: ignore[reportAttributeAccessIssue]
    row = [torch.randn(1, 1, 9, 4) for _ in range(3)]
    packed = {"cu_seq_lens_q": torch.tensor([0, 6, 9]), "max_length_q": 6, "sliding_window": handed_on}
    refusal = pytest.raises(ValueError, match="only its masks limit, and a sample may have 6")
    with refusal if refused else nullcontext():
        attention.packed_attention(layer, *row, None, **packed)


def test_row_losses_are_those_of_all_logits(parts: Parts):
    """Evaluation, which stays padded, widens logits in pieces."""
    model, processor = parts.model("clip", "llama")
    batch = Ready(processor)(items(processor))
    with torch.no_grad():
        sums, counts = row_losses(supervised_losses(model, batch), batch["labels"])
        whole = model(**batch)
    torch.testing.assert_close(sums.sum() / counts.sum(), whole.loss)
