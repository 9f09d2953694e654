"""Weights: missing, unexpected, misshapen, of another type, not finite; and what libraries raise has a name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from tests.tiny_parts import Parts
from vlm.assembly.loading import check_finite, check_weights, inspect_checkpoint, load_complete
from vlm.assembly.opening import opening

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(parts: Parts, tmp_path: Path) -> Path:
    """A language model in a folder of its own."""
    for file in parts.language_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path, **options: Any) -> torch.nn.Module:
    return load_complete(AutoModelForCausalLM, str(folder), config=AutoConfig.from_pretrained(folder), **options)


def test_a_whole_model_loads(llama: Path):
    assert torch.equal(load(llama).state_dict()[LAYER], load_file(llama / "model.safetensors")[LAYER])


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (None, rf"lacks 1 of the weights that LlamaForCausalLM needs: \['{LAYER}'\]"),
        (torch.ones(3, 4), rf": {LAYER} has the shape \(3, 4\), but LlamaForCausalLM needs \(48, 32\) by config.json"),
        (torch.ones(48, 32, dtype=torch.int64), rf": {LAYER} is of type I64; allowed are F16, BF16, F32, F64"),
        (torch.ones(48, 32, dtype=torch.uint8), rf"{LAYER} is of type U8 \(it is quantised, and config.json has no"),
        (torch.full((48, 32), float("nan")), rf": {LAYER} is NaN or infinite"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_models_are_refused_by_name(llama: Path, tensor: torch.Tensor | None, said: str):
    change(llama, **{LAYER: tensor})
    with pytest.raises(ValueError, match=rf"^{llama}:? ?{said}"):
        load(llama)


def test_names_and_shapes_are_compared_without_weights(llama: Path):
    change(llama, **{LAYER: None})
    with pytest.raises(ValueError, match=rf"lacks 1 of the weights that LlamaForCausalLM needs: \['{LAYER}'\]"):
        check_weights(AutoModelForCausalLM, str(llama), AutoConfig.from_pretrained(llama))


def test_what_a_run_adds_may_be_missing(llama: Path):
    change(llama, **{LAYER: None})
    load(llama, new=[LAYER])


def test_unexpected_weights_are_refused_and_buffers_that_are_computed_are_not(llama: Path):
    change(llama, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(llama)
    change(llama, **{"other.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"has other.weight, which LlamaForCausalLM does not have by config.json"):
        load(llama)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_causal_masks_that_were_saved_are_no_weights(tmp_path: Path, dtype: torch.dtype):
    config = GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    change(tmp_path, **{"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=dtype)})
    load(tmp_path)


def test_a_part_leaves_other_towers_and_heads_and_refuses_further_layers(llama: Path):
    change(llama, **{"text_tower.weight": torch.ones(2)})
    load(llama, is_part=True)
    change(llama, **{LAYER.replace("1", "2"): torch.ones(48, 32)})
    with pytest.raises(
        ValueError, match=r"has model.layers.2.mlp.up_proj.weight, which LlamaForCausalLM does not have"
    ):
        load(llama, is_part=True)
    load(llama, is_part=True, num_layers=3)


def test_layers_that_are_left_out_on_purpose_are_no_fault(parts: Parts):
    folder = parts.encoder("clip")
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    config.num_hidden_layers -= 1
    load_complete(AutoModel, str(folder), config=config, is_part=True, num_layers=config.num_hidden_layers + 1)


def test_a_configuration_that_claims_more_than_its_weights_costs_no_memory(llama: Path):
    config = AutoConfig.from_pretrained(llama)
    config.vocab_size = config.intermediate_size = 1 << 40
    with pytest.raises(ValueError, match=r"has the shape .*, but LlamaForCausalLM needs \(1099511627776, 32\)"):
        load_complete(AutoModelForCausalLM, str(llama), config=config)


def test_a_folder_without_a_configuration_is_left_to_the_caller(tmp_path: Path):
    assert inspect_checkpoint(str(tmp_path)) is None


def test_weights_that_lie_nowhere_are_not_looked_at_for_nan():
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^name: weight is NaN or infinite"):
        check_finite("name", model)
    check_finite("name", model.to("meta"))


class PanicException(BaseException):
    """Stands for what tokenizers raise where their Rust code panics."""


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("two\nlines"), OSError("gone"), PanicException("panic")])
def test_what_a_library_raises_names_the_checkpoint(error: BaseException):
    with (
        pytest.raises(ValueError, match=r"^folder: cannot open its tokenizer: ") as caught,
        opening("folder", "its tokenizer"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_a_refusal_that_names_the_checkpoint_and_what_ends_a_process_pass():
    with pytest.raises(ValueError, match=r"^folder lacks weights$"), opening("folder"):
        raise ValueError("folder lacks weights")
    with pytest.raises(KeyboardInterrupt), opening("folder"):
        raise KeyboardInterrupt


def test_a_fault_of_this_package_names_its_line():
    with (
        pytest.raises(ValueError, match=r"AttributeError: .* \(at vlm/assembly/loading.py:\d+; log level debug"),
        opening("x"),
    ):
        check_finite("name", 3)  # pyright: ignore[reportArgumentType] - the fault


def test_a_fault_of_a_library_names_no_line():
    with pytest.raises(ValueError, match=r"JSON object must be str[^()]*$"), opening("x"):
        json.loads(3)  # pyright: ignore[reportArgumentType] - the fault
