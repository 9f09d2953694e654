"""The configuration: nested parts, and the count of features."""

import re
import runpy

import pytest
import transformers
from transformers import AutoConfig, CLIPVisionConfig, Qwen2Config

from vlm.models import VLMConfig, configuration_vlm
from vlm.models.configuration_vlm import FEATURE_STRATEGIES

COUNTS = {"patch": 9, "cls+patch": 10, "cls": 1, "full": 12}


@pytest.mark.parametrize("strategy", FEATURE_STRATEGIES)
def test_features_of_each_strategy(strategy: str):
    """9 patches behind a CLS token and two registers."""
    config = VLMConfig(feature_strategy=strategy, num_prefix_tokens=3, num_patches=9)
    assert config.num_features == COUNTS[strategy]


@pytest.mark.parametrize("as_dict", [False, True])
def test_parts_are_nested_as_they_are(as_dict: bool):
    parts = {"vision_config": CLIPVisionConfig(hidden_size=24), "text_config": Qwen2Config(hidden_size=48)}
    config = VLMConfig(**{name: part.to_dict() if as_dict else part for name, part in parts.items()})
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert isinstance(config.get_text_config(), Qwen2Config)
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (24, 48)


def test_it_needs_no_arguments():
    """transformers compares a configuration with an empty one when it saves."""
    config = VLMConfig()
    assert AutoConfig.for_model("vlm").to_dict() == config.to_dict()
    assert config.connector["type"] == "linear"
    assert config.tie_word_embeddings is False


def test_two_configurations_share_nothing():
    one, other = VLMConfig(), VLMConfig()
    one.recipe["x"] = 1
    one.auto_map["AutoConfig"] = "x"
    one.connector["options"]["y"] = 2
    assert (other.recipe, other.connector["options"]) == ({}, {})
    assert other.auto_map["AutoConfig"] != "x"


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.9.0"])
def test_a_transformers_that_is_too_old_is_refused(version: str, monkeypatch: pytest.MonkeyPatch):
    """Where a checkpoint's code is read; in some of these it would load, and answer otherwise."""
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers 5\.10 or newer; {re.escape(version)} is installed"):
        runpy.run_path(configuration_vlm.__file__)


def test_later_transformers_are_taken(monkeypatch: pytest.MonkeyPatch):
    for version in ("5.10.1", "5.23.0", "6.0.0.dev0"):
        monkeypatch.setattr(transformers, "__version__", version)
        assert runpy.run_path(configuration_vlm.__file__)["VLMConfig"].model_type == "vlm"
