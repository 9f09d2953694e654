"""Images at native resolution on two ranks on the CPU: losses and weights of one process with both ranks' batches."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import losses
from tests.tiny_parts import Parts, picture
from tests.train.test_distributed_runs import launch

IMAGES = (
    [(40, 30)], [(20, 90), (24, 24)], [], [],  # the second rank has none
    [], [], [(70, 10)], [(16, 16), (33, 57)],  # the first rank has none
    [(24, 24)], [], [(64, 24)], [(40, 30), (17, 70), (30, 30)],
)  # fmt: skip
"""Widths and heights of the images of each record; a rank has two records a step."""
WORDS = [
    "trainer/unfreeze=all", "trainer.max_steps=3", "trainer.num_samples=0", "trainer.bf16=false",
    "trainer.train_sampling_strategy=sequential", "trainer.tf32=null", "trainer.warmup_steps=0",
    "trainer.save_strategy=no", "trainer.lr_scheduler_type=constant", "trainer.adam_epsilon=1e-3",
    "dataset.max_length=512",
    *(f"trainer.learning_rate.{part}_learning_rate=1e-2" for part in ("visual_encoder", "connector", "language_model")),
]  # fmt: skip
"""With a large epsilon, AdamW does not blow up the rounding of small gradients."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Records of several images, of one and of none."""
    folder = tmp_path_factory.mktemp("records")
    made = []
    for number, shapes in enumerate(IMAGES):
        names = [f"{number}-{place}.png" for place in range(len(shapes))]
        for place, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            picture(10 * number + place, shape).save(folder / name)
        question = {"from": "human", "value": "<image>\n" * len(names) + "what?"}
        turns = [question, {"from": "gpt", "value": "a cat " * (1 + number % 3)}]
        made.append({"id": str(number), "image": names, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(made))
    return [f"dataset.path={folder / 'records.json'}", f"dataset.image_folder={folder}"]


@pytest.fixture(scope="module")
def alone(
    train: Callable[..., Path], parts: Parts, records: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`alone(encoder, connector)`: the run in one process, whose micro-batches are those of both ranks."""
    made: dict[tuple[str, str], Path] = {}

    def run(encoder: str, connector: str) -> Path:
        if (encoder, connector) not in made:
            words = [*model_words(parts, encoder, connector), *records, *WORDS]
            folder = tmp_path_factory.mktemp("alone")
            made[encoder, connector] = train("finetune-smol", folder, *words, "trainer.per_device_train_batch_size=4")
        return made[encoder, connector]

    return run


def model_words(parts: Parts, encoder: str, connector: str) -> list[str]:
    """Overrides for the parts of the model."""
    own = {"resampler": ["num_queries=4", "num_layers=1", "num_heads=2"]}.get(connector, [])
    return [
        f"model.visual_encoder.hf_name={parts.encoder(encoder)}", f"model/connector={connector}",
        *(f"model.connector.options.{option}" for option in own), "dataset.image_mode=native",
    ]  # fmt: skip


QUICK = ("siglip2_naflex", "mlp", "zero3")


@pytest.mark.parametrize(
    ("encoder", "connector", "stage"),
    [
        pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow)
        for case in (
            *((*model, stage) for model in (("siglip2_naflex", "mlp"), ("qwen2_5_vl", "pixel_shuffle"))
              for stage in ("zero2", "zero3", "null")),
            ("qwen2_5_vl", "resampler", "zero3"), ("dinov2", "mlp", "zero2"), ("dinov2", "mlp", "null"),
        )
    ],
)  # fmt: skip
def test_two_ranks_reach_the_single_process(
    common: list[str], alone: Callable[[str, str], Path], parts: Parts, records: list[str], tmp_path: Path,
    encoder: str, connector: str, stage: str,
):  # fmt: skip
    """Ranks with images of other sizes and numbers, and without any; `null` is DistributedDataParallel."""
    single = alone(encoder, connector)
    launch([
        "-cn", "finetune-smol", *common, *model_words(parts, encoder, connector), *records, *WORDS,
        f"trainer.deepspeed={stage}", "trainer.per_device_train_batch_size=2", f"trainer.output_dir={tmp_path}",
    ])  # fmt: skip
    assert losses(tmp_path) == pytest.approx(losses(single), abs=2e-5)
    weights, expected = (load_file(run / "final" / "model.safetensors") for run in (tmp_path, single))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5, msg=name)


def test_weights_moved(alone: Callable[[str, str], Path]):
    """So that equal weights say something."""
    run = alone("siglip2_naflex", "mlp")
    assert len(set(losses(run))) == 3
