"""Models on the meta device: their class, and configurations that build none."""

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from vlm.families.meta_model import NotAFamilyError, build_meta_model, get_auto_class, without_zero3


def test_nothing_is_allocated_and_the_configuration_stays():
    config = CONFIG_MAPPING["llava"]()
    config.quantization_config = {"quant_method": "awq"}
    config._attn_implementation = "sdpa"
    before = config.to_dict()
    with without_zero3():
        model = build_meta_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert config.to_dict() == before
    assert config._attn_implementation == "sdpa"


def test_the_auto_class_is_that_of_the_type():
    assert get_auto_class(CONFIG_MAPPING["llava"]()) is AutoModelForImageTextToText
    assert get_auto_class(CONFIG_MAPPING["phi4_multimodal"]()) is AutoModelForCausalLM


def test_a_configuration_that_builds_no_model_is_refused_with_the_librarys_reason():
    config = CONFIG_MAPPING["llava"]()
    config.vision_config.patch_size = 0
    with pytest.raises(NotAFamilyError, match="model_type=llava: no model can be built with this configuration: Zero"):
        build_meta_model(config)
    with pytest.raises(NotAFamilyError, match="has no model of this type in AutoModelForImageTextToText"):
        build_meta_model(CONFIG_MAPPING["vit"]())


class Remote(PreTrainedConfig):
    """A configuration whose class came out of a repository."""

    model_type = "remote"


def test_code_of_a_repository_has_to_name_the_models_class(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Remote, "__module__", "transformers_modules.somebody.configuration")
    assert get_auto_class(Remote()) is AutoModelForCausalLM
    with pytest.raises(NotAFamilyError, match=r"model_type=remote: its config\.json has no auto_map entry"):
        build_meta_model(Remote())
    config = Remote.from_dict({"auto_map": {"AutoModelForImageTextToText": "modeling.Model"}})
    assert get_auto_class(config) is AutoModelForImageTextToText
