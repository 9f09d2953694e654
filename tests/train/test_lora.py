"""LoRA by part: what it touches, what a run leaves, how that loads, merges and resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import vlm
from tests.command_line import refusal
from tests.families.tiny_families import TINY
from tests.fixtures import compose_config, losses
from tests.tiny_parts import picture
from vlm.assembly.adapter_base import BASE_FILE
from vlm.assembly.adapter_folder import ADAPTER_WEIGHTS, NON_LORA_WEIGHTS
from vlm.assembly.adapter_merge import merge
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.resolve import load_weights, resolve_model
from vlm.checks.weights import fingerprint
from vlm.cli.main import main
from vlm.config.schema import LoraConfig, LoraPartConfig
from vlm.config.shown import printable
from vlm.families.meta_model import get_auto_class
from vlm.inference.prompts import user_turn
from vlm.train.checkpoints import saving as checkpoints
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS
from vlm.train.lora import add_adapter, computes_as_linear, is_adapter, is_called, linear_layers
from vlm.train.parts import cast, freeze, make_parts, parameter_groups, table

LORA = [
    "trainer.lora.language_model.r=4",
    "trainer.learning_rate.language_model_learning_rate=1e-2",
]
EVERYWHERE = [
    *LORA,
    "trainer.lora.language_model.alpha=8",
    "trainer.lora.visual_encoder.r=2",
    "trainer.lora.visual_encoder.alpha=6",
    "trainer.learning_rate.visual_encoder_learning_rate=1e-2",
    "trainer.unfreeze.train_connector=false",
    "trainer.lora.connector.r=3",
]
"""An adapter of another rank on each part."""

SHORT = ["trainer.max_steps=3", "trainer.num_samples=0"]


@pytest.fixture
def built(common: list[str]) -> Callable[..., tuple[Any, Any]]:
    """`built(*overrides)`: configuration and model with its adapter, as a run makes it before training."""

    def build(*overrides: str) -> tuple[Any, Any]:
        config = compose_config("pretrain-smol", [*common, *overrides])
        model_config, processor = resolve_model(config)
        model = load_weights(config, model_config, processor, torch.float32, 42)
        add_adapter(model, config.trainer.lora, 42, torch.float32)
        return config, model

    return build


@pytest.fixture(scope="module")
def pretrained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint, as the base of others."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "pretrain", *SHORT) / "final"


@pytest.fixture(scope="module")
def on_parts(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from parts: LoRA on the language model, the connector as a whole."""
    return train("pretrain-smol", tmp_path_factory.mktemp("runs") / "on-parts", *LORA, *SHORT)


