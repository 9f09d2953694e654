"""Tiny parts and records on disk, and a way to run a shipped run on them in this process.

The tests need no network, no GPU and no trained weights. `world` is one composition with its records, for runs;
`parts` has every kind of part, for contract tests. Runs leave out what costs a tiny one more than its steps do:
plots and the report, unless a test asks for them, waiting until the disk has a file, and counting equal models'
operations again, or proving again that they are loaded as they are saved.
"""

import gc
import json
import logging
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ["HF_HOME"] = CACHES = tempfile.mkdtemp(prefix="small-vlm-tests-")  # indices and counts go there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with redirect_stderr(sys.__stderr__):  # its handler closes the stream it found when Hydra sets logging up: pytest's own
    import absl.logging  # noqa: F401  (rouge-score imports it)

import pytest
import torch
from accelerate.utils import imports, memory
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests import once
from tests.tiny_parts import Parts
from vlm.assembly import encoders, loading, logit_proofs
from vlm.checks.compose import open_mapping_key
from vlm.checks.run import check
from vlm.checks.surface import named_by_user
from vlm.config import named
from vlm.config.named import permit_names
from vlm.config.packaged import group_names
from vlm.config.schema import RunConfig
from vlm.data.encoding.labels import read_template
from vlm.train import reporting
from vlm.train import run as run_module
from vlm.train.checkpoints.find import find_whole_checkpoint
from vlm.train.checkpoints.manifest import MANIFEST, Manifest, hash_file, list_files, read_manifest
from vlm.train.monitor import callbacks, peak_flops, speed
from vlm.train.monitor.plots import draw_loss, draw_speed
from vlm.train.objectives.table import make_objective
from vlm.train.run import run

torch.cuda._cached_device_count = torch.cuda.device_count()  # else the driver is asked at each step and operation

COLOURS = ("red", "blue", "green")

ConfigStore.instance().store(name="schema", node=RunConfig)


