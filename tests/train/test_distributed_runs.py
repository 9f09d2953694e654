"""Two ranks on the CPU: ZeRO-2 and ZeRO-3 reach the single process's losses, also as DeepSpeed's launcher starts them.

Their `final` is that of the single process: names and shapes of weights, and where replies end.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors import safe_open

from tests.families.tiny_families import save_family
from tests.fixtures import losses
from tests.forked import Ended, find_free_port, run_forked, run_ranks
from tests.train.checkpoints.test_manifest import DAMAGES, flip_a_bit
from vlm.train.checkpoints.find import find_problems_together
from vlm.train.checkpoints.manifest import MANIFEST, list_files, read_manifest

FINETUNE = [
    "trainer.learning_rate.language_model_learning_rate=1e-3",
    "trainer.num_train_epochs=2",
    "trainer.train_sampling_strategy=sequential",
    "trainer.eval_strategy=epoch",
    "trainer.save_strategy=steps",
    "trainer.save_steps=3",
]


@pytest.fixture(scope="module")
def pretrained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that every run here begins with."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "pretrain", "trainer.max_steps=1") / "final"


@pytest.fixture(scope="module")
def single(train: Callable[..., Path], pretrained: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same finetuning in one process."""
    folder = tmp_path_factory.mktemp("runs") / "single"
    return train("finetune-smol", folder, *FINETUNE, *start(pretrained, world))


def start(pretrained: Path, world: Path) -> list[str]:
    return [f"trainer.from_pretrained={pretrained}", f"dataset.eval_path={world / 'records.json'}"]


def describe_final(run: Path, folder: str = "final") -> tuple[dict[str, list[int]], dict[str, object]]:
    """Return names and shapes of the weights in `final`, and its generation settings."""
    with safe_open(run / folder / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - no mapping
    return shapes, json.loads((run / folder / "generation_config.json").read_text())


def part_updates(run: Path) -> dict[tuple[int, str], float]:
    """The gradient norm and the update of each part at each step; there are some of each."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(line["step"], key): line[key] for line in lines for key in line if "_norm/" in key}
    assert {key for _, key in found} == {
        f"{kind}_norm/{part}" for kind in ("grad", "update") for part in ("connector", "language_model")
    }
    return found


def launch(words: list[str], module: str = "vlm") -> None:
    """Run two ranks to their end: as DeepSpeed's launcher does, without its two new interpreters."""
    check_ended(run_ranks(module, words))


def check_ended(ended: list[Ended]) -> None:
    """Fail, with what the process wrote, where one did not end well."""
    for done in ended:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


RECORD_RANK = """
import json, os, pathlib, sys

pathlib.Path(os.environ["RANKS"], os.environ["RANK"]).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
"""
"""Writes down the words and the environment that a launcher gives a rank."""


def launch_deepspeed(words: list[str], module: str = "vlm") -> None:
    """Run two ranks to their end with the words and the environment of DeepSpeed's own launcher; nothing is compiled.

    The launcher starts new interpreters, which only write down what they were given; the ranks are forked.
    """
    with TemporaryDirectory() as compiled, TemporaryDirectory() as ranks, TemporaryDirectory() as code:
        Path(code, "recorded_rank.py").write_text(RECORD_RANK)
        launcher = ["--num_gpus", "2", "--master_port", str(find_free_port()), "--module", "recorded_rank", *words]
        environment = {
            "TORCH_EXTENSIONS_DIR": compiled, "RANKS": ranks, "PYTHONPATH": prepend(code, "PYTHONPATH"),
            "PATH": prepend(str(Path(sys.executable).parent), "PATH"),
        }  # fmt: skip
        (done,) = run_forked(["-m", "deepspeed.launcher.runner", *launcher], environments=[environment])
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        recorded = [json.loads(path.read_text()) for path in sorted(Path(ranks).iterdir())]
        assert [environment["RANK"] for _, environment in recorded] == ["0", "1"]
        commands = [["-m", module, *given] for given, _ in recorded]
        check_ended(run_forked(*commands, environments=[environment for _, environment in recorded]))
        assert not os.listdir(compiled)


def prepend(folder: str, variable: str) -> str:
    """Return the folders of a variable of the environment, with one before them."""
    return os.pathsep.join([folder, *filter(None, [os.environ.get(variable)])])


@pytest.mark.parametrize(("stage", "start_ranks"), [("zero2", launch), ("zero3", launch_deepspeed)])
def test_two_ranks_reach_the_single_process(
    common: list[str], single: Path, pretrained: Path, world: Path, tmp_path: Path, stage: str,
    start_ranks: Callable[[list[str]], None],
):  # fmt: skip
    """Image and text-only rows mixed; losses, evaluation and the resumed second half are the same."""
    words = [
        "-cn", "finetune-smol", *common, *FINETUNE, *start(pretrained, world), f"trainer.deepspeed={stage}",
        f"trainer.output_dir={tmp_path}", "trainer.per_device_train_batch_size=4", "trainer.keep_best=eval_loss",
    ]  # fmt: skip
    start_ranks(words)
    assert describe_final(tmp_path, "best") == describe_final(single)
    assert losses(tmp_path) == pytest.approx(losses(single), abs=2e-4)
    assert part_updates(tmp_path) == pytest.approx(part_updates(single), rel=2e-2)
    assert describe_final(tmp_path) == describe_final(single)
    find_every_damage(tmp_path / "checkpoint-6")
    flip_a_bit(max(tmp_path.glob("checkpoint-6/*/*_optim_states.pt")))  # the last rank's; both take the one before
    shutil.rmtree(tmp_path / "final")
    launch(words)
    assert losses(tmp_path) == pytest.approx(losses(single), abs=2e-4)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        *("checkpoint-3", "checkpoint-6", "checkpoint-6.damaged")
    }


