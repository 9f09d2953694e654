"""Other frameworks' names: what stands for each of them exists here."""

import pytest

from vlm.checks.messages import describe_unknown_key, describe_unknown_option
from vlm.config.aliases import CHOICES, KEYS, THEIR_NAMES, find_alias, find_choice
from vlm.config.keys import dotted_keys, find_field
from vlm.config.packaged import group_names, packaged_names
from vlm.config.rules import Choices, get_rule
from vlm.data.records.formats import FORMATS

MAPPINGS = ("dataset.sources.", "model.processor.")
"""Sections whose keys are the user's."""

EXPECTED = {
    # LLaVA's scripts
    "mm_projector_lr": "trainer.learning_rate.connector_learning_rate", "mm_projector_type": "model/connector=mlp",
    "tune_mm_mlp_adapter": "trainer/unfreeze=connector", "mm_vision_select_layer": "model.visual_encoder.feature_layer",
    "freeze_backbone": "trainer.unfreeze.train_language_model=false", "version": "dataset.template",
    "data_path": "dataset.path", "image_folder": "dataset.image_folder", "model_max_length": "dataset.max_length",
    "vision_tower": "model.visual_encoder.hf_name", "model_name_or_path": "model.language_model.hf_name",
    # Trainer, and everyday words
    "lr": "trainer.learning_rate.language_model_learning_rate", "batch_size": "trainer.per_device_train_batch_size",
    "num_epochs": "trainer.num_train_epochs", "warmup_ratio": "trainer.warmup_steps",
    # LLaMA-Factory and ms-swift
    "cutoff_len": "dataset.max_length", "lora_rank": "trainer.lora.language_model.r",
    "freeze_vit": "trainer.unfreeze.train_vision_model=false", "finetuning_type": "trainer/lora=language-model",
    "aligner_lr": "trainer.learning_rate.connector_learning_rate", "max_pixels": "model.processor.max_pixels",
}  # fmt: skip


@pytest.mark.parametrize("use", sorted({alias.use for alias in THEIR_NAMES}))
def test_what_we_call_it_exists(use: str):
    key, equals, value = use.partition("=")
    assert equals
    if "/" in key:
        assert key in group_names()
        assert value in ("…", *packaged_names("vlm.config", key, ".yaml"))
    elif not key.startswith(MAPPINGS):
        assert key in dotted_keys()
        rule = get_rule(found) if (found := find_field(key)) is not None else None
        assert not isinstance(rule, Choices) or value == "…" or value.strip("[]") in rule.names


def test_no_name_stands_for_two():
    names = [name for text in THEIR_NAMES.values() for name in text.split()]
    assert len(names) == len(set(names)) == len(KEYS)
    assert all(name == name.lower() and "-" not in name for name in names)


@pytest.mark.parametrize("place", CHOICES)
def test_choices_exist(place: str):
    known = packaged_names("vlm.config", place, ".yaml") if place in group_names() else None
    if known is None:
        field = find_field(place)
        assert field is not None
        rule = get_rule(field)
        known = {"dataset.format": list(FORMATS)}.get(place) or (
            list(rule.names)
            if isinstance(rule, Choices)
            else [*packaged_names("vlm.data", "templates", ".jinja"), "tokenizer"]
        )
    assert set(CHOICES[place].values()) <= set(known)
    assert not set(CHOICES[place]) & set(known), "a choice of ours is not to be renamed"


@pytest.mark.parametrize(("theirs", "ours"), EXPECTED.items())
def test_their_names_are_answered_with_ours(theirs: str, ours: str):
    assert f"Did you mean {ours}?" in describe_unknown_key(f"trainer.{theirs}", [])
    assert f"Did you mean {ours}?" in describe_unknown_option(f"--{theirs.replace('_', '-')}=1")


def test_spelling_does_not_matter():
    assert find_alias("--Lora-Rank") == find_alias("trainer.lora_rank") == KEYS["lora_rank"]
    assert find_alias("nothing_of_the_kind") is None
    assert find_choice("model/connector", "MLP2x_GELU") == "mlp"
    assert find_choice("model/connector", "mlp") is None


def test_keys_are_found_by_their_dotted_names():
    assert "trainer.learning_rate.connector_learning_rate" in dotted_keys()
    assert find_field("trainer.max_steps") is not None
    assert find_field("trainer.nothing") is None
    assert find_field("trainer.max_steps.deeper") is None