LONGEST_FIRST = (
    "tests/train/test_distributed_runs.py", "tests/train/test_lora_distributed.py", "tests/train/heads", "tests/train",
    "tests/test_examples.py", "tests/families", "tests/web", "tests/test_benchmarks.py", "tests/hub", "tests/models",
    "tests/assembly", "tests/evaluation", "tests/inference", "tests/cli",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that the workers of a parallel run end at about the same time."""

    def place(item: pytest.Item) -> int:
        path = item.nodeid.partition("::")[0]
        fitting = (number for number, start in enumerate(LONGEST_FIRST) if path.startswith(start))
        return next(fitting, len(LONGEST_FIRST))

    items.sort(key=place)


def pytest_collection_finish(session: Any) -> None:
    """Exempt what has been imported from garbage collection, which would walk it for half a second each time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # Python's own take a twelfth of the time
    gc.enable()


def pytest_sessionfinish(session: Any) -> None:
    """Remove what the tests cached, and let the collector have back what was kept from it."""
    gc.unfreeze()
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same chance for each test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def package_logs_as_the_root_does() -> None:
    """Undo what runs of earlier tests set: a run on a rank other than the first logs warnings alone, and stays so."""
    logging.getLogger("vlm").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Folders of tiny encoders and language models, each made when it is first asked for."""
    return Parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `visual_encoder`, `language_model`, `records.json` (24 records, 6 of text only) and `images`."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
    )
    CLIPVisionModel(vision).save_pretrained(root / "visual_encoder")
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(
        root / "visual_encoder"
    )
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / "language_model")
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(root / "language_model")
    (root / "images").mkdir()
    records = [record(index, root / "images") for index in range(24)]
    (root / "records.json").write_text(json.dumps(records))
    return root


def newest_checkpoint(run_directory: Path) -> Path:
    """The newest whole checkpoint of a run, which has one; later ones that are not whole are set aside."""
    checkpoint = find_whole_checkpoint(run_directory)
    assert checkpoint is not None
    return checkpoint


def reseal(checkpoint: Path) -> None:
    """Write a manifest of the files that a checkpoint has now, after a test has changed them."""
    manifest = read_manifest(checkpoint)
    files = {name: hash_file(checkpoint / name) for name in list_files(checkpoint) if name != MANIFEST}
    Manifest(manifest.step, manifest.world_size, files).write(checkpoint)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows ChatML."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(["what is in this picture? a red circle, a blue square"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = read_template("chatml")
    return tokenizer


def record(index: int, images: Path) -> dict:
    """A record of one plain colour; every fourth has no picture."""
    colour = COLOURS[index % 3]
    if index % 4 == 3:
        turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a circle" + " blue" * (index % 5)}]
        return {"id": str(index), "conversations": turns}
    Image.new("RGB", (30, 20 + index), colour).save(images / f"{index}.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat is in this picture?"},
        {"from": "gpt", "value": f"a {colour} square" * (1 + index % 2)},
    ]
    return {"id": str(index), "image": f"{index}.png", "conversations": turns}


@pytest.fixture(scope="session")
def common(world: Path, brief: list[str]) -> list[str]:
    """Overrides that put a shipped run on the tiny world."""
    return [
        f"model.visual_encoder.hf_name={world / 'visual_encoder'}",
        f"model.language_model.hf_name={world / 'language_model'}",
        *brief,
    ]


@pytest.fixture(scope="session")
def brief(world: Path) -> list[str]:
    """Overrides that give a shipped run the records of the tiny world, and little to do."""
    return [
        f"dataset.path={world / 'records.json'}",
        f"dataset.image_folder={world / 'images'}",
        "trainer.starts_from=null",
        "trainer.use_cpu=true",
        "trainer.logging_steps=1",
        "trainer.dataloader_num_workers=0",
        "trainer.packing=false",
        "trainer.per_device_train_batch_size=8",
        "trainer.learning_rate.connector_learning_rate=1e-3",
        "trainer.num_samples=2",
        "inference.max_new_tokens=3",
        "trainer.disable_tqdm=true",
    ]


@pytest.fixture(scope="session")
def labelled(world: Path) -> Path:
    """Records for prediction heads, `labelled.json` in the folder of `world`: 48 pictures, a label of each kind."""
    (world / "labelled").mkdir()
    records = [labelled_record(index, world / "labelled") for index in range(48)]
    (world / "labelled.json").write_text(json.dumps(records))
    return world / "labelled.json"


def labelled_record(index: int, images: Path) -> dict:
    """A record of one plain colour, light or dark, with what there is to tell of it."""
    colour, level = index % 3, index % 4
    light = 100 + 40 * level + index % 7
    shade = tuple(light if channel == colour else light // 4 for channel in range(3))
    Image.new("RGB", (30, 20 + index % 5), shade).save(images / f"{index}.png")
    name = ("red", "green", "blue")[colour]
    return {
        "id": str(index), "image": f"labelled/{index}.png", "prompt": "what is in this picture?", "colour": name,
        "light": light, "bright": ["no", "yes"][level > 1], "tags": [name, *["bright"] * (level > 1)], "level": level,
        "set": str(index // 8),
    }  # fmt: skip


@pytest.fixture(scope="session")
def train_head(common: list[str], labelled: Path) -> Callable[..., Path]:
    """As `train`, of a run with prediction heads on `labelled`: `train_head(name, column, output_dir, *overrides)`.

    `column` is what the first head learns. Intervals are of few resamples; plots are drawn where `plots` is set.
    """

    def start(name: str, column: str, output_dir: Path, *overrides: str, plots: bool = False) -> Path:
        words = [*common, *head_words(labelled, column), f"trainer.output_dir={output_dir}", *overrides]
        config = compose_config(name, words)
        check_config(config)
        with quick_report(plots=plots):
            return run_lightly(config, name, words, plots=plots)

    return start


@contextmanager
def quick_report(*, plots: bool = False) -> Iterator[None]:
    """Few resamples, and plots only where they are looked at."""
    from vlm.evaluation import head_metrics as scores  # slow to import, and few files of tests need it
    from vlm.train.heads import report as head_report

    with pytest.MonkeyPatch.context() as patch:
        for measure in (scores.scores, scores.baseline):
            patch.setitem(measure.__kwdefaults__, "num_resamples", 5)
        if not plots:
            patch.setattr(head_report, "plot_head_scores", lambda *given, **named: None)
        yield


def run_lightly(config: RunConfig, name: str, overrides: list[str], *, plots: bool = False) -> Path:
    """Run a configuration to its end, as the command line would; plots and report are made where `plots` is set."""
    with plots_drawn() if plots else no_report():
        return run(config, name, [word.split("=")[0].replace("/", ".") for word in overrides])


@contextmanager
def no_report() -> Iterator[None]:
    """Write no `report.html` at the end of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "try_to_write_report", lambda folder, state: None)
        yield


