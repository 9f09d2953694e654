"""The configuration of a composed model: its parts, and how image features become tokens.

Hub code: imports transformers only. Wherever a checkpoint's own code runs, this file is read first, so it refuses
versions of transformers that are too old. The parts' own configurations are nested unchanged (`vision_config`,
`text_config`), so that no encoder or language model of transformers needs a field here.
"""

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

MIN_TRANSFORMERS_VERSION = (5, 10)
"""Older versions fail, or load and answer otherwise (5.0)."""

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < MIN_TRANSFORMERS_VERSION:
    raise ImportError(
        f"this model needs transformers {'.'.join(map(str, MIN_TRANSFORMERS_VERSION))} or newer; "
        f"{transformers.__version__} is installed, which would give other answers: pip install -U transformers"
    )

POSITIONS = ("plain", "mrope")
FEATURE_STRATEGIES = ("patch", "cls+patch", "cls", "full")

AUTO_MAP = {
    "AutoConfig": "configuration_vlm.VLMConfig",
    "AutoModel": "modeling_vlm.VLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_vlm.VLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_vlm.VLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vlm.VLMForConditionalGeneration",
    "AutoProcessor": "processing_vlm.VLMProcessor",
}
"""Auto class -> the class to load where a checkpoint's own code is trusted; written here only."""


class VLMConfig(PreTrainedConfig):
    """Configuration of `VLMForConditionalGeneration`.

    Args:
        vision_config: configuration of the visual encoder, with its `model_type`.
        text_config: configuration of the causal language model, with its `model_type`.
        connector: `{"type": name, "options": {…}}`, see `connectors.py`.
        feature_layer: index into the encoder's `hidden_states` (0: embeddings), or several, whose features are
            concatenated by channel; None for the encoder's own output.
        feature_strategy: `patch`, `cls+patch`, `cls` or `full`.
        num_prefix_tokens: number of tokens that the encoder puts before the patches (CLS, registers).
        num_patches: number of patches of one image.
        vision_dim: width of the features that the connector reads.
        beside: `{"feature_layer": …, "feature_strategy": …, "num_prefix_tokens": …}` of each further encoder; their
            configurations are `vision_config_2`, `vision_config_3` and so on.
        unread_parameters: names of encoder parameters that the features do not depend on (norms behind them, layers
            after the selected one).
        image_token_id: id of the placeholder token.
        anyres: the fields of `anyres.AnyRes`, where images are cut into tiles; None where each is one square.
        native: the fields of `native.NativeResolution`, where images keep their size; None where all have one size.
        positions: `plain`, or `mrope` for positions in rows and columns of images, see `language_inputs.py`.
        recipe: the `model` section of the run that built it.
    """

    model_type = "vlm"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vision_config: dict | PreTrainedConfig | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        connector: dict | None = None,
        feature_layer: int | list[int] | None = None,
        feature_strategy: str = "patch",
        num_prefix_tokens: int = 0,
        num_patches: int = 0,
        vision_dim: int = 0,
        beside: list[dict] | None = None,
        unread_parameters: list[str] | None = None,
        image_token_id: int = 0,
        anyres: dict | None = None,
        native: dict | None = None,
        positions: str = "plain",
        recipe: dict | None = None,
        **kwargs,
    ):
        self.vision_config = as_config(vision_config, "siglip_vision_model")
        self.beside = beside or []
        for name in self.encoder_names[1:]:
            setattr(self, name, as_config(kwargs.pop(name), "siglip_vision_model"))
        self.text_config = as_config(text_config, "llama")
        self.connector = connector or {"type": "linear", "options": {}}
        self.feature_layer = feature_layer
        self.feature_strategy = feature_strategy
        self.num_prefix_tokens = num_prefix_tokens
        self.num_patches = num_patches
        self.vision_dim = vision_dim
        self.unread_parameters = unread_parameters or []
        self.image_token_id = image_token_id
        self.anyres = anyres
        self.native = native
        self.positions = positions
        self.recipe = recipe or {}
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        kwargs["tie_word_embeddings"] = False  # the language model ties its own, nested
        super().__init__(**kwargs)

    @property
    def encoder_names(self) -> list[str]:
        """The attributes that hold the configurations of the visual encoders."""
        return encoder_names(1 + len(self.beside))

    @property
    def sub_configs(self) -> dict[str, type]:
        """The nested configurations, on which transformers sets dtypes and attention implementations too."""
        return dict.fromkeys([*self.encoder_names, "text_config"], AutoConfig)

    @property
    def feature_selections(self) -> list[dict]:
        """The keyword arguments of `encoders.read_features` for each encoder."""
        names = ("feature_layer", "feature_strategy", "num_prefix_tokens")
        return [{name: getattr(self, name) for name in names}, *self.beside]

    @property
    def num_features(self) -> int:
        """The number of features of one image that the connector reads."""
        patches = self.num_patches
        counts = {"patch": patches, "cls+patch": patches + 1, "cls": 1, "full": patches + self.num_prefix_tokens}
        return counts[self.feature_strategy]


def encoder_names(count: int) -> list[str]:
    """Return the names of the configurations of `count` visual encoders."""
    return ["vision_config", *(f"vision_config_{number}" for number in range(2, count + 1))]


def as_config(config: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    """Return a nested configuration as an object."""
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config or {})
    return CONFIG_MAPPING[values.pop("model_type", default_type)](**values)
