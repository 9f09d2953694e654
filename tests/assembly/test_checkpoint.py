"""Opening checkpoints: what each is, the refusals, and that no other module asks for the classes of models."""

from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_parts import Parts
from vlm.assembly.checkpoint import CheckpointKind, open_checkpoint
from vlm.assembly.model_kinds import (
    is_composed_config,
    is_composed_model,
    is_prediction_model,
)
from vlm.assembly.resolve import resolve_model
from vlm.config.model_schema import HeadsConfig
from vlm.config.schema import RunConfig
from vlm.models import VLMForPrediction, VLMPredictionConfig


@pytest.fixture(scope="module")
def composed(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its processor."""
    folder = tmp_path_factory.mktemp("composed")
    model, processor = parts.model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def heads_on(parts: Parts) -> VLMForPrediction:
    body = parts.model()[0]
    head = {"name": "label", "task": "binary", "labels": ["no", "yes"], "loss": "bce"}
    return VLMForPrediction(VLMPredictionConfig(body_config=body.config, heads=[head]), body)


# What a checkpoint is


def test_a_composed_checkpoint_is_one(composed: Path):
    checkpoint = open_checkpoint(composed)
    assert checkpoint.kind is CheckpointKind.COMPOSED
    assert checkpoint.body_config is checkpoint.config
    assert not checkpoint.has_heads
    assert is_composed_model(checkpoint.load_model())
    with pytest.raises(ValueError, match=f"{composed} has no prediction heads: ask it with vlm generate"):
        checkpoint.check_heads(expected=True)


def test_a_checkpoint_with_heads_is_one(parts: Parts, composed: Path, tmp_path: Path):
    heads_on(parts).save_pretrained(tmp_path)
    parts.model()[1].save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind is CheckpointKind.PREDICTION
    assert checkpoint.has_heads
    assert is_composed_config(checkpoint.body_config)
    assert is_prediction_model(checkpoint.load_model())
    assert checkpoint.load_processor().image_token_id == open_checkpoint(composed).load_processor().image_token_id
    with pytest.raises(ValueError, match="has prediction heads: ask it with vlm predict"):
        checkpoint.check_heads(expected=False)
    with pytest.raises(ValueError, match="such a checkpoint is loaded as it is, not quantised"):
        checkpoint.load_model(quantization={"language_model": "4bit"})


# Refusals


def test_what_is_no_checkpoint_is_refused_with_what_to_do(composed: Path, tmp_path: Path):
    """With the option that named it, where there is one."""
    for name in ("/no/such", "./a/b", "nothing"):
        with pytest.raises(ValueError, match=rf"^{name}: no such folder \(seen from .*\), nor a name on the Hub$"):
            open_checkpoint(name)
    with pytest.raises(ValueError, match=rf"^key={tmp_path} has no config.json; the complete model of a run is in its"):
        open_checkpoint(tmp_path, key="key")
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match=rf"it is a run directory, and its model is {tmp_path / 'final'}$"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=f"base=elsewhere: {composed} is a complete model; it needs no base"):
        open_checkpoint(composed).load_model(base_paths=["elsewhere"])


@pytest.mark.parametrize("kind", ["composed", "heads"])
def test_a_checkpoint_that_lacks_weights_is_refused(parts: Parts, tmp_path: Path, kind: str):
    """They would be drawn at random."""
    model = parts.model()[0] if kind == "composed" else heads_on(parts)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "connector" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks {len(weights) - len(kept)} of the weights that VLMFor"):
        open_checkpoint(tmp_path).load_model()


def test_another_model_is_refused(parts: Parts):
    with pytest.raises(ValueError, match="model_type=llama: it has no visual encoder"):
        open_checkpoint(parts.language_model("llama"))


def test_a_class_that_a_checkpoint_alone_names_is_not_imported(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that goes on from it names the class itself."""
    (tmp_path / "imported_by_name.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    model, processor = parts.model()
    recipe = parts.recipe()
    recipe.head = HeadsConfig(task="binary", type="imported_by_name:Head", labels=["no", "yes"])
    head = {"name": "label", "task": "binary", "labels": ["no", "yes"], "loss": "bce", "type": recipe.head.type}
    config = VLMPredictionConfig(body_config=model.config, heads=[head], recipe=asdict(recipe))
    config.save_pretrained(tmp_path / "heads")
    processor.save_pretrained(tmp_path / "heads")
    body = {f"body.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(body, tmp_path / "heads" / "model.safetensors", {"format": "pt"})
    run = RunConfig()
    run.trainer.from_pretrained = str(tmp_path / "heads")
    run.model.head.task = "binary"
    with pytest.raises(ValueError, match=r"model.head.type=imported_by_name:Head: allowed are .* once you have named"):
        resolve_model(run)
    with pytest.raises(ValueError, match=r"model.head.type=imported_by_name:Head"):
        open_checkpoint(tmp_path / "heads").load_model()
