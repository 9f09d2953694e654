"""Checks whether the model of a checkpoint of this framework can compute with its configuration.

transformers checks the configurations of families. To check another field, add it to a function below.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields

from transformers import GenerationConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from vlm.checks.checkpoint_files import shown
from vlm.config.choices import LOSSES
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.configuration_vlm import FEATURE_STRATEGIES, POSITIONS
from vlm.models.head_tasks import CLASSIFICATION_TASKS, TASKS
from vlm.models.native import NativeResolution
from vlm.models.poolings import POOLINGS

MAX_TILES = 1024
"""Maximum number of tiles of an image."""
MAX_PATCHES = 2**20
"""Maximum number of patches of an image."""
MAX_LABELS = MAX_TOKENS = 10**7
MAX_VECTOR = 65536

Problem = tuple[str, object, str]
"""A key, its value, and what is needed."""


def check_config(config: PreTrainedConfig, label: str) -> None:
    """Refuse a configuration with a value that its model cannot compute with.

    Args:
        config: any configuration; `vlm` and `vlm_prediction` are this framework's.
        label: the checkpoint, for messages.

    Raises:
        ValueError: with the key, its value and what is needed.
    """
    for key, value, needed in _problems(config):
        raise ValueError(f"{label}: config.json has {key}={shown(value)}; needed: {needed}")


def _problems(config: PreTrainedConfig) -> Iterator[Problem]:
    yield from _quantization_problems(config)
    if config.model_type == "vlm_prediction":
        yield from _head_problems(config)
        config = config.body_config
        yield from _quantization_problems(config)
    if config.model_type == "vlm":
        yield from _composed_problems(config)


def _quantization_problems(config: PreTrainedConfig) -> Iterator[Problem]:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if isinstance(quantization, dict) and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        yield (
            "quantization_config.quant_method",
            method,
            f"one of {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}",
        )
    elif not hasattr(quantization, "quant_method") and not isinstance(quantization, dict):
        yield "quantization_config", quantization, "an object"


ID_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
NUMBER_KEYS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
)  # fmt: skip
SWITCH_KEYS = ("do_sample", "use_cache", "early_stopping", "renormalize_logits", "remove_invalid_values")
OTHER_KEYS = (
    "transformers_version",
    "cache_implementation",
    "_from_model_config",
    "cache_config",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
)
"""Settings that change no answer; those of an assistant concern a second model, which is never used."""
NEUTRAL = {
    "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0, "guidance_scale": 1,
    "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "token_healing": False, "low_memory": False,
    "disable_compile": False, "constraints": [], "force_words_ids": [],
}  # fmt: skip
"""Key -> the value that changes nothing, which earlier versions of transformers saved."""
READ_KEYS = {*vars(GenerationConfig()), *NEUTRAL, "dola_layers"}
"""Keys that generation reads; it ignores others, such as those of a model's own code."""
MAX_BEAMS = 64


def check_generation_config(settings: GenerationConfig, num_tokens: int, name: str) -> None:
    """Refuse impossible generation settings of a checkpoint, and those that change how answers are generated.

    Args:
        settings: the generation settings of the model.
        num_tokens: the number of tokens for which the model has embeddings.
        name: the checkpoint, for messages.

    Raises:
        ValueError: with the key and its value.
    """
    for key, value in settings.to_diff_dict().items():
        ids = value if isinstance(value, list) else [value]
        is_fine = value is None or (
            all(_is_int(each, -1, num_tokens - 1) for each in ids)
            if key in ID_KEYS
            else _are_words(value, num_tokens)
            if key == "bad_words_ids"
            else _is_number(value)
            if key in NUMBER_KEYS
            else isinstance(value, bool)
            if key in SWITCH_KEYS
            else _is_int(value, 1, MAX_BEAMS)
            if key == "num_beams"
            else value == NEUTRAL[key]
            if key in NEUTRAL
            else key not in READ_KEYS or key in OTHER_KEYS or key.startswith(("output_", "return_dict", "_"))
        )
        if not is_fine:
            raise ValueError(
                f"{name}: generation_config.json has {key}={shown(value)}, which is not allowed; remove it"
            )


