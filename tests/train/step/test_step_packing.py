"""A packed step is the padded step: the same samples, loss, gradient and weights, whatever rows they lie in."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from torch.utils.data import DataLoader, RandomSampler, Sampler

from tests.families.tiny_families import save_family
from tests.fixtures import check_config, compose_config
from vlm.checks.fields import ConfigError
from vlm.checks.packing import packing_problems
from vlm.data.batching.collator import Collator
from vlm.data.batching.samplers import ModalityLengthSampler
from vlm.data.batching.step_layout import MICRO_BATCH, MORE_ROWS
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.train.step.step_packing import StepPacking, StepSampler, sample_costs, weigh_losses

# The samples of a step


def make_padded_loader(
    number: int, size: int, ranks: int, rank: int, sampling: str, *, drop_last: bool
) -> tuple[Any, np.ndarray]:
    """The loader that a run without packing has on one of several ranks, and the lengths of its samples."""
    lengths = np.random.default_rng(0).integers(20, 900, number)
    samples: Any = list(range(number))
    sampler: Sampler[int] = RandomSampler(samples)
    if sampling == "grouped":
        images = (lengths % 3 > 0).astype(int)
        sampler = ModalityLengthSampler(lengths.tolist(), images.tolist(), size * ranks, seed=3)
    loader = DataLoader(samples, size, sampler=sampler, drop_last=drop_last, collate_fn=list)
    options = {"num_processes": ranks, "process_index": rank, "use_seedable_sampler": True, "data_seed": 7}
    return prepare_data_loader(loader, **options), lengths


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sampling", ["random", "grouped"])
@pytest.mark.parametrize("number", [96, 97, 101, 47, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps_have_the_samples_that_they_have_without_packing(ranks: int, number: int, sampling: str, drop_last: bool):
    """Micro-batch by micro-batch, epoch by epoch, to the end of an epoch that does not come out even."""
    size, accumulation = 4, 3
    padded, packed = [], []
    for rank in range(ranks):
        loader, lengths = make_padded_loader(number, size, ranks, rank, sampling, drop_last=drop_last)
        padded.append(loader)
        other, _ = make_padded_loader(number, size, ranks, rank, sampling, drop_last=drop_last)
        packed.append(
            StepSampler(other.batch_sampler, lengths, lengths.astype(float), accumulation=accumulation, max_tokens=1500)
        )
    for epoch in (0, 1, 5):
        for sampler in (*padded, *packed):
            sampler.set_epoch(epoch)
        expected = [list(loader.batch_sampler) for loader in padded]
        laid_out = [list(sampler) for sampler in packed]
        assert [len(items) for items in laid_out] == [len(batches) for batches in expected]
        assert [len(sampler) for sampler in packed] == [len(loader) for loader in padded]
        for start in range(0, len(expected[0]), accumulation):
            steps = [batches[start : start + accumulation] for batches in expected]
            wanted = [
                (turn * ranks + rank, index)
                for rank, step in enumerate(steps)
                for turn, batch in enumerate(step)
                for index in batch
            ]
            items = [item for rank in laid_out for item in rank[start : start + accumulation]]
            found = [(micro_batch, index) for item in items for row in item for index, micro_batch in row]
            assert sorted(found) == sorted(wanted)


def test_a_sample_that_fits_into_no_row_is_refused():
    loader, lengths = make_padded_loader(8, 4, 1, 0, "random", drop_last=False)
    with pytest.raises(ValueError, match=r"does not fit into trainer.max_tokens_per_batch=100"):
        StepSampler(loader.batch_sampler, lengths, lengths.astype(float), accumulation=1, max_tokens=100)


def test_other_ways_to_share_batches_out_are_refused():
    args: Any = SimpleNamespace(world_size=2, accelerator_config={"dispatch_batches": True})
    collate: Any = SimpleNamespace(tokens=())
    packing: Any = StepPacking.__new__(StepPacking)
    packing.args, packing.collate = args, collate
    loader: Any = DataLoader(list(range(8)), 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"trainer.accelerator_config=.* packed steps need dispatch_batches=false"):
        packing.make_loader(loader, SimpleNamespace(lengths=[1] * 8, num_images=[0] * 8))


# Weights


def make_row(labels: list[int], micro_batches: list[int] | None) -> dict[str, Any]:
    row = {"labels": torch.tensor([labels])}
    return row if micro_batches is None else row | {MICRO_BATCH: torch.tensor([micro_batches])}


def alone(counts: torch.Tensor) -> torch.Tensor:
    return counts


def test_weights_make_the_mean_of_the_means():
    """Three micro-batches: of five supervised tokens, of one, of none."""
    args: Any = SimpleNamespace(world_size=1, process_index=0, device=torch.device("cpu"))
    batches = [
        make_row([-100, 1, 1, -100, 1], [0, 0, 0, 1, 1]) | {MORE_ROWS: [make_row([-100, 1, 1, -100], [0, 0, 0, 2])]},
        make_row([-100], None),
        make_row([7, 1, -100, -100], [0, 0, 1, 2]),  # nothing predicts the first token of a row
    ]
    assert int(weigh_losses(batches, "micro_batch", args, alone)) == 6
    (first, second), _, last = [batches[0], *batches[0][MORE_ROWS]], *batches[1:]
    assert first[LOSS_WEIGHTS].tolist()[0][1:3] == pytest.approx([6 / (5 * 3)] * 2)
    assert first[LOSS_WEIGHTS].tolist()[0][4] == pytest.approx(6 / (1 * 3))
    assert second[LOSS_WEIGHTS].tolist()[0][1] == last[LOSS_WEIGHTS].tolist()[0][1] == pytest.approx(6 / (5 * 3))
    assert all(MICRO_BATCH not in row for row in (first, second, last))


def test_tokens_are_counted_over_ranks_and_need_no_weights():
    args: Any = SimpleNamespace(world_size=2, process_index=1, device=torch.device("cpu"))
    batches = [make_row([-100, 1, 1], None)]  # of a stream: a micro-batch of this rank's own
    gathered = []

    def gather(counts: torch.Tensor) -> torch.Tensor:
        gathered.append(counts.tolist())
        return torch.cat([torch.tensor([[3, 0]]), counts])

    assert int(weigh_losses(batches, "token", args, gather)) == 5
    assert gathered == [[[0, 2]]]
    assert LOSS_WEIGHTS not in batches[0]


def test_costs_are_the_models_operations_or_those_of_its_width():
    config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64))
    assert sample_costs(None, config, None).token == 6 * 64
    assert sample_costs(None, config, None).pair == 1
    flops: Any = SimpleNamespace(token=3.0, pair=2.0, encoded=50.0, connected=5.0)
    assert sample_costs(flops, config, None).of(np.array([3]), np.array([2])).tolist() == [3 * 3 + 2 * 6 + 2 * 55]


# Runs

RUN = (
    "trainer.learning_rate.language_model_learning_rate=1e-2",
    "trainer.learning_rate.connector_learning_rate=1e-2",
    "trainer.num_samples=0",
    "trainer.optim=sgd",
    "trainer.max_grad_norm=0",
    "trainer.lr_scheduler_type=constant",
    "trainer.warmup_steps=0",
    "trainer.per_device_train_batch_size=5",
    "trainer.gradient_accumulation_steps=2",
    "trainer.save_strategy=no",
)
"""An epoch of three steps: of ten samples, of ten, of a micro-batch of four. Adam would magnify rounding."""


def read_steps(run: Path) -> list[list[float]]:
    """Loss, gradient norm and rate of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("loss", "grad_norm", "step", "epoch")] for line in lines if "loss" in line]


