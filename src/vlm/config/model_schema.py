"""The keys of the section `model`: the parts of a model, their composition, prediction heads.

Imports no torch and no omegaconf, see `schema.py`.
"""

from dataclasses import dataclass, field
from typing import Any

from vlm.config import choices as allowed
from vlm.config.rules import above, at_least, choices, imports_unless, is_false, is_plain_name, runs_code, share

Options = dict[str, Any]
"""Keyword parameters by name, as YAML gives them."""
MISSING: Any = "???"
"""The default of a key that has to be given, as omegaconf spells it."""
REMOTE_CODE = runs_code("runs code from a repository", is_false)
"""The metadata of each `trust_remote_code`."""


@dataclass
class EncoderConfig:
    """A visual encoder, and which of its features are used."""

    hf_name: str = MISSING
    """Hub name or local folder of an encoder: CLIP, SigLIP, DINOv2, or any timm model (`timm/…`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null: the default branch."""
    trust_remote_code: bool = field(default=False, metadata=REMOTE_CODE)
    """Whether code from the encoder's repository may run."""
    feature_layer: Any = None
    """Hidden state to use, with the index of `hidden_states` (-2: before the last layer), or a list of them, whose
    features are concatenated by channel; null: the encoder's output."""
    feature_strategy: str = field(default="patch", metadata=choices(allowed.FEATURE_STRATEGIES))
    """Which tokens of this state to use: `patch`, `cls+patch`, `cls` or `full` (all, registers included)."""
    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side in pixels of the square that images are squashed to, without cropping, for encoders that support several
    sizes (DINOv2); null: resized by the encoder's image processor."""


@dataclass
class VisualEncoderConfig(EncoderConfig):
    """Where the image features come from: one encoder, or several side by side."""

    extra_encoders: list[EncoderConfig] = field(default_factory=list)
    """More encoders of the same images; their features are concatenated with those of the first by channel."""
    quantization: str | None = field(default=None, metadata=choices(allowed.QUANTIZATIONS))
    """Store its matrices in `8bit` or `4bit` (NF4); they stay frozen, and adapters may train on them
    (`trainer.lora`)."""


@dataclass
class LanguageModelConfig:
    """The causal language model that reads image features among its text embeddings."""

    hf_name: str = MISSING
    """Hub name or local folder of any `AutoModelForCausalLM` with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null: the default branch."""
    trust_remote_code: bool = field(default=False, metadata=REMOTE_CODE)
    """Whether code from the model's repository may run."""
    quantization: str | None = field(default=None, metadata=choices(allowed.QUANTIZATIONS))
    """Store its matrices in `8bit` or `4bit` (NF4); they stay frozen, and adapters may train on them
    (`trainer.lora`)."""
    positions: str = field(default="plain", metadata=choices(allowed.POSITIONS))
    """`plain`: image tokens are numbered like text; `mrope`: by time, row and column of the image, for language models
    with such positions (Qwen3.5)."""
    balance_loss: float | None = field(default=None, metadata=at_least(0))
    """Coefficient of the load-balancing loss of a mixture of experts; 0: none; null: as in the language model's own
    configuration (`output_router_logits`, `router_aux_loss_coef`)."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the vocabulary. If the language model is frozen, only their embeddings train, at its rate."""


@dataclass
class ConnectorConfig:
    """The module that maps image features to the language model's embedding space."""

    type: str = field(default=MISSING, metadata=imports_unless(is_plain_name))
    """A name of the table `CONNECTORS`, or `package.module:Class` for a class of your own."""
    options: Options = field(default_factory=dict)
    """Keyword parameters of this class; null uses the default of the class."""
    name: str | None = None
    """Name shown in the table of parts; null: its type."""


@dataclass
class AnyResConfig:
    """Tiles of an image at high resolution (LLaVA-NeXT, LLaVA-OneVision)."""

    grids: list[list[int]] | None = None
    """Allowed grids, each [rows, columns] in tiles of the visual encoder's input size; the grid that keeps the most
    pixels is chosen. `[]`: each image is one square; null: as in the checkpoint, or else one square."""
    max_tiles: int | None = field(default=None, metadata=at_least(1))
    """Shrink the features of an image bilinearly to about the tokens of this many tiles; null: keep all."""
    tile_several: bool = False
    """Whether to tile images in samples with several images; otherwise each of them is one square."""


@dataclass
class NativeConfig:
    """Images at their own size and aspect ratio (`dataset.image_mode=native`), within limits."""

    min_tokens: int = field(default=4, metadata=at_least(1))
    """Minimum number of tokens of an image: smaller images are enlarged. If the connector uses queries, the minimum
    number of patches."""
    max_tokens: int = field(default=1024, metadata=at_least(1))
    """Maximum number of tokens of an image: larger images are shrunk. If the connector uses queries, the maximum number
    of patches."""


