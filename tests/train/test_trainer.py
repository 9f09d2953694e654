"""Loss averages, parameter groups and evaluation of the Trainer subclass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fixtures import compose_config, losses
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.data.batching.collator import Collator
from vlm.train.arguments import deepspeed_config, training_arguments
from vlm.train.objectives.table import make_objective
from vlm.train.parts import freeze, make_parts, parameter_groups, table


@pytest.fixture
def built(common: list[str]):
    """Configuration, model and data of a finetuning run."""
    config = compose_config(
        "finetune-smol", [*common, "trainer.learning_rate.language_model_learning_rate=1e-4",
                          "trainer.weight_decay.connector_weight_decay=0.1"],
    )  # fmt: skip
    model_config, processor = resolve_model(config)
    model = load_weights(config, model_config, processor, torch.float32, 42)
    args = training_arguments(config.trainer)
    data = make_objective(config).load_data(model_config, processor, args).train
    return config, model, processor, data


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_loss_averages(built, train: Callable[..., Path], tmp_path: Path, average: str):
    """`token` divides by the step's supervised tokens, `micro_batch` averages the micro-batches' means."""
    _, model, processor, data = built
    collate = Collator(processor.tokenizer.pad_token_id)
    model.eval()
    means, counts = [], []
    with torch.no_grad():
        for start in (0, 3):
            batch = collate([data[i] for i in range(start, start + 3)])
            batch["pixel_values"] = processor.normalise(batch["pixel_values"])
            counts.append(int((batch["labels"] != -100).sum()))
            means.append(model(**batch).loss.item())
    assert counts[0] != counts[1]
    expected = {
        "token": sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts),
        "micro_batch": sum(means) / 2,
    }
    folder = train(
        "finetune-smol", tmp_path, f"trainer.loss_average={average}", "trainer.train_sampling_strategy=sequential",
        "trainer.per_device_train_batch_size=3", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=1",
        "trainer.learning_rate.language_model_learning_rate=1e-4", "trainer.num_samples=0",
    )  # fmt: skip
    assert losses(folder)[0] == pytest.approx(expected[average], abs=1e-5)
    assert expected["token"] != pytest.approx(expected["micro_batch"], abs=1e-5)


def test_every_trainable_parameter_is_in_exactly_one_group(built):
    config, model, _, _ = built
    parts = make_parts(model, config.trainer, config.model)
    freeze(parts)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {name for name in names.values() if not name.endswith("bias") and "norm" not in name}
    groups = parameter_groups(parts, decayed)
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert not any(name.startswith("visual_encoder.") for name in grouped)
    by_name = {group["name"]: group for group in groups}
    assert by_name["connector.decay"]["weight_decay"] == 0.1
    assert by_name["connector.no_decay"]["weight_decay"] == 0.0
    assert by_name["connector.decay"]["lr"] == 1e-3
    assert by_name["language_model.decay"]["lr"] == 1e-4


def test_a_deepspeed_configuration_is_packaged_or_a_json_file(tmp_path: Path):
    """A JSON file may be indented by tabs, which YAML does not read."""
    (tmp_path / "own.json").write_text('{\n\t"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}\n}')
    assert deepspeed_config(str(tmp_path / "own.json")) == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}
    }
    assert deepspeed_config("zero3")["zero_optimization"]["stage"] == 3  # pyright: ignore[reportOptionalSubscript]
    assert deepspeed_config(None) is None


def test_deepspeed_shares_out_no_tokens_of_a_sample():
    with pytest.raises(ValueError, match=r"trainer.deepspeed.sequence_parallel_size=2: ranks split samples"):
        deepspeed_config({"sequence_parallel_size": 2})


def test_the_table_shows_each_part(built):
    config, model, _, _ = built
    config.model.connector.name = "two-layers"
    parts = make_parts(model, config.trainer, config.model)
    freeze(parts)
    shown = table(parts).splitlines()
    assert [line.split()[0] for line in shown[2:]] == ["visual_encoder", "connector", "language_model", "total"]
    count = sum(parameter.numel() for parameter in model.connector.parameters())
    assert shown[3].split()[1:] == ["two-layers", f"{count:,}", f"{count:,}", "0.001", "0.1"]
    assert shown[2].split()[1] == config.model.visual_encoder.hf_name
    assert shown[2].split()[3:] == ["0", "-", "-"]
