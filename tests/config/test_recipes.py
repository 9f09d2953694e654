"""Recipes of papers as YAML: each composes, passes the checks, and computes at reduced width what it describes."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.fixtures import check_config, compose_config
from tests.tiny_parts import IGNORE_INDEX, Parts, picture
from vlm.assembly.compose import build_model, compose
from vlm.config.derived import get_value
from vlm.config.schema import RunConfig
from vlm.train.parts import freeze, make_parts, parameter_groups

TINY_ENCODERS = {
    "openai/clip-vit-large-patch14-336": "clip",
    "openai/clip-vit-large-patch14": "clip",
    "google/siglip-so400m-patch14-384": "siglip",
    "facebook/dinov2-with-registers-large": "dinov2_with_registers",
}
"""Encoder of a recipe -> a tiny one of its architecture."""

TINY_LANGUAGE_MODELS = {
    "lmsys/vicuna-7b-v1.5": "vicuna",
    "Qwen/Qwen2-0.5B-Instruct": "qwen2",
    "HuggingFaceTB/SmolLM2-135M": "tied_llama",
    "microsoft/phi-2": "phi",
    "mtgv/MobileLLaMA-1.4B-Chat": "llama",
}
"""Language model of a recipe -> a tiny one of its architecture."""

NARROW: dict[str, dict[str, Any]] = {
    "c_abstractor": {"num_queries": 4, "num_blocks": 1, "hidden_dim": 8, "position_side": 3},
}
"""Options of connectors that a tiny encoder cannot have as large as the paper's."""

CLIP = {"model.visual_encoder.hf_name": "openai/clip-vit-large-patch14-336", "model.visual_encoder.feature_layer": -2}
SIGLIP = {"model.visual_encoder.hf_name": "google/siglip-so400m-patch14-384", "model.visual_encoder.feature_layer": -2}
CONNECTOR = {"connector": 1e-3}
BOTH = {"connector": 2e-5, "language_model": 2e-5}
ALL = {"visual_encoder": 2e-6, "connector": 1e-5, "language_model": 1e-5}

RECIPES: dict[str, tuple[int, int, dict[str, float], dict[str, Any]]] = {
    "pretrain-llava": (256, 8, CONNECTOR, {**CLIP, "dataset.template": "plain", "dataset.image_mode": "square"}),
    "finetune-llava": (128, 8, BOTH, {**CLIP, "dataset.template": "v1", "dataset.image_mode": "pad"}),
    "finetune-llava-next": (
        128, 8, ALL,
        {**CLIP, "dataset.template": "v1", "dataset.image_mode": "square", "trainer.per_device_train_batch_size": 4,
         "trainer.dataloader_drop_last": True, "dataset.supervise": "replies"},
    ),
    "pretrain-onevision-0.5b": (
        512, 8, CONNECTOR, {**SIGLIP, "dataset.template": "plain", "trainer.per_device_train_batch_size": 16},
    ),
    "finetune-onevision-0.5b": (
        256, 8, ALL,
        {**SIGLIP, "model.anyres.max_tiles": 9, "dataset.max_length": 32768, "dataset.supervise": "llava-onevision",
         "trainer.per_device_train_batch_size": 1, "trainer.dataloader_drop_last": True, "dataset.max_frames": 32},
    ),
    "train-nanovlm": (
        256, 1, {"visual_encoder": 1e-4, "connector": 2e-3, "language_model": 1e-4},
        {"model.visual_encoder.feature_layer": None, "trainer.num_train_epochs": 5, "trainer.max_grad_norm": 0,
         "trainer.dataloader_drop_last": True, "dataset.eval_split": 0.01, "dataset.max_length": 128},
    ),
    "pretrain-tinyllava": (
        256, 4, CONNECTOR,
        {**SIGLIP, "dataset.template": "plain", "dataset.image_mode": "square", "trainer.tf32": False,
         "trainer.per_device_train_batch_size": 32},
    ),
    "finetune-tinyllava": (
        128, 4, BOTH,
        {**SIGLIP, "dataset.template": "v1", "dataset.image_mode": "square", "trainer.tf32": False,
         "trainer.per_device_train_batch_size": 8},
    ),
    "pretrain-mobilevlm": (256, 8, CONNECTOR, {**CLIP, "model.connector.type": "ldp"}),
    "finetune-mobilevlm": (128, 8, BOTH, {**CLIP, "dataset.template": "v1", "dataset.image_mode": "pad"}),
    "pretrain-honeybee": (
        256, 8, {"connector": 1e-4},
        {"trainer.max_steps": 50000, "trainer.warmup_steps": 2000, "trainer.adam_beta2": 0.98,
         "trainer.weight_decay.connector_weight_decay": 0.01, "model.visual_encoder.feature_layer": -1,
         "dataset.max_length": 1025},
    ),
    "finetune-honeybee": (
        128, 8, BOTH,
        {"trainer.max_steps": 10000, "trainer.warmup_steps": 150, "trainer.adam_epsilon": 1e-6,
         "trainer.weight_decay.language_model_weight_decay": 1e-4, "model.visual_encoder.feature_layer": -1,
         "dataset.max_length": 1024},
    ),
    "train-prismatic": (
        128, 8, BOTH,
        {"trainer.weight_decay.connector_weight_decay": 0.1, "model.visual_encoder.image_size": 384,
         "trainer.weight_decay.language_model_weight_decay": 0.1, "dataset.image_mode": "square"},
    ),
}  # fmt: skip
"""Run -> its global batch, the GPUs it is written for, the rate of each part that trains, and further keys."""


PAPERS = sorted({*RECIPES, "finetune-llava-lora", "finetune-llava-qlora"})
"""The runs that follow a paper."""