def find_every_damage(checkpoint: Path) -> None:
    """Damage a checkpoint's files one after the other, in every way; each is found, and mended again."""
    files = read_manifest(checkpoint).files
    assert len({name for name in files if name.endswith("_optim_states.pt")}) == 2  # each rank's
    assert {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "latest"} < set(files)
    assert {*files, MANIFEST} == set(list_files(checkpoint))
    for name in files:
        content = (checkpoint / name).read_bytes()
        for damage in DAMAGES.values():
            damage(checkpoint / name)
            assert [problem.split()[0] for problem in find_problems_together(checkpoint)] == [name]
            (checkpoint / name).write_bytes(content)
    assert find_problems_together(checkpoint) == []


WHOLE = [
    "trainer.max_steps=3", "trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false",
    "trainer.gradient_accumulation_steps=1", "trainer.train_sampling_strategy=sequential", "trainer.warmup_steps=0",
    "trainer.learning_rate.visual_encoder_learning_rate=1e-3", "dataset.max_length=512",
    "trainer.learning_rate.language_model_learning_rate=1e-3",
]  # fmt: skip


@pytest.mark.parametrize(
    "family", ["llava-onevision", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mllama", "qwen2.5-vl"))]
)
def test_families_on_two_ranks_reach_the_single_process(
    brief: list[str], train_whole: Callable[..., Path], tmp_path: Path, family: str
):
    """ZeRO-3, all parts training, rows of text only among them: tiles, loose patches, cross-attention."""
    model = tmp_path / family
    save_family(family, model)
    name = "finetune-llava-onevision"
    alone = train_whole(name, model, tmp_path / "single", *WHOLE, "trainer.deepspeed=null")
    words = ["-cn", name, *brief, *WHOLE, f"model.hf_name={model}", "trainer.deepspeed=zero3"]
    launch([*words, f"trainer.output_dir={tmp_path / 'two'}", "trainer.per_device_train_batch_size=4"])
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=5e-4)
    assert describe_final(tmp_path / "two") == describe_final(alone)


CONNECTORS = {
    "qformer": ["num_queries=4", "hidden_dim=16", "num_layers=2", "num_heads=2", "dropout=0"],
    "c_abstractor": ["num_queries=4", "hidden_dim=16", "num_blocks=1", "position_side=3"],
    "resampler": ["num_queries=4", "num_layers=1", "num_heads=2"],
}


@pytest.mark.parametrize(
    "connector", ["qformer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("c_abstractor", "resampler"))]
)
def test_connectors_on_two_ranks_reach_the_single_process(
    common: list[str], train: Callable[..., Path], tmp_path: Path, connector: str
):
    """ZeRO-3: learned queries and positions, which are no layer's own, are gathered too."""
    options = [f"model.connector.options.{option}" for option in CONNECTORS[connector]]
    words = [
        f"model/connector={connector}",
        *options,
        "trainer.max_steps=3",
        "trainer.train_sampling_strategy=sequential",
    ]
    alone = train("pretrain-smol", tmp_path / "single", *words)
    two = [f"trainer.output_dir={tmp_path / 'two'}", "trainer.deepspeed=zero3"]
    launch(["-cn", "pretrain-smol", *common, *words, *two, "trainer.per_device_train_batch_size=4"])
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=5e-4)