def read_speed(run: Path) -> dict[str, float]:
    """What the steps of a run had, all but the first."""
    return json.loads((run / "speed.json").read_text())["whole"]


def assert_equal_runs(packed: Path, padded: Path, number: int) -> None:
    """The same steps and the same model."""
    found, expected = read_steps(packed), read_steps(padded)
    assert len(expected) == number
    assert found == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in expected]
    weights = load_file(padded / "final" / "model.safetensors")
    for name, tensor in load_file(packed / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("average", "sampling", "most"),
    [
        ("micro_batch", "random", "null"),
        ("micro_batch", "group_by_modality_length", "150"),
        ("token", "random", "150"),
        ("token", "sequential", "null"),
    ],
)
def test_a_packed_run_is_the_padded_run(
    train: Callable[..., Path], tmp_path: Path, average: str, sampling: str, most: str
):
    words = (*RUN, f"trainer.loss_average={average}", f"trainer.train_sampling_strategy={sampling}")
    padded = train("finetune-smol", tmp_path / "padded", *words)
    packed = train(
        "finetune-smol", tmp_path / "packed", *words, "trainer.packing=true", f"trainer.max_tokens_per_batch={most}"
    )
    assert_equal_runs(packed, padded, 9)
    assert (packed / "first_batch.html").read_text().count(" tokens, ") > 1


MIXTURE = (
    "dataset.path=null",
    "dataset.sources.some.path={records}",
    "dataset.sources.twice.path={records}",
    "dataset.sources.twice.weight=2",
    "trainer.max_steps=4",
    "trainer.include_num_input_tokens_seen=non_padding",
    "dataset.max_length=120",
    "dataset.over_length=skip",
)


