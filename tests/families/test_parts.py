"""Parts by configuration: composed models, heads, exceptions of the table, and one build for equal configurations."""

import pytest
from transformers import CONFIG_MAPPING

from vlm.families import parts
from vlm.families.parts import PartNames, get_form, get_part_names
from vlm.families.table import FAMILIES, Family, get_family


def test_the_longest_prefix_wins_and_none_is_an_error():
    names = PartNames({"a.": "language_model", "a.b.": "connector"}, ("a.b.c",))
    assert names.part_of("a.x") == "language_model"
    assert names.part_of("a.b.x") == "connector"
    assert names.is_unused("a.b.c")
    assert not names.is_unused("a.b.d")
    with pytest.raises(ValueError, match=r"b\.x: matches no part"):
        names.part_of("b.x")


def test_what_a_trial_found_is_unused_in_every_layer_and_below_heads():
    config = CONFIG_MAPPING["llava"]()
    names = get_part_names(config, ["model.language_model.layers.*.indexer.", "model.language_model.gate"])
    assert get_form("body.model.layers.3.experts.12.weight") == "model.layers.*.experts.*.weight"
    for start in ("", "body."):
        assert names.is_unused(f"{start}model.language_model.layers.7.indexer.wk.weight")
        assert names.is_unused(f"{start}model.language_model.gate")
        assert not names.is_unused(f"{start}model.language_model.layers.7.mlp.up_proj.weight")
    assert not get_part_names(config).is_unused("model.language_model.gate")


def test_equal_configurations_build_one_model(monkeypatch: pytest.MonkeyPatch):
    built: list[object] = []
    build = parts.build_meta_model
    monkeypatch.setattr(parts, "build_meta_model", lambda config: built.append(config) or build(config))
    parts._get_family_parts.cache_clear()
    first, second = (CONFIG_MAPPING["qwen3_vl"]() for _ in range(2))
    assert get_part_names(first) is get_part_names(second)
    assert len(built) == 1
    second.text_config.num_hidden_layers -= 1
    assert get_part_names(second) is not get_part_names(first)
    assert len(built) == 2


def test_exceptions_of_a_row_come_first(monkeypatch: pytest.MonkeyPatch):
    row = Family("x", connectors=("model.vision_tower.embeddings.",), unused_prefixes=("lm_head.",))
    monkeypatch.setitem(FAMILIES, "llava", row)
    parts._get_family_parts.cache_clear()
    names = get_part_names(CONFIG_MAPPING["llava"]())
    parts._get_family_parts.cache_clear()
    assert names.part_of("model.vision_tower.embeddings.x") == "connector"
    assert names.is_unused("lm_head.weight")
    assert names.is_unused("model.vision_tower.post_layernorm.weight")


def test_a_type_without_a_row_has_no_exceptions():
    assert get_family("aria") == Family("aria")
    assert "aria" not in FAMILIES