def _are_words(value: object, num_tokens: int) -> bool:
    """Return whether a value is a list of words, each a list of token ids, as in Idefics and SmolVLM."""
    words = value if isinstance(value, list) else [None]
    return all(
        isinstance(word, list) and word and all(_is_int(each, 0, num_tokens - 1) for each in word) for word in words
    )


def _composed_problems(config: PreTrainedConfig) -> Iterator[Problem]:
    connector = config.connector
    is_connector = isinstance(connector, dict) and set(connector) == {"type", "options"}
    if not (is_connector and isinstance(connector["type"], str) and isinstance(connector["options"], dict)):
        yield "connector", connector, "an object with type (a text) and options (an object)"
    if not _is_int(config.image_token_id, 0, MAX_TOKENS - 1):
        yield "image_token_id", config.image_token_id, "the id of a token"
    for key, least in (("num_patches", 1), ("vision_dim", 1)):
        if not _is_int(getattr(config, key), least, 10**6):
            yield key, getattr(config, key), f"a whole number from {least}"
    for number, (selection, name) in enumerate(zip(config.feature_selections, config.encoder_names, strict=True)):
        prefix = f"beside[{number - 1}]." if number else ""
        yield from (
            (prefix + key, value, need) for key, value, need in _selection_problems(selection, getattr(config, name))
        )
    if not isinstance(config.recipe, dict):
        yield "recipe", config.recipe, "an object"
    unread = config.unread_parameters
    if not isinstance(unread, list) or not all(isinstance(name, str) for name in unread):
        yield "unread_parameters", unread, "a list of names"
    if config.positions not in POSITIONS:
        yield "positions", config.positions, f"one of {', '.join(POSITIONS)}"
    if config.anyres is not None:
        yield from _anyres_problems(config.anyres)
    if config.native is not None:
        yield from _native_problems(config.native)


def _selection_problems(selection: Mapping[str, object], encoder: object) -> Iterator[Problem]:
    layer, strategy = selection["feature_layer"], selection["feature_strategy"]
    num_layers = getattr(encoder, "num_hidden_layers", None)
    most = num_layers if isinstance(num_layers, int) else 4096
    layers = layer if isinstance(layer, list) and layer else [0 if layer is None else layer]
    if not all(_is_int(each, -most - 1, most) for each in layers):
        yield "feature_layer", layer, f"a layer from {-most - 1} to {most}, several in a list, or null"
    if strategy not in FEATURE_STRATEGIES:
        yield "feature_strategy", strategy, f"one of {', '.join(FEATURE_STRATEGIES)}"
    if not _is_int(selection["num_prefix_tokens"], 0, 10**4):
        yield "num_prefix_tokens", selection["num_prefix_tokens"], "a whole number from 0"


def _anyres_problems(anyres: object) -> Iterator[Problem]:
    names = {"grids", "tile_size", "tokens_side", "max_tiles", "tile_several"}
    if not isinstance(anyres, dict) or not {"grids", "tile_size", "tokens_side"} <= set(anyres) <= names:
        yield "anyres", anyres, f"an object with {', '.join(sorted(names))}"
        return
    grids = anyres["grids"]
    if not isinstance(grids, list) or not grids or not all(_is_grid(grid) for grid in grids):
        yield "anyres.grids", grids, f"a list of [rows, columns], of at most {MAX_TILES} tiles"
    for key, most in (("tile_size", 16384), ("tokens_side", 4096)):
        if not _is_int(anyres[key], 1, most):
            yield f"anyres.{key}", anyres[key], f"a whole number from 1 to {most:,}"
    if (tiles := anyres.get("max_tiles")) is not None and not _is_int(tiles, 1, MAX_TILES):
        yield "anyres.max_tiles", tiles, f"a whole number from 1 to {MAX_TILES:,}, or null"


def _native_problems(native: object) -> Iterator[Problem]:
    names = {field.name for field in fields(NativeResolution)}
    if not isinstance(native, dict) or set(native) != names:
        yield "native", native, f"an object with {', '.join(sorted(names))}"
        return
    for key, most in (("patch_size", 1024), ("multiple", 64), ("factor", 64)):
        if not _is_int(native[key], 1, most):
            yield f"native.{key}", native[key], f"a whole number from 1 to {most:,}"
    for key in ("min_patches", "max_patches"):
        if not _is_int(native[key], 1, MAX_PATCHES):
            yield f"native.{key}", native[key], f"a whole number from 1 to {MAX_PATCHES:,}"
    if (queries := native["num_queries"]) is not None and not _is_int(queries, 1, MAX_PATCHES):
        yield "native.num_queries", queries, f"a whole number from 1 to {MAX_PATCHES:,}, or null"