@contextmanager
def plots_drawn() -> Iterator[None]:
    """Draw the plots of runs, which `light_runs` leaves out."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in (draw_loss, draw_speed):
            patch.setattr(callbacks, draw.__name__, draw)
        yield


@pytest.fixture(scope="session", autouse=True)
def light_runs() -> Iterator[None]:
    """Leave out of all runs what costs a tiny one more than its steps do: see the top of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(speed, "count_flops", once.count_flops_once)
        patch.setattr(peak_flops, "measure_tflops", once.measure_tflops_once)
        patch.setattr(memory, "clear_device_cache", lambda garbage_collection=False: None)
        patch.setattr(imports, "_is_package_available", once.is_package_available_once)
        patch.setattr(encoders, "_inspect_encoder", once.inspect_encoder_once)
        patch.setattr(loading, "_compare_on_meta", once.compare_on_meta_once)
        patch.setattr(loading, "_find_part", once.find_part_once)
        patch.setattr(logit_proofs, "check_causal", once.check_causal_once)
        patch.setattr(logit_proofs, "check_padding", once.check_padding_once)
        patch.setattr(run_module, "check_round_trip", once.check_round_trip_once)
        for name in ("draw_loss", "draw_speed"):
            patch.setattr(callbacks, name, lambda *given: None)
        yield


def head_words(labelled: Path, column: str) -> list[str]:
    """Overrides that put a head's run on the tiny world."""
    return [
        "model=composed", f"dataset.path={labelled}", f"dataset.image_folder={labelled.parent}",
        "dataset.format=labelled", f"dataset.options.label_key={column}", "dataset.eval_split=0.25",
        "trainer.learning_rate.head_learning_rate=2e-2", "trainer.learning_rate.language_model_learning_rate=1e-2",
        "trainer.num_train_epochs=3", "trainer.eval_strategy=no", "trainer.lr_scheduler_type=constant",
        "trainer.warmup_steps=0", "trainer.logging_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def train_whole(brief: list[str]) -> Callable[..., Path]:
    """As `train`, on a whole model: `train_whole(name, model, output_dir, *overrides)`."""

    def start(name: str, model: Path, output_dir: Path, *overrides: str) -> Path:
        words = [*brief, f"model.hf_name={model}", f"trainer.output_dir={output_dir}", *overrides]
        return run_lightly(compose_config(name, words), name, words)

    return start


@pytest.fixture(scope="session")
def train(common: list[str]) -> Callable[..., Path]:
    """`train(name, output_dir, *overrides)` runs a shipped run to its end and returns its directory.

    Plots are drawn where `plots` is set.
    """

    def start(name: str, output_dir: Path, *overrides: str, plots: bool = False) -> Path:
        words = [*common, f"trainer.output_dir={output_dir}", *overrides]
        return run_lightly(compose_config(name, words), name, words, plots=plots)

    return start


def compose_config(name: str, overrides: list[str]) -> RunConfig:
    """A shipped run's configuration under overrides; Hydra composes each choice of groups once."""
    parsed = [parse_word(open_mapping_key(word)) for word in overrides]
    groups = [str(word.input_line) for word in parsed if word.key_or_group in GROUPS]
    config = pickle.loads(compose_groups(name, *groups))  # a copy in a fifth of the time that `deepcopy` takes
    ConfigLoaderImpl._apply_overrides_to_config([word for word in parsed if word.key_or_group not in GROUPS], config)
    composed = OmegaConf.to_object(config)
    assert isinstance(composed, RunConfig)
    permit_names(named_by_user(composed))
    return composed


@pytest.fixture(autouse=True)
def no_names_are_permitted_for_ever() -> Iterator[None]:
    """What a test lets be imported is for that test alone."""
    before = named._permitted.get()
    yield
    named._permitted.set(before)


GROUPS = frozenset(group_names())


@cache
def parse_word(word: str) -> Override:
    """An override as Hydra reads it."""
    (parsed,) = OverridesParser.create().parse_overrides([word])
    return parsed


@cache
def compose_groups(name: str, *groups: str) -> bytes:
    """A shipped run's configuration under choices of groups, before keys are given values, pickled."""
    with initialize_config_module("vlm.config", version_base="1.3"):
        return pickle.dumps(compose(name, list(groups)))


def check_config(config: RunConfig) -> None:
    """Refuse what the command line refuses of a configuration, with the objective that it names."""
    check(config, make_objective(config))


def losses(run_directory: Path) -> list[float]:
    """The training losses that a run logged."""
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
