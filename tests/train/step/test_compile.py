"""Compilation by regions: a run learns what it learns without, few things are compiled, and names stay."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.compiler import reset

from tests.fixtures import losses
from tests.models.test_modeling_vlm import batch
from tests.tiny_parts import Parts
from vlm.assembly.packed_attention import use_packed_attention
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.train.step.compile import compile_layers, force_eager, repeated_layers

SHORT = ["trainer.max_steps=4", "trainer.num_samples=1", "trainer.save_strategy=steps", "trainer.save_steps=2"]
COMPILED = ["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"]
"""What is traced and differentiated as usual, but run without generated code, which takes minutes to build.

`eager` traces alone: enough to count what is compiled, in a third of the time.
"""
ROWS = (
    ["<image> what is it?", "two <image> and <image>"],
    ["<image> one, with a good many more words behind it than the others have", "<image>"],
    ["<image> one"],
    ["no picture", "nor here, in more words"],
    ["<image> as long", "<image> as long"],
)
"""Batches of every form: padded or not, of one row or several, with pictures or without."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled before and after."""
    reset()
    counters.clear()
    yield
    reset()


def arguments(**given: Any) -> Any:
    values = {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": None, **given}
    return SimpleNamespace(**values)


def models(parts: Parts, *names: str, backend: str = "eager") -> tuple[Any, Any, Any]:
    """The same model as it is and to be compiled, and its processor."""
    (plain, processor), (compiled, _) = (parts.model(*names) for _ in range(2))
    args = arguments(torch_compile_backend=backend)
    before = list(compiled.state_dict())
    compile_layers(compiled, args)
    assert (args.torch_compile, args.torch_compile_backend) == (False, None)  # Trainer would compile the whole
    assert list(compiled.state_dict()) == before
    for model in (plain, compiled):
        model.visual_encoder.requires_grad_(False)
        model.train()
    return plain, compiled, processor


class Laid(Collator):
    """Gives a batch that is laid out already."""

    def __call__(self, samples: Any) -> dict[str, Any]:
        return dict(samples[0])


def batches(processor: Any, packed: bool) -> list[dict[str, Any]]:
    found = [batch(processor, rows) for rows in ROWS]
    if not packed:
        return found
    collate = PackingCollator(Laid(processor.tokenizer.pad_token_id))
    return [collate([one, *({} for _ in one["input_ids"][1:])]) for one in found]


def stepped(model: Any, inputs: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    packed = "cu_seq_lens_q" in inputs
    with use_packed_attention(model.config.get_text_config()) if packed else nullcontext():
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize(("packed", "checkpointed", "backend"), [(False, True, "eager"), (True, False, "aot_eager")])
def test_steps_of_all_lengths_are_the_same_and_compile_no_more(
    parts: Parts, packed: bool, checkpointed: bool, backend: str
):
    plain, compiled, processor = models(parts, backend=backend)
    if checkpointed:
        compiled.activation_checkpointing_enable()
    trained = [[one for one in model.parameters() if one.requires_grad] for model in (plain, compiled)]
    first, second = (torch.optim.SGD(parameters, 0.1) for parameters in trained)
    made = []
    for _ in range(2):
        for inputs in batches(processor, packed):
            assert stepped(compiled, inputs, second) == pytest.approx(stepped(plain, inputs, first), abs=1e-5)
        made.append(counters["stats"]["unique_graphs"])
    assert 0 < made[0] == made[1] <= 12
    assert not counters["recompile_limit"]


def test_layers_of_one_kind_share_what_is_compiled(parts: Parts):
    _, compiled, processor = models(parts)
    compiled(**batch(processor, ROWS[0]), use_cache=False)
    assert len(list(repeated_layers(compiled))) == 5
    assert counters["stats"]["unique_graphs"] == 2  # of the encoder's three layers, and of the language model's two


@pytest.mark.parametrize(("encoder", "language_model"), [("clip", "llama"), ("timm_vit", "gemma3")])
def test_the_layers_of_encoder_and_language_model_are_found(parts: Parts, encoder: str, language_model: str):
    model, _ = parts.model(encoder, language_model)
    found = list(repeated_layers(model))
    for part, number in ((model.visual_encoder, 3), (model.language_model, 2)):
        assert sum(any(one is layer for one in part.modules()) for layer in found) == number


def test_generation_compiles_nothing(parts: Parts):
    plain, compiled, processor = models(parts)
    inputs = {name: value for name, value in batch(processor, ROWS[2]).items() if name != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
    with force_eager():
        answer = compiled.eval().generate(**inputs, **options)
    assert torch.equal(answer, plain.eval().generate(**inputs, **options))
    assert not counters["stats"]


def test_what_cannot_be_compiled_so_is_refused():
    with pytest.raises(ValueError, match=r"torch_compile=true: this model has no repeated layers"):
        compile_layers(torch.nn.Linear(2, 2), arguments())
    with pytest.raises(
        ValueError, match=r"torch_compile_mode=reduce-overhead: it would record a graph for every length"
    ):
        compile_layers(torch.nn.Linear(2, 2), arguments(torch_compile_mode="reduce-overhead"))


def test_a_run_learns_the_same_and_resumes(train: Callable[..., Path], tmp_path: Path):
    plain = train("pretrain-smol", tmp_path / "plain", *SHORT)
    assert not counters["stats"]
    compiled = train("pretrain-smol", tmp_path / "compiled", *SHORT, *COMPILED)
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    weights = [load_file(run / "final" / "model.safetensors") for run in (plain, compiled)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    resumed = train(
        "pretrain-smol",
        tmp_path / "resumed",
        *SHORT,
        f"trainer.resume_from_checkpoint={compiled / 'checkpoint-2'}",
        "trainer.resume_changes=accept",
    )
    assert losses(resumed) == pytest.approx(losses(plain)[2:], abs=1e-5)


@pytest.mark.slow  # code is generated and built: minutes
def test_generated_code_learns_the_same(train: Callable[..., Path], tmp_path: Path):
    plain = train("pretrain-smol", tmp_path / "plain", *SHORT)
    compiled = train("pretrain-smol", tmp_path / "compiled", *SHORT, "trainer.torch_compile=true")
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)


@pytest.mark.slow  # DeepSpeed builds what it communicates with
def test_under_zero2(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = [*SHORT, "trainer.deepspeed=zero2", "trainer.bf16=false"]
    plain = train("pretrain-smol", tmp_path / "plain", *words)
    compiled = train("pretrain-smol", tmp_path / "compiled", *words, *COMPILED)
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