def _is_grid(grid: object) -> bool:
    return (
        isinstance(grid, list)
        and len(grid) == 2
        and all(_is_int(side, 1, MAX_TILES) for side in grid)
        and grid[0] * grid[1] <= MAX_TILES
    )


def _head_problems(config: PreTrainedConfig) -> Iterator[Problem]:
    text = config.get_text_config()
    # the ids of media are only compared, and Llama 3.2 Vision's is after its vocabulary
    for key, number in (("media_token_ids", MAX_TOKENS), ("suffix_ids", text.vocab_size)):
        if not all(_is_int(token_id, 0, number - 1) for token_id in getattr(config, key)):
            yield key, getattr(config, key), f"ids of {number:,} tokens"
    if not config.heads:
        yield "heads", config.heads, "at least one head"
    names = [head.name for head in config.settings]
    if len(set(map(str, names))) < len(names):
        yield "heads", names, "names that differ"
    for number, head in enumerate(config.settings):
        for key, value, needed in _problems_of_head(head, text):
            yield f"heads[{number}].{key}", value, needed


def _problems_of_head(head: HeadSettings, text: PreTrainedConfig) -> Iterator[Problem]:
    if not isinstance(head.name, str) or not head.name or "." in head.name:
        yield "name", head.name, "a text without a full stop"
    if head.task not in TASKS:
        yield "task", head.task, f"one of {', '.join(TASKS)}"
        return
    if head.dim is not None and not _is_int(head.dim, 1, MAX_VECTOR):
        yield "dim", head.dim, f"a whole number from 1 to {MAX_VECTOR:,}, or null"
    if not isinstance(head.prompts, dict) or not all(isinstance(text, str) for text in head.prompts.values()):
        yield "prompts", head.prompts, "an object of texts"
    least = 2 if head.task in CLASSIFICATION_TASKS and head.task != "multilabel" else 1
    is_list = isinstance(head.labels, list) and len(head.labels) <= MAX_LABELS
    if head.task in CLASSIFICATION_TASKS and not (is_list and len(head.labels) >= least):
        yield "labels", head.labels, f"a list of at least {least}"
    if head.task == "binary" and len(head.labels) != 2:
        yield "labels", head.labels, "the negative label and the positive one"
    if head.loss not in ("", *LOSSES[head.task]):
        yield "loss", head.loss, f"one of {', '.join(LOSSES[head.task])}"
    if head.pooling not in POOLINGS:
        yield "pooling", head.pooling, f"one of {', '.join(POOLINGS)}"
    layers = text.num_hidden_layers
    if head.layer is not None and not _is_int(head.layer, -layers - 1, layers):
        yield "layer", head.layer, f"a layer from {-layers - 1} to {layers}, or null"
    if head.token_id is not None and not _is_int(head.token_id, 0, text.vocab_size - 1):
        yield "token_id", head.token_id, f"the id of one of {text.vocab_size:,} tokens, or null"
    for key in ("shift", "scale", "weight", "label_smoothing", "temperature"):
        if not _is_number(getattr(head, key)) or (key in ("scale", "temperature") and getattr(head, key) <= 0):
            yield key, getattr(head, key), "a number" + (" above 0" if key in ("scale", "temperature") else "")
    several = head.task == "multilabel"
    for key, counts in (("threshold", (len(head.labels),) if several else ()), ("class_weights", (len(head.labels),))):
        value = getattr(head, key)
        numbers = value if isinstance(value, list) else [0.0 if value is None else value]
        if not all(map(_is_number, numbers)) or (isinstance(value, list) and len(value) not in counts):
            yield key, value, "null, a number" + (", or one for each label" if counts else "")
    for key in ("options", "loss_options"):
        if not isinstance(getattr(head, key), dict):
            yield key, getattr(head, key), "an object"
        elif not _is_number(temperature := getattr(head, key).get("temperature", 1)) or temperature <= 0:
            yield f"{key}.temperature", temperature, "a number above 0"
    if not isinstance(head.type, str):
        yield "type", head.type, "a text"


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