@dataclass
class HeadConfig:
    """A head that predicts a class, a number, a ranking or a vector from hidden states of the language model."""

    task: str | None = field(default=None, metadata=choices(allowed.LOSSES))
    """`binary`, `multiclass`, `multilabel`, `regression`, `ordinal`, `pairwise` or `embedding`; null: no head, the
    model generates text."""
    labels: list[Any] | None = None
    """The labels in order (`binary`: negative, positive); null: those of the training records, sorted."""
    type: str = field(default="linear", metadata=choices(allowed.HEAD_TYPES, custom="package.module:Class"))
    """A name of the table `HEADS`, or `package.module:Class` for a class of your own."""
    options: Options = field(default_factory=dict)
    """Keyword parameters of this class; null uses the default of the class."""
    pooling: str = field(default="last", metadata=choices(allowed.POOLINGS))
    """Which hidden states the head reads: the `last` token; the mean over all (`mean`), `image` or `text` tokens; a
    learned weighting (`attention`); a learned token after the prompt (`query`); or a `token` in it. `first` (the
    first token) and `alltoken` (the mean of the head's outputs at all tokens) are for comparison with earlier work."""
    layer: int | None = None
    """Hidden state to read, with the index of `hidden_states` (-2: before the last layer); null: the last."""
    token: str | None = None
    """With `pooling=token`: the token of the prompt whose hidden state is read, such as one of `new_tokens`."""
    loss: str | None = None
    """`bce`, `ce`, `focal`, `mse`, `huber`, `ordinal`, `margin` or `infonce`, depending on the task; null: the first
    that the task allows."""
    loss_options: Options = field(default_factory=dict)
    """`gamma` for `focal`, `delta` for `huber` (in standard deviations of the labels), `margin` for `margin`; for
    `infonce` `temperature`, `learned_temperature`, `symmetric`, `widths` and `width_weights`."""
    class_weights: Any = None
    """Weight of each label in the loss: `balanced` (by inverse frequency in training), or a list in the order of
    labels."""
    label_smoothing: float = field(default=0.0, metadata=share(is_open_above=True))
    """Share of a target that is spread over all labels."""
    threshold_by: str = field(default="f1", metadata=choices(allowed.THRESHOLD_CRITERIA))
    """Metric that the threshold of `binary` and `multilabel` maximises on the evaluation records: `f1`, `accuracy` or
    `youden`; `none` keeps the threshold at 0.5."""
    weight: float = field(default=1.0, metadata=above(0))
    """Weight of its loss, relative to other heads."""
    dim: int | None = field(default=None, metadata=at_least(1))
    """Dimension of the vectors of `embedding`; null: that of the hidden states."""
    prompts: Options = field(default_factory=dict)
    """For `embedding`: the system turns `query` and `document` of the two sides."""


@dataclass
class HeadsConfig(HeadConfig):
    """One prediction head, or several."""

    name: str = "label"
    """Name of the first head if there are several: the key of its value in a record's `label`."""
    extra_heads: dict[str, HeadConfig] = field(default_factory=dict)
    """More heads, by name."""
    generation_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the loss of the records' replies, relative to the heads; 0: the model is not trained on replies."""

    @property
    def by_name(self) -> dict[str, HeadConfig]:
        """Return all heads by their names; none where there is no task."""
        return {} if self.task is None else {self.name: self, **self.extra_heads}


@dataclass
class ModelConfig:
    """A whole vision-language model of the Hub, or three parts and how they are composed."""

    hf_name: str | None = None
    """Hub name or local folder of a whole vision-language model of a family in `vlm models`, instead of the parts;
    null: the model is composed of parts."""
    revision: str | None = None
    """Branch, tag or commit of `hf_name` on the Hub; null: the default branch."""
    trust_remote_code: bool = field(default=False, metadata=REMOTE_CODE)
    """Whether code from the repository of `hf_name` may run."""
    unproved: bool = False
    """Whether to train a whole model although one of its proofs could not be made, see `vlm models --check`. A model
    that fails a proof is rejected in any case."""
    visual_encoder: VisualEncoderConfig = field(default_factory=VisualEncoderConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    anyres: AnyResConfig = field(default_factory=AnyResConfig)
    processor: Options = field(default_factory=dict)
    """With `hf_name`: options of its image processor (`max_pixels`, `size.longest_edge`, `max_patches` …), and under
    `video` those of its video processor, as the installed classes accept them; null keeps the saved value."""
    native: NativeConfig = field(default_factory=NativeConfig)
    head: HeadsConfig = field(default_factory=HeadsConfig)
    image_token: str = "<image>"
    """The placeholder that image features replace; added to the tokenizer if it lacks it."""
    image_start_token: str | None = None
    """A token before each image (`<|vision_start|>`, `<im_start>`); null: none."""
    image_end_token: str | None = None
    """A token after each image; null: none."""
    attn_implementation: str = field(default="auto", metadata=choices(allowed.ATTENTION_IMPLEMENTATIONS))
    """`auto` (the fastest that is installed), `flash_attention_2`, `sdpa`, `flex_attention` or `eager`."""
