"""FSDP2 on two ranks of the CPU: it computes what one process does, alone, packed, with adapters and with heads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import compose_config, head_words, losses
from tests.train.checkpoints.go_on import forget_after
from tests.train.test_distributed_runs import describe_final, launch, part_updates
from tests.train.test_lora_distributed import LORA
from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from vlm.assembly.checkpoint import open_checkpoint
from vlm.train.arguments import ShardedModelArguments, training_arguments

FSDP2 = ["trainer/sharding=fsdp2", "trainer.per_device_train_batch_size=4"]
RESUME = "trainer.resume_from_checkpoint=true"
FINETUNE = [
    "trainer.learning_rate.language_model_learning_rate=1e-3", "trainer.learning_rate.connector_learning_rate=1e-2",
    "trainer.weight_decay.language_model_weight_decay=0.1", "trainer.max_steps=4", "trainer.save_strategy=steps",
    "trainer.save_steps=2", "trainer.save_total_limit=5", "trainer.eval_strategy=epoch",
]  # fmt: skip
DEMANDING = [
    "model.visual_encoder.feature_layer=-2", "trainer.bf16=true", "trainer.activation_checkpointing=true",
    "trainer.packing=true", "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=2",
    "trainer.loss_average=micro_batch",
]  # fmt: skip


def test_two_ranks_reach_the_single_process_and_go_on_in_it(
    common: list[str], train: Callable[..., Path], world: Path, tmp_path: Path
):
    """Losses, evaluation and answers between, the names of `final`; the second half on two ranks, and on one."""
    finetune = [*FINETUNE, f"dataset.eval_path={world / 'records.json'}"]
    single = train("finetune-smol", tmp_path / "single", *finetune)
    two = tmp_path / "two"
    words = ["-cn", "finetune-smol", *common, *finetune, *FSDP2, f"trainer.output_dir={two}"]
    launch(words)
    assert losses(two) == pytest.approx(losses(single), abs=1e-4)
    assert part_updates(two) == pytest.approx(part_updates(single), rel=2e-2)
    assert describe_final(two) == describe_final(single)
    weights = load_file(two / "final" / "model.safetensors")
    torch.testing.assert_close(weights, load_file(single / "final" / "model.safetensors"), rtol=0, atol=1e-3)
    open_checkpoint(two / "final").load_model()
    forget_after(two, 2)
    launch([*words, RESUME])
    for name, again in load_file(two / "final" / "model.safetensors").items():
        assert torch.equal(again, weights[name]), name
    forget_after(two, 2)
    train("finetune-smol", two, *finetune, RESUME, "trainer.gradient_accumulation_steps=2",
          "trainer.per_device_train_batch_size=4")  # fmt: skip
    assert losses(two) == pytest.approx(losses(single), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], DEMANDING], ids=["plain", "demanding"])
def test_losses_are_those_of_zero3(common: list[str], tmp_path: Path, options: list[str]):
    """In bfloat16 ZeRO-3 rounds weights that FSDP2 keeps in float32 between steps."""
    for name, sharding in (("fsdp2", "trainer/sharding=fsdp2"), ("zero3", "trainer.deepspeed=zero3")):
        words = ["-cn", "finetune-smol", *common, *FINETUNE, "dataset.eval_split=0.2", FSDP2[1], *options, sharding]
        launch([*words, f"trainer.output_dir={tmp_path / name}"])
    tolerance = 2e-2 if options else 1e-4
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "zero3"), abs=tolerance)


@pytest.mark.slow
def test_demanding_runs_reach_unsharded_ones(common: list[str], tmp_path: Path):
    """Packed, checkpointed, accumulated, in bfloat16: as DistributedDataParallel computes it."""
    for name, sharding in (("fsdp2", "trainer/sharding=fsdp2"), ("ddp", "trainer/sharding=none")):
        words = ["-cn", "finetune-smol", *common, *FINETUNE, "dataset.eval_split=0.2", *DEMANDING, sharding]
        launch([*words, f"trainer.output_dir={tmp_path / name}"])
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "ddp"), abs=2e-2)


@pytest.mark.slow
def test_adapters_reach_the_single_process_and_go_on(common: list[str], train: Callable[..., Path], tmp_path: Path):
    base = train("pretrain-smol", tmp_path / "base", "trainer.max_steps=1") / "final"
    words = [*LORA, f"trainer.from_pretrained={base}"]
    single = train("pretrain-smol", tmp_path / "single", *words)
    two = tmp_path / "two"
    words = ["-cn", "pretrain-smol", *common, *words, *FSDP2, f"trainer.output_dir={two}"]
    launch(words)
    assert losses(two) == pytest.approx(losses(single), abs=1e-4)
    saved = {name: load_file(two / "final" / name) for name in (ADAPTER_WEIGHTS, NON_LORA_WEIGHTS)}
    for name, tensors in saved.items():
        torch.testing.assert_close(tensors, load_file(single / "final" / name), rtol=0, atol=5e-3)
    forget_after(two, 2)
    launch([*words, RESUME])
    for name, tensors in saved.items():
        torch.testing.assert_close(load_file(two / "final" / name), tensors, rtol=0, atol=0)
    open_checkpoint(two / "final").load_model()


@pytest.mark.slow
def test_heads_reach_the_single_process(
    common: list[str], train_head: Callable[..., Path], labelled: Path, tmp_path: Path
):
    """A frozen body that each rank has a share of, its hidden states computed at each step, and a connector."""
    for name, options in (("frozen", []), ("connector", ["trainer.unfreeze.train_connector=true"])):
        words = [
            *options, "dataset.cache_features=false", "trainer.max_steps=4", "trainer.eval_strategy=epoch",
            "trainer.train_sampling_strategy=sequential", "trainer.max_grad_norm=0", "dataset.test_split=0.16",
            "dataset.eval_split=0.2",
        ]  # fmt: skip
        single = train_head("head-classification", "colour", tmp_path / name, *words)
        two = tmp_path / f"{name}-two"
        words = [*common, *head_words(labelled, "colour"), *words, *FSDP2, f"trainer.output_dir={two}"]
        launch(["-cn", "head-classification", *words])
        assert losses(two) == pytest.approx(losses(single), abs=1e-4)


def test_one_process_has_nobody_to_share_with(common: list[str], train: Callable[..., Path], tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"trainer.sharding=fsdp2: it needs more than one process\. .*torchrun --nproc-per-node N"
    ):
        train("pretrain-smol", tmp_path / "run", "trainer.sharding=fsdp2")


def test_devices_never_get_the_whole_model(common: list[str], monkeypatch: pytest.MonkeyPatch):
    options = compose_config("pretrain-smol", [*common, "trainer.sharding=fsdp2"]).trainer
    monkeypatch.setattr(ShardedModelArguments, "world_size", 2)
    assert training_arguments(options).place_model_on_device is False
