"""Adapters on parts that are stored in 4 or 8 bits, on the CPU as bitsandbytes does it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import vlm
from tests.command_line import refusal
from tests.fixtures import byte_tokenizer, losses
from tests.tiny_parts import picture
from tests.train.test_lora import adapted, logits
from vlm.assembly import quantization
from vlm.assembly.adapter_base import BASE_FILE
from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from vlm.assembly.adapter_merge import merge
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.quantization import make_quantization_config
from vlm.cli.main import main
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS
from vlm.train.lora import is_adapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `quant`)"
)

QLORA = [
    "trainer.lora.language_model.r=4",
    "trainer.learning_rate.language_model_learning_rate=1e-2",
    "trainer.num_samples=0",
    "trainer.max_steps=4",
    "trainer.save_strategy=steps",
    "trainer.save_steps=2",
]
STARTS = [(kind, start) for kind in ("4bit", "8bit") for start in ("parts", "checkpoint")]


def quantised(model: Any) -> set[str]:
    """Names of the weights that are stored as whole numbers."""
    return {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model whose rows have a whole number of blocks, as bitsandbytes' CPU code needs them in 4 bits."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, **shape,
        )
    ).save_pretrained(folder)  # fmt: skip
    return f"model.language_model.hf_name={folder}"


@pytest.fixture(scope="module")
def pretrained(train: Callable[..., Path], wide: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint to start from."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    return train("pretrain-smol", folder, wide, "trainer.max_steps=1", "trainer.num_samples=0") / "final"


@pytest.fixture(scope="module", params=STARTS, ids=lambda param: " ".join(param))
def run(
    request: pytest.FixtureRequest, train: Callable[..., Path], pretrained: Path, wide: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str, list[str]]:  # fmt: skip
    """A run with a quantised language model, its kind and its overrides."""
    kind, start = request.param
    words = [*QLORA, f"model.language_model.quantization={kind}"]
    words += [wide, f"trainer.from_pretrained={pretrained}"] if start == "checkpoint" else [wide]
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "qlora", *words), kind, words


def test_adapters_learn_on_a_quantised_language_model(run: tuple[Path, str, list[str]]):
    folder, _, _ = run
    first, *_, last = losses(folder)
    assert last < first
    held = load_file(folder / "checkpoint-2" / TRAINED_WEIGHTS)
    assert all(is_adapter(name) or name.startswith("connector.") for name in held)
    assert "quantization" not in (folder / "final" / "config.json").read_text().replace('"quantization": null', "")


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: tuple[Path, str, list[str]], train: Callable[..., Path], tmp_path: Path
):
    folder, _, words = run
    resumed = train("pretrain-smol", tmp_path, *words, f"trainer.resume_from_checkpoint={folder / 'checkpoint-2'}")
    assert losses(resumed) == losses(folder)[2:]
    for name in (ADAPTER_WEIGHTS, NON_LORA_WEIGHTS):
        torch.testing.assert_close(load_file(resumed / "final" / name), load_file(folder / "final" / name))


def test_the_adapter_is_merged_into_the_base_in_full(run: tuple[Path, str, list[str]], tmp_path: Path):
    """Loaded on the quantised base, it says nearly what it says in full; merged into the full one, the same."""
    final, kind, _ = run[0] / "final", run[1], run[2]
    processor = vlm.VLMProcessor.from_pretrained(final)
    in_full, in_bits = (
        open_checkpoint(final).load_model(merge=False),
        open_checkpoint(final).load_model(quantization={"language_model": kind}),
    )
    assert not quantised(in_full)
    assert all(name.startswith("language_model.") and "lm_head" not in name for name in quantised(in_bits))
    assert len(quantised(in_bits)) == len(adapted(in_bits))
    wanted, rough = logits(in_full, processor), logits(in_bits, processor)
    assert 0 < (wanted - rough).abs().max() < 0.3 * wanted.abs().max()
    merge(str(final), tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert not quantised(whole)
    torch.testing.assert_close(logits(whole, processor), wanted, rtol=0, atol=1e-5)


def test_a_quantised_encoder_beside_a_connector_leaves_what_it_trained(
    train: Callable[..., Path], wide: str, tmp_path: Path
):
    """No adapter at all: the result still lies on its base, since quantised weights are no checkpoint."""
    run = train(
        "pretrain-smol", tmp_path / "run", wide, "model.visual_encoder.quantization=8bit",
        "model.language_model.quantization=8bit", "trainer.max_steps=2", "trainer.num_samples=1",
    )  # fmt: skip
    assert (run / "final" / BASE_FILE).is_file()
    assert not (run / "final" / ADAPTER_WEIGHTS).exists()
    merge(str(run / "final"), tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    trained = load_file(run / "final" / NON_LORA_WEIGHTS)
    for name, parameter in whole.connector.named_parameters():
        torch.testing.assert_close(parameter.data, trained[f"connector.{name}"])


@pytest.mark.parametrize("option", ["--load-4bit", "--load_8bit"])
def test_generate_quantises(
    run: tuple[Path, str, list[str]], pretrained: Path, tmp_path: Path, option: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    loaded: list[Any] = []
    generate = vlm.VisionLanguageModel.load
    monkeypatch.setattr(vlm.VisionLanguageModel, "load", lambda *a, **k: loaded.append(generate(*a, **k)) or loaded[-1])
    picture().save(tmp_path / "a.png")
    for checkpoint in (pretrained, run[0] / "final"):
        words = ["--image", str(tmp_path / "a.png"), "--prompt", "what?", "--max-new-tokens", "3"]
        main(["generate", str(checkpoint), *words, option])
        assert capsys.readouterr().out.endswith("\n")
        held = quantised(loaded.pop().model)
        assert held
        assert all(name.startswith("language_model.") for name in held)


def test_the_absence_of_bitsandbytes_is_said(monkeypatch: pytest.MonkeyPatch, pretrained: Path):
    monkeypatch.setattr(quantization, "find_spec", lambda name, *_: None)
    said = refusal("generate", str(pretrained), "--prompt", "a", "--load-4bit")
    assert said == "vlm generate: quantization 4bit: bitsandbytes is not installed: pip install 'small-vlm[quant]'"


def test_a_device_that_it_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantization.torch.accelerator, "current_accelerator", lambda: torch.device("mtia"))
    with pytest.raises(ValueError, match="bitsandbytes cannot use this machine's mtia; it can use "):
        make_quantization_config("4bit")