GROUPED = ["finetune-llava", "finetune-llava-lora", "finetune-llava-next", "finetune-onevision-0.5b",
           "finetune-tinyllava", "finetune-mobilevlm", "train-prismatic"]  # fmt: skip
"""The runs whose published code has `group_by_modality_length`, or what Prismatic made of it."""


@pytest.fixture(scope="module")
def encoders(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoder of a recipe -> a tiny one of its architecture; SigLIP-base has an even number of patches a side."""
    even = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(even)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(even)
    tiny = {name: parts.encoder(one) for name, one in TINY_ENCODERS.items()}
    return {**tiny, "google/siglip-base-patch16-224": even}


@pytest.fixture
def records(tmp_path: Path) -> str:
    (tmp_path / "records.json").write_text("[]")
    return f"dataset.path={tmp_path / 'records.json'}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_the_checks(records: str, name: str):
    check_config(compose_config(name, [records]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_papers_figures(records: str, name: str):
    batch, gpus, rates, further = RECIPES[name]
    config = compose_config(name, [records])
    trainer: Any = config.trainer
    assert trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * gpus == batch
    trained = {part for part, flag in (
        ("visual_encoder", "train_vision_model"), ("connector", "train_connector"),
        ("language_model", "train_language_model"),
    ) if getattr(trainer.unfreeze, flag)}  # fmt: skip
    assert trained == set(rates)
    assert {part: getattr(trainer.learning_rate, f"{part}_learning_rate") for part in rates} == rates
    assert {key: get_value(config, key) for key in further} == further


@pytest.mark.parametrize(
    ("name", "rates", "r", "alpha"),
    [("finetune-llava-lora", (2e-4, 2e-5), 128, 256), ("finetune-llava-qlora", (2e-5, 2e-5), 64, 16)],
)
def test_llavas_adapters(records: str, name: str, rates: tuple[float, float], r: int, alpha: int):
    """The language model's rate is the script's `learning_rate`, and the connector's that or `mm_projector_lr`."""
    config = compose_config(name, [records])
    check_config(config)
    trainer: Any = config.trainer
    found = trainer.learning_rate.language_model_learning_rate, trainer.learning_rate.connector_learning_rate
    assert found == rates
    adapter = trainer.lora.language_model
    assert (adapter.r, adapter.alpha, trainer.lora.dropout, trainer.lora.bias) == (r, alpha, 0.05, "none")
    assert adapter.target_modules is None
    assert trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps == 16
    assert config.model.language_model.quantization == ("4bit" if name.endswith("qlora") else None)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_averages_and_orders_as_its_code_does(records: str, name: str):
    trainer: Any = compose_config(name, [records]).trainer
    assert trainer.loss_average == "micro_batch"
    if name != "finetune-llava-qlora":  # on the data of LLaVA-1.5, in its order
        assert trainer.train_sampling_strategy == ("group_by_modality_length" if name in GROUPED else "random")


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_says_in_its_head_what_differs(name: str):
    text = resources.files("vlm.config").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    head = text[: text.index("defaults:")]
    assert "\n# Differs: " in head
    assert all(line.startswith("# ") for line in head.splitlines())


def shrunk(config: RunConfig, parts: Parts, tiny: dict[str, Path]) -> RunConfig:
    """The same recipe on tiny parts of the same architectures."""
    model = config.model
    encoders = [model.visual_encoder, *model.visual_encoder.extra_encoders]
    for encoder in encoders:
        encoder.hf_name = str(tiny[encoder.hf_name])
        encoder.image_size = None if encoder.image_size is None else 24
    model.language_model.hf_name = str(parts.language_model(TINY_LANGUAGE_MODELS[model.language_model.hf_name]))
    options = model.connector.options
    options.update({key: value for key, value in NARROW.get(model.connector.type, {}).items() if key in options})
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_computes_at_reduced_width(parts: Parts, encoders: dict[str, Path], records: str, name: str):
    """One step forward and back: a finite loss, and a gradient for whatever it says that trains."""
    config = shrunk(compose_config(name, [records]), parts, encoders)
    data = config.dataset
    model_config, processor = compose(config.model, data.template, data.image_mode)
    model = build_model(config.model, model_config, processor, torch.float32, 0)
    split = make_parts(model, config.trainer, config.model)
    freeze(split)
    model.train()
    ids = processor(images=[picture(0, (60, 40))], text="<image> a red circle")
    labels = ids["input_ids"].clone()
    labels[labels == processor.image_token_id] = IGNORE_INDEX
    loss = model(**ids, labels=labels).loss
    assert torch.isfinite(loss)
    loss.backward()
    trained = {part.name for part in split if part.is_unfrozen}
    assert trained == set(RECIPES[name][2])
    for part in split:
        gradients = [weight.grad for weight in part.parameters.values() if weight.requires_grad]
        assert all(gradient is not None for gradient in gradients), part.name
        assert bool(gradients) == (part.name in trained)
    assert {group["name"].split(".")[0] for group in parameter_groups(split, [])} == trained


def test_prismatics_encoders_stand_in_its_order(records: str):
    """DINOv2 first, then SigLIP, both of the layer before the last, in pictures of 384 pixels."""
    encoder = compose_config("train-prismatic", [records]).model.visual_encoder
    seen = [(one.hf_name, one.feature_layer, one.feature_strategy) for one in (encoder, *encoder.extra_encoders)]
    assert seen == [
        ("facebook/dinov2-with-registers-large", -2, "patch"), ("google/siglip-so400m-patch14-384", -2, "patch"),
    ]  # fmt: skip


def test_every_recipe_is_described():
    """`docs/recipes.md` has a command for each."""
    text = Path(__file__).parents[2].joinpath("docs", "recipes.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"-cn {name} " in text, name
    for name in PAPERS:
        assert f"| `{name}` | " in text, name
    assert "[M]" not in text