def test_mixtures_pack_too(train: Callable[..., Path], tmp_path: Path, world: Path):
    """Rows are made in data workers, and each token of them is counted."""
    mixture = [word.format(records=world / "records.json") for word in MIXTURE]
    words = (*RUN, *mixture, "trainer.loss_average=micro_batch", "trainer.train_sampling_strategy=random")
    padded = train("finetune-smol", tmp_path / "padded", *words)
    packed = train(
        "finetune-smol",
        tmp_path / "packed",
        *words,
        "trainer.packing=true",
        "trainer.max_tokens_per_batch=120",
        "trainer.dataloader_num_workers=2",
    )
    assert_equal_runs(packed, padded, 4)
    assert read_speed(packed)["tokens"] == read_speed(padded)["tokens"]
    assert read_speed(packed)["batches"] > read_speed(padded)["batches"]  # more rows than micro-batches
    assert read_speed(packed)["positions"] < read_speed(padded)["positions"]


@pytest.mark.parametrize("most", ["null", "200"])
def test_a_packed_stream_is_the_padded_stream(train: Callable[..., Path], tmp_path: Path, most: str):
    words = (
        *RUN,
        "dataset.streaming=true",
        "dataset.max_length=200",
        "trainer.max_steps=3",
        "trainer.loss_average=micro_batch",
        "trainer.train_sampling_strategy=random",
    )
    padded = train("finetune-smol", tmp_path / "padded", *words)
    packed = train(
        "finetune-smol", tmp_path / "packed", *words, "trainer.packing=true", f"trainer.max_tokens_per_batch={most}"
    )
    assert_equal_runs(packed, padded, 3)


def test_a_loss_in_pieces_is_weighed_too(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vlm.models import text_loss

    words = (*RUN, "trainer.loss_average=micro_batch", "trainer.max_steps=2")
    padded = train("finetune-smol", tmp_path / "padded", *words)
    monkeypatch.setattr(text_loss, "MAX_LOGITS", 5000)
    packed = train("finetune-smol", tmp_path / "packed", *words, "trainer.packing=true")
    assert_equal_runs(packed, padded, 2)


FAMILY = (
    *("trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false", "trainer.deepspeed=null"),
    "trainer.learning_rate.visual_encoder_learning_rate=1e-2",
    "dataset.max_length=512",
    "trainer.max_steps=2",
)


@pytest.mark.parametrize(
    ("family", "average"),
    [("qwen2.5-vl", "micro_batch"), ("qwen2.5-vl", "token"), ("llava-onevision", "micro_batch"), ("smolvlm", "token")],
)
def test_a_packed_family_is_the_padded_family(
    train_whole: Callable[..., Path], tmp_path: Path, family: str, average: str
):
    save_family(family, tmp_path / family)
    words = (*RUN, *FAMILY, f"trainer.loss_average={average}")
    name, model = "finetune-llava-onevision", tmp_path / family
    padded = train_whole(name, model, tmp_path / "padded", *words)
    packed = train_whole(name, model, tmp_path / "packed", *words, "trainer.packing=true")
    assert_equal_runs(packed, padded, 2)


# Objectives of a user's own


def test_an_objective_that_takes_no_weights_packs_token_averages_only(common: list[str]):
    config = compose_config("finetune-smol", [*common, "trainer.packing=true", "trainer.loss_average=micro_batch"])
    check_config(config)
    (problem,) = packing_problems(config, takes_loss_weights=False)
    assert "does not weight the losses of packed rows" in problem
    config.trainer.packing_strategy = "best_fit"
    config.trainer.train_sampling_strategy = "random"
    assert not list(packing_problems(config, takes_loss_weights=False))
    config.trainer.packing_strategy, config.trainer.loss_average = "step", "token"
    assert not list(packing_problems(config, takes_loss_weights=False))
    with pytest.raises(ConfigError, match="allowed are step, best_fit"):
        check_config(compose_config("finetune-smol", [*common, "trainer.packing_strategy=full"]))


def test_ranks_that_would_draw_orders_of_their_own_are_refused():
    """accelerate keeps the order of other samplers equal as the padded loader begins, which packed steps do not use."""
    samples: Any = SimpleNamespace(lengths=[5] * 8, num_images=[0] * 8)
    costs: Any = SimpleNamespace(of=lambda lengths, images: lengths.astype(float))
    args: Any = SimpleNamespace(world_size=2, gradient_accumulation_steps=1)
    packing = StepPacking(Collator(0), costs, None, "token", args, lambda tensor: tensor)
    loader = DataLoader(range(8), 2, shuffle=True)  # type: ignore[arg-type]
    options = {"num_processes": 2, "process_index": 0}
    with pytest.raises(
        ValueError, match="use_seedable_sampler=false: each rank would shuffle packed steps in its own order"
    ):
        packing.make_loader(prepare_data_loader(loader, use_seedable_sampler=False, **options), samples)