@pytest.fixture(scope="module")
def on_checkpoint(train: Callable[..., Path], pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a checkpoint: an adapter on every part."""
    folder = tmp_path_factory.mktemp("runs") / "on-checkpoint"
    return train("pretrain-smol", folder, *EVERYWHERE, *SHORT, f"trainer.from_pretrained={pretrained}")


def adapted(model: Any) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def logits(model: Any, processor: Any) -> torch.Tensor:
    """What a model says about a picture, in every position."""
    ready = vlm.VisionLanguageModel(model.eval(), processor)
    inputs = ready.inputs([[user_turn("what?", 1)]], [[picture()]])
    with torch.no_grad():
        return model(**inputs).logits.float()


# Which layers


@pytest.mark.parametrize("part", ["visual_encoder", "connector", "language_model"])
def test_an_adapter_stays_within_its_part(built: Any, part: str):
    """The encoder's layers are named as the language model's: `q_proj`, `self_attn`."""
    frozen = "trainer.unfreeze.train_connector=false"
    _, model = built(f"trainer.lora.{part}.r=2", frozen)
    found = adapted(model)
    assert found
    assert all(name.startswith(f"{part}.") for name in found)
    assert sorted(found) == sorted(expected_linear_layers(built, part))
    assert not any("lm_head" in name for name in found)


def expected_linear_layers(built: Any, part: str) -> list[str]:
    _, model = built()
    return linear_layers(model, part)


def test_layers_are_chosen_by_how_their_names_end(built: Any):
    _, model = built(
        "trainer.lora.language_model.r=2", "trainer.lora.language_model.target_modules=[q_proj, mlp.down_proj]"
    )
    found = adapted(model)
    assert all(name.startswith("language_model.") for name in found)
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "down_proj"}


def test_a_mistyped_layer_is_refused_with_the_nearest(built: Any):
    with pytest.raises(ValueError, match=r"named q_prj. Did you mean q_proj\? Their names end in down_proj, "):
        built("trainer.lora.language_model.r=2", "trainer.lora.language_model.target_modules=[q_prj]")


def test_a_part_without_layers_is_refused(built: Any):
    with pytest.raises(ValueError, match=r"trainer.lora.connector.r=2: the connector has no Linear layer to adapt"):
        built(
            "model/connector=identity", "model.connector.options.input_norm=null", "trainer.lora.connector.r=2",
            "trainer.unfreeze.train_connector=false",
        )  # fmt: skip


def test_rank_and_alpha_differ_by_part(built: Any):
    _, model = built(*EVERYWHERE)
    ranks = {part: set() for part in ("visual_encoder", "connector", "language_model")}
    for name, layer in adapted(model).items():
        ranks[name.split(".")[0]].add((layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]))
    assert ranks == {"visual_encoder": {(2, 6, 3.0)}, "connector": {(3, 6, 2.0)}, "language_model": {(4, 8, 2.0)}}


def test_only_adapters_and_whole_parts_train(built: Any):
    config, model = built(*LORA, "trainer.weight_decay.language_model_weight_decay=0.1")
    parts = make_parts(model, config.trainer, config.model)
    freeze(parts)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"connector", "language_model"}
    assert all(is_adapter(name) or name.startswith("connector.") for name in trained)
    groups = {group["name"]: group for group in parameter_groups(parts, trained)}
    assert groups["language_model.decay"]["lr"] == 1e-2
    assert groups["connector.decay"]["lr"] == 1e-3
    lines = [line.split() for line in table(parts).splitlines()]
    assert lines[-2][0] == "language_model"
    assert lines[-2][3:5] == ["LoRA", "r=4:"]
    assert lines[-1][2] == f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"


def test_adapters_keep_float32_where_their_part_is_halved(built: Any):
    config, model = built(*LORA)
    parts = make_parts(model, config.trainer, config.model)
    freeze(parts)
    cast(model, parts, torch.float32, torch.bfloat16)
    for name, parameter in model.named_parameters():
        trains = is_adapter(name) or name.startswith("connector.")
        assert parameter.dtype == (torch.float32 if trains else torch.bfloat16), name


@pytest.mark.parametrize(
    ("option", "seen"),
    [
        ("dropout=0.25", lambda layer: layer.lora_dropout["default"].p == 0.25),
        ("use_rslora=true", lambda layer: layer.scaling["default"] == 8 / 4**0.5),
        ("use_dora=true", lambda layer: "default" in layer.lora_magnitude_vector),
        ("init=gaussian", lambda layer: bool(layer.lora_A["default"].weight.abs().max() > 1 / 32**0.5)),
        ("init=orthogonal", lambda layer: bool(layer.lora_B["default"].weight.any())),
    ],
)
def test_options_reach_peft(built: Any, option: str, seen: Callable[[Any], bool]):
    _, model = built(*LORA, f"trainer.lora.{option}")
    assert all(seen(layer) for layer in adapted(model).values())


def test_the_model_answers_as_before_its_adapter_trains(built: Any, on_parts: Path):
    processor = vlm.VLMProcessor.from_pretrained(on_parts / "final")
    _, plain = built()
    for init in ("default", "gaussian", "orthogonal"):
        _, model = built(*EVERYWHERE, "trainer.lora.connector.r=4", f"trainer.lora.init={init}")
        torch.testing.assert_close(logits(model, processor), logits(plain, processor), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_train_within_parts_that_have_an_adapter(built: Any, bias: str):
    config, model = built(
        "trainer.lora.visual_encoder.r=2", "trainer.lora.visual_encoder.target_modules=[q_proj]",
        "trainer.learning_rate.visual_encoder_learning_rate=1e-2", f"trainer.lora.bias={bias}",
    )  # fmt: skip
    freeze(make_parts(model, config.trainer, config.model))
    trained = {
        name for name, p in model.named_parameters()
        if p.requires_grad and name.endswith("bias") and not name.startswith("connector.")
    }  # fmt: skip
    assert all(name.startswith("visual_encoder.") for name in trained)
    queries = {name for name in trained if name.endswith("q_proj.base_layer.bias")}
    assert bool(queries) == (bias != "none")
    assert bool(trained - queries) == (bias == "all")


# What a run leaves


def test_a_run_leaves_an_adapter_as_peft_reads_it(on_checkpoint: Path, pretrained: Path):
    final = on_checkpoint / "final"
    assert not list(final.glob("model*.safetensors"))
    assert {"processor_config.json", "config.json", BASE_FILE, NON_LORA_WEIGHTS} <= {
        file.name for file in final.iterdir()
    }
    base = AutoModelForImageTextToText.from_pretrained(pretrained)
    ours = open_checkpoint(final).load_model(merge=False)
    with_peft = peft.PeftModel.from_pretrained(base, final)
    processor = vlm.VLMProcessor.from_pretrained(final)
    torch.testing.assert_close(logits(with_peft.base_model.model, processor), logits(ours, processor))
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(pretrained)


def test_a_run_from_parts_leaves_what_no_base_holds(on_parts: Path, world: Path):
    others = load_file(on_parts / "final" / NON_LORA_WEIGHTS)
    assert {name.split(".")[0] for name in others} == {"connector", "language_model"}
    grown = {name: len(tensor) for name, tensor in others.items() if name.startswith("language_model.")}
    base = json.loads((world / "language_model" / "config.json").read_text())["vocab_size"]
    assert set(grown) == {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert len(set(grown.values())) == 1
    assert next(iter(grown.values())) < base


def test_checkpoints_hold_what_trains(train: Callable[..., Path], tmp_path: Path):
    folder = train("pretrain-smol", tmp_path, *LORA, *SHORT, "trainer.save_strategy=steps", "trainer.save_steps=2")
    held = load_file(folder / "checkpoint-2" / TRAINED_WEIGHTS)
    assert all(is_adapter(name) or name.startswith("connector.") for name in held)
    assert any(is_adapter(name) for name in held)
    assert not (folder / "checkpoint-2" / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def live(train: Callable[..., Path], pretrained: Path, tmp_path_factory: pytest.TempPathFactory):
    """`live(*overrides)`: the run directory and the model as it was when training ended."""
    kept: list[Any] = []

    def start(*overrides: str) -> tuple[Path, Any]:
        original = checkpoints.save_on_base

        def keep(model: Any, folder: Path, *rest: Any, **kwargs: Any) -> None:
            kept.append(model)
            original(model, folder, *rest, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "save_on_base", keep)
            folder = train("pretrain-smol", tmp_path_factory.mktemp("runs") / "live", *SHORT, *overrides)
        return folder / "final", kept[-1]

    return start


@pytest.mark.parametrize(
    "overrides",
    [
        LORA,
        EVERYWHERE,
        [*EVERYWHERE, "trainer.lora.use_dora=true"],
        [*LORA, "trainer.lora.use_rslora=true", "trainer.lora.bias=all"],
        ["trainer.lora.visual_encoder.r=2", "trainer.lora.bias=lora_only", "trainer.unfreeze.train_language_model=true",
         "trainer.learning_rate.visual_encoder_learning_rate=1e-2", *LORA[1:]],
    ],
    ids=["language model", "everywhere", "dora", "rslora and biases", "encoder beside a whole language model"],
)  # fmt: skip
@pytest.mark.parametrize("start", ["parts", "checkpoint"])
def test_loaded_and_merged_models_say_what_the_trained_one_said(
    live: Any, pretrained: Path, tmp_path: Path, overrides: list[str], start: str
):
    begun = [f"trainer.from_pretrained={pretrained}"] if start == "checkpoint" else []
    final, trained = live(*overrides, *begun)
    processor = vlm.VLMProcessor.from_pretrained(final)
    wanted = logits(trained, processor)
    beside, merged = open_checkpoint(final).load_model(merge=False), open_checkpoint(final).load_model()
    assert adapted(beside)
    assert not adapted(merged)
    torch.testing.assert_close(logits(beside, processor), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged, processor), wanted, rtol=0, atol=1e-5)
    merge(str(final), tmp_path / "merged")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole, processor), wanted, rtol=0, atol=1e-5)
    assert {name for name, _ in whole.named_parameters()} == {name for name, _ in merged.named_parameters()}
    for folder in (final, tmp_path / "merged"):
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert processor.tokenizer.eos_token_id in ends


def test_an_adapter_is_asked_like_a_complete_model(on_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    final = on_parts / "final"
    picture().save(tmp_path / "picture.png")
    said = printable(vlm.load(final, device="cpu").generate("what?", [tmp_path / "picture.png"], max_new_tokens=4))
    ask = ["--image", str(tmp_path / "picture.png"), "--prompt", "what?", "--max-new-tokens", "4", "--device", "cpu"]
    main(["generate", str(final), *ask])
    assert capsys.readouterr().out.strip() == said
    main(["merge-lora", str(final), str(tmp_path / "whole")])
    main(["generate", str(tmp_path / "whole"), *ask])
    assert capsys.readouterr().out.strip().endswith(said)
    assert refusal("generate", str(tmp_path / "whole"), "--base", str(final), "--prompt", "a").endswith(
        "it needs no base"
    )


def test_training_goes_on_from_an_adapter(on_parts: Path, train: Callable[..., Path], tmp_path: Path):
    """Merged as it loads; a second adapter then has the first as its base."""
    start = f"trainer.from_pretrained={on_parts / 'final'}"
    whole = train("pretrain-smol", tmp_path / "whole", start, *SHORT)
    assert (whole / "final" / "model.safetensors").is_file()
    first = open_checkpoint(on_parts / "final").load_model()
    after = AutoModelForImageTextToText.from_pretrained(whole / "final")
    torch.testing.assert_close(after.language_model.state_dict(), first.language_model.state_dict())
    second = train("pretrain-smol", tmp_path / "second", start, *LORA, *SHORT)
    base = json.loads((second / "final" / BASE_FILE).read_text())["sources"]["checkpoint"]["name"]
    assert base == str(on_parts / "final")
    assert not adapted(open_checkpoint(second / "final").load_model())


# Bases that moved


@pytest.fixture
def copied(on_checkpoint: Path, pretrained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of an adapter and of its base, which moved."""
    shutil.copytree(on_checkpoint / "final", tmp_path / "adapter")
    shutil.copytree(pretrained, tmp_path / "moved")
    file = tmp_path / "adapter" / BASE_FILE
    file.write_text(file.read_text().replace(str(pretrained), "/no/such/base"))
    return tmp_path / "adapter", tmp_path / "moved"


def test_a_base_that_moved_is_asked_for(copied: tuple[Path, Path], tmp_path: Path):
    adapter, base_paths = copied
    said = refusal("generate", str(adapter), "--prompt", "a")
    assert said.startswith(f"vlm generate: {adapter} is an adapter on /no/such/base, which is not on this")
    assert said.endswith("Give its new path, to vlm generate or vlm merge-lora: --base PATH")
    assert refusal("merge-lora", str(adapter), str(tmp_path / "out")).endswith("--base PATH")
    assert not adapted(open_checkpoint(adapter).load_model(base_paths=[str(base_paths)]))


def test_the_options_that_llavas_users_know_work(copied: tuple[Path, Path], tmp_path: Path):
    adapter, base_paths = copied
    out = tmp_path / "out"
    main(["merge-lora", "--base-model", str(base_paths), "--lora-path", str(adapter), "--output-path", str(out)])
    assert (out / "model.safetensors").is_file()
    assert not (out / "adapter_config.json").exists()
    assert (out / "processor_config.json").is_file()
    said = refusal("merge-lora", "--base", str(base_paths), str(adapter), str(out))
    assert said == f"vlm merge-lora: {out} exists already; name a new folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "moved", "out"]


def test_parts_that_moved_are_named(on_parts: Path, world: Path, tmp_path: Path):
    shutil.copytree(on_parts / "final", tmp_path / "adapter")
    file = tmp_path / "adapter" / BASE_FILE
    file.write_text(file.read_text().replace(str(world / "language_model"), "/no/such"))
    with pytest.raises(
        ValueError, match=r"/no/such, which is not on this machine, or has moved.* --base language_model=PATH"
    ):
        open_checkpoint(tmp_path / "adapter").load_model()
    assert open_checkpoint(tmp_path / "adapter").load_model(base_paths=[f"language_model={world / 'language_model'}"])
    with pytest.raises(ValueError, match=r"give visual_encoder=PATH and language_model=PATH"):
        open_checkpoint(tmp_path / "adapter").load_model(base_paths=[str(world)])
    with pytest.raises(ValueError, match=r"--base language_model=/nowhere: no such folder"):
        open_checkpoint(tmp_path / "adapter").load_model(base_paths=["language_model=/nowhere"])


def test_another_training_of_the_base_is_refused(
    copied: tuple[Path, Path], train: Callable[..., Path], pretrained: Path, tmp_path: Path
):
    adapter, _ = copied
    other = train("pretrain-smol", tmp_path / "other", *SHORT, "trainer.seed=7") / "final"
    assert fingerprint(other) != fingerprint(pretrained)
    said = refusal("merge-lora", str(adapter), str(tmp_path / "out"), "--base", str(other))
    assert said.startswith(f"vlm merge-lora: {other} is not what {adapter} was trained on: its weights differ")
    assert not (tmp_path / "out").exists()


def test_a_complete_model_is_not_merged(pretrained: Path, on_parts: Path, tmp_path: Path):
    said = refusal("merge-lora", str(pretrained), str(tmp_path / "out"))
    assert said == f"vlm merge-lora: {pretrained}: it has no {BASE_FILE}, so it is not an adapter on a base"
    assert refusal("merge-lora", str(on_parts), str(tmp_path / "out")).endswith(
        f"it is a run directory, and its model is {on_parts / 'final'}"
    )


def test_what_breaks_leaves_nothing(on_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def torn(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(vlm.VLMForConditionalGeneration, "save_pretrained", torn)
    with pytest.raises(OSError, match="no space left"):
        merge(str(on_checkpoint / "final"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Going on


@pytest.mark.parametrize("options", [[], ["trainer.lora.dropout=0.3", "trainer.lora.use_dora=true"]], ids=["", "dora"])
def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable[..., Path], tmp_path: Path, options: list[str]):
    words = [*LORA, *options, "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    whole = train("pretrain-smol", tmp_path / "whole", *words, "trainer.num_samples=0")
    resumed = train(
        "pretrain-smol", tmp_path / "resumed", *words, "trainer.num_samples=0",
        f"trainer.resume_from_checkpoint={whole / 'checkpoint-2'}",
    )  # fmt: skip
    assert losses(resumed) == losses(whole)[2:]
    for name in (ADAPTER_WEIGHTS, NON_LORA_WEIGHTS):
        torch.testing.assert_close(load_file(resumed / "final" / name), load_file(whole / "final" / name))


def test_activation_checkpointing_reaches_adapters_under_a_frozen_base(train: Callable[..., Path], tmp_path: Path):
    words = [*LORA, *SHORT, "trainer.unfreeze.train_connector=false"]
    plain = train("pretrain-smol", tmp_path / "plain", *words)
    saving = train("pretrain-smol", tmp_path / "saving", *words, "trainer.activation_checkpointing=true")
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-6)
    first, last = losses(plain)[0], losses(plain)[-1]
    assert last < first


# What a family's trial finds


def test_what_no_reply_depends_on_is_frozen_and_gets_no_adapter():
    made = TINY["llava-interleave"]
    native = made.processor()
    config = CONFIG_MAPPING[made.model_type](**made.config(native))
    model: Any = get_auto_class(config).from_config(config)
    forms, idle = ("model.language_model.layers.*.mlp.up_proj.",), "mlp.up_proj"
    assert any(idle in name for name in linear_layers(model, "language_model"))
    assert not any(idle in name for name in linear_layers(model, "language_model", forms))
    run = compose_config("finetune-llava-onevision", ["dataset.path=x"])
    freeze(make_parts(model, run.trainer, run.model, (), forms))
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad and "vision" not in name} == {
        name for name, _ in model.named_parameters() if idle in name
    }
    add_adapter(model, LoraConfig(language_model=LoraPartConfig(r=2)), 0, torch.float32, forms)
    assert adapted(model)
    assert not any(idle in name for name in adapted(model))


# Layers that would run without their adapter


class Router(nn.Linear):
    """Computes more than a Linear layer."""

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), input


class Transposed(nn.Linear):
    """Computes what a Linear layer does, as Falcon's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


class Mixer(nn.Module):
    """Calls a layer, takes the weight of one, looks at another one's, and slices the last one's."""

    def __init__(self):
        super().__init__()
        self.called, self.taken, self.typed, self.sliced = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.called(states.to(self.typed.weight.dtype))
        if isinstance(self.typed.weight, torch.Tensor):
            states = self.typed(states) + self.sliced.weight[:, 0]
        return states @ self.taken.weight


class InheritedMixer(Mixer):
    """Has its layers' uses from its base."""


def test_layers_that_would_run_without_their_adapter_get_none():
    kinds = {nn.Linear: True, Router: False, Transposed: True}
    assert {kind: computes_as_linear(kind(3, 2)) for kind in kinds} == kinds
    for mixer in (Mixer(), InheritedMixer()):
        names = ["called", "taken", "typed", "sliced"]
        assert [is_called(dict(mixer.named_modules()), name) for name in names] == [True, False, True, True]
    attention = nn.MultiheadAttention(2, 1)
    assert not is_called(dict(attention.named_modules()), "out_proj")
