"""Generation settings of checkpoints: those that published models have pass, those that cannot be meant do not."""

from typing import Any

import pytest
from transformers import GenerationConfig

from vlm.assembly.config_checks import check_generation_config

NUM_TOKENS = 100


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": [[32], [33, 34]], "_from_model_config": True, "eos_token_id": [2, 35]},
        {"do_sample": False, "temperature": 1e-06, "top_p": 0.9, "top_k": 1},
        {"chat_format": "chatml", "max_window_size": 6144},
        {"num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "guidance_scale": 1.0},
        {"forced_eos_token_id": 2, "begin_suppress_tokens": [3], "num_assistant_tokens": 20},
        {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0, "cache_implementation": "hybrid"},
    ],
)
def test_settings_of_published_models_pass(settings: dict[str, Any]):
    check_generation_config(GenerationConfig.from_dict(settings), NUM_TOKENS, "name")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", [[100]]), ("bad_words_ids", [[]]), ("bad_words_ids", [["x"]]), ("forced_bos_token_id", 100),
        ("num_beam_groups", 2), ("penalty_alpha", 0.6), ("dola_layers", "high"),
        ("stop_strings", ["a"]), ("sequence_bias", [[[3], 9.0]]), ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 4),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(key: str, value: object):
    with pytest.raises(ValueError, match=f"^name: generation_config.json has {key}="):
        check_generation_config(GenerationConfig.from_dict({key: value}), NUM_TOKENS, "name")
