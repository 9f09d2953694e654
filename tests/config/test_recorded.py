"""Recipes that checkpoints recorded, under earlier keys too."""

import dataclasses

import pytest

from vlm.config.model_schema import (
    ConnectorConfig,
    EncoderConfig,
    HeadConfig,
    LanguageModelConfig,
    ModelConfig,
    VisualEncoderConfig,
)
from vlm.config.recorded import RENAMED_KEYS, current_key, read_recipe, upgrade_recipe


def make_model() -> ModelConfig:
    """A section with everything that earlier keys concerned."""
    encoder = VisualEncoderConfig("a", extra_encoders=[EncoderConfig("b")])
    model = ModelConfig(visual_encoder=encoder, language_model=LanguageModelConfig("c"))
    model.head.task, model.head.extra_heads = "binary", {"price": HeadConfig("regression", weight=0.5)}
    return model


def test_a_section_comes_back_out_of_a_mapping():
    model = ModelConfig(connector=ConnectorConfig("linear", {"bias": False}))
    model.visual_encoder.hf_name, model.language_model.hf_name = "a", "b"
    assert read_recipe(dataclasses.asdict(model)) == model
    assert read_recipe(dataclasses.asdict(make_model())) == make_model()


def test_a_recipe_with_the_earlier_keys_is_read_as_todays():
    recipe = dataclasses.asdict(make_model())
    earlier = {**recipe, "visual_encoder": dict(recipe["visual_encoder"]), "head": dict(recipe["head"])}
    earlier["visual_encoder"]["beside"] = earlier["visual_encoder"].pop("extra_encoders")
    earlier["head"]["beside"] = earlier["head"].pop("extra_heads")
    assert upgrade_recipe(earlier) == recipe
    assert read_recipe(earlier) == make_model()
    assert "beside" in earlier["head"]  # what was given stays as it is


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"head": {"taks": "binary"}}, "ModelConfig: there is no key head.taks"),
        ({"head": {"weight": "much"}}, "ModelConfig: Expected `float`, got `str` - at `$.head.weight`"),
        ({"beside": []}, "ModelConfig: there is no key beside"),
    ],
)
def test_what_the_schema_does_not_have_is_refused(recipe: dict, message: str):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared in full
        read_recipe(recipe)
    assert str(error.value) == message


def test_earlier_keys_have_names_today():
    assert current_key("model.head.beside.price.task") == "model.head.extra_heads.price.task"
    assert current_key("model.head.besides") == "model.head.besides"
    for old, new in RENAMED_KEYS.items():
        assert current_key(old) == new
