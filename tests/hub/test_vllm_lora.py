"""Adapters for vLLM: its names, one rank and scale, what else trained in the base, and nothing that vLLM would drop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import refusal
from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS
from vlm.cli.main import main
from vlm.hub import vllm_lora
from vlm.hub.adapters import LoraDelta, read_adapter
from vlm.hub.vllm_lora import export_vllm_lora, write_adapter

RUN = [
    "model.visual_encoder.feature_layer=-2", "model.connector.options.input_norm=null",
    "trainer.learning_rate.language_model_learning_rate=1e-1", "trainer.max_steps=2", "trainer.num_samples=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from parts: LoRA on the language model, the connector as a whole."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    return train("pretrain-smol", folder, *RUN, "trainer.lora.language_model.r=4") / "final"


def copy_with(adapted: Path, folder: Path, **settings: Any) -> Path:
    """The same adapter with other settings."""
    folder.mkdir()
    for file in adapted.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    return folder


def test_base_and_adapter_are_the_checkpoint(adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["export", str(adapted), str(tmp_path / "served"), "--format", "vllm-lora"])
    said = capsys.readouterr().out
    command = f"vllm serve {tmp_path}/served/base --enable-lora --max-lora-rank 8 --lora-modules served={tmp_path}"
    assert command in said
    assert "base has 6 weights that this run trained besides: it is for this adapter alone" in said
    state = load_file(tmp_path / "served" / "adapter" / ADAPTER_WEIGHTS)
    layers = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in state}
    assert "language_model.model.layers.0.self_attn.q_proj" in layers
    assert all(name.startswith("language_model.model.layers.") for name in layers)
    settings = json.loads((tmp_path / "served" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["bias"], settings["peft_type"]) == (4, 4, "none", "LORA")
    assert sorted(settings["target_modules"]) == sorted(layers)


def test_an_adapter_that_is_not_the_checkpoints_is_refused(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The comparison at the end: an adapter of twice the size, under the right names."""

    def write_doubled(deltas: dict[str, LoraDelta], folder: Path) -> int:
        return write_adapter({n: LoraDelta(d.down, d.up * 2, d.scale) for n, d in deltas.items()}, folder)

    monkeypatch.setattr(vllm_lora, "write_adapter", write_doubled)
    with pytest.raises(ValueError, match="was not exported: base and adapter together have logits that differ by"):
        export_vllm_lora(str(adapted), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_ranks_and_scales_of_layers_become_one(tmp_path: Path):
    """Earlier versions of vLLM read neither `rank_pattern` nor `alpha_pattern`."""
    torch.manual_seed(0)
    names = [f"language_model.model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]
    ranks, scales = (2, 5), (3.0, 0.5)
    deltas = {
        name: LoraDelta(torch.randn(rank, 6), torch.randn(7, rank), scale)
        for name, rank, scale in zip(names, ranks, scales, strict=True)
    }
    assert write_adapter(deltas, tmp_path / "adapter") == 5
    found = read_adapter(tmp_path / "adapter").deltas
    for name, delta in deltas.items():
        assert found[name].down.shape == (5, 6)
        assert torch.allclose(found[name].add_to(torch.zeros(7, 6)), delta.add_to(torch.zeros(7, 6)), atol=1e-5)


def test_what_vllm_has_no_place_for_is_refused_by_name(adapted: Path, tmp_path: Path):
    out = ["--format", "vllm-lora"]
    dora = copy_with(adapted, tmp_path / "dora", use_dora=True)
    assert "use_dora=True" in refusal("export", str(dora), str(tmp_path / "out"), *out)
    everywhere = copy_with(adapted, tmp_path / "everywhere")
    state = load_file(everywhere / ADAPTER_WEIGHTS)
    name = next(name for name in state if name.endswith("q_proj.lora_A.weight"))
    for factor in "AB":
        tensor = state[name.replace("lora_A", f"lora_{factor}")]
        state[f"base_model.model.visual_encoder.encoder.layers.0.self_attn.q_proj.lora_{factor}.weight"] = tensor
        state[f"base_model.model.language_model.lm_head.lora_{factor}.weight"] = tensor.clone()
    save_file({key: tensor.clone() for key, tensor in state.items()}, everywhere / ADAPTER_WEIGHTS, {"format": "pt"})
    said = refusal("export", str(everywhere), str(tmp_path / "out"), *out)
    assert "1 adapted layers of the visual_encoder, such as visual_encoder.encoder.layers.0.self_attn.q_proj" in said
    assert "language_model.lm_head.weight is adapted: vLLM adapts q_proj" in said
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_an_adapter_and_options_without_effect(adapted: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "vlm"}')
    out = ["--format", "vllm-lora"]
    assert "has no adapter: --format vllm-lora" in refusal("export", str(tmp_path), str(tmp_path / "out"), *out)
    words = ["export", str(adapted), str(tmp_path / "out")]
    assert "--format llava exports complete" in refusal(*words, "--format", "llava", "--base", "x")
    assert "it goes with --format llava-original" in refusal(*words, *out, "--vision-tower", "x")
