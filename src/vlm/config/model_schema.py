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
REMOTE_CODE = runs_code("runs code out of a repository", is_false)
"""The metadata of each `trust_remote_code`."""


@dataclass
class EncoderConfig:
    """A visual encoder, and which of its features are read."""

    hf_name: str = MISSING
    """Hub name or local folder of an encoder: CLIP, SigLIP, DINOv2, any timm model (`timm/…`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null is the default branch."""
    trust_remote_code: bool = field(default=False, metadata=REMOTE_CODE)
    """Whether code out of the encoder's repository may run."""
    feature_layer: Any = None
    """Hidden state to read, counted as `hidden_states` is (-2: before the last layer), or a list of them, whose
    features are concatenated by channel; null: the encoder's output."""
    feature_strategy: str = field(default="patch", metadata=choices(allowed.FEATURE_STRATEGIES))
    """Which tokens of that state are read: `patch`, `cls+patch`, `cls` or `full` (all, registers included)."""
    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side in pixels of the square that images are squashed to, without cropping, for encoders that take several sizes
    (DINOv2); null: as the encoder's image processor does it."""


@dataclass
class VisualEncoderConfig(EncoderConfig):
    """Where the image features come from: one encoder, or several side by side."""

    extra_encoders: list[EncoderConfig] = field(default_factory=list)
    """More encoders of the same images; their features are concatenated to those of the first one by channel."""
    quantization: str | None = field(default=None, metadata=choices(allowed.QUANTIZATIONS))
    """Store its matrices in `8bit` or `4bit` (NF4); they stay frozen, adapters may train on them (`trainer.lora`)."""


@dataclass
class LanguageModelConfig:
    """The causal language model that reads image features among its text embeddings."""

    hf_name: str = MISSING
    """Hub name or local folder of any `AutoModelForCausalLM` with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null is the default branch."""
    trust_remote_code: bool = field(default=False, metadata=REMOTE_CODE)
    """Whether code out of the model's repository may run."""
    quantization: str | None = field(default=None, metadata=choices(allowed.QUANTIZATIONS))
    """Store its matrices in `8bit` or `4bit` (NF4); they stay frozen, adapters may train on them (`trainer.lora`)."""
    positions: str = field(default="plain", metadata=choices(allowed.POSITIONS))
    """`plain`: tokens of images are counted as text is; `mrope`: by time, row and column of an image, for language
    models that have such positions (Qwen3.5)."""
    balance_loss: float | None = field(default=None, metadata=at_least(0))
    """Coefficient of the loss that keeps tokens spread over the experts of a mixture of experts; 0: none; null: as the
    language model's own configuration has it (`output_router_logits`, `router_aux_loss_coef`)."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens added to the vocabulary. Where the language model is frozen, their embeddings alone train, at its rate."""


@dataclass
class ConnectorConfig:
    """The module that maps image features to the language model's embedding space."""

    type: str = field(default=MISSING, metadata=imports_unless(is_plain_name))
    """A name of the table `CONNECTORS`, or `package.module:Class` for a class of your own."""
    options: Options = field(default_factory=dict)
    """Keyword parameters of that class; null leaves a parameter at the class's own default."""
    name: str | None = None
    """Its name in the table of parts; null: its type."""


@dataclass
class AnyResConfig:
    """Tiles of an image at high resolution (LLaVA-NeXT, LLaVA-OneVision)."""

    grids: list[list[int]] | None = None
    """Allowed grids, each [rows, columns] of tiles as large as the visual encoder's input; the one that keeps the most
    pixels is taken. `[]`: each image is one square; null: as the checkpoint has it, else one square."""
    max_tiles: int | None = field(default=None, metadata=at_least(1))
    """The features of an image are shrunk bilinearly to about the tokens of so many tiles; null: all are kept."""
    tile_several: bool = False
    """Whether images are tiled in samples that have several of them; else each of these is one square."""


@dataclass
class NativeConfig:
    """Images in their own size and aspect ratio (`dataset.image_mode=native`), within bounds."""

    min_tokens: int = field(default=4, metadata=at_least(1))
    """The fewest tokens of an image: smaller images are enlarged. Where the connector reads images with queries, the
    fewest patches."""
    max_tokens: int = field(default=1024, metadata=at_least(1))
    """The most tokens of an image: larger images are made smaller. Where the connector reads images with queries, the
    most patches."""


@dataclass
class HeadConfig:
    """A head that predicts a class, a number or a ranking from hidden states of the language model, or embeds them."""

    task: str | None = field(default=None, metadata=choices(allowed.LOSSES))
    """`binary`, `multiclass`, `multilabel`, `regression`, `ordinal`, `pairwise` or `embedding`; null: there is no head,
    the model writes text."""
    labels: list[Any] | None = None
    """The labels in order (`binary`: negative, positive); null: those of the training records, sorted."""
    type: str = field(default="linear", metadata=choices(allowed.HEAD_TYPES, custom="package.module:Class"))
    """A name of the table `HEADS`, or `package.module:Class` for a class of your own."""
    options: Options = field(default_factory=dict)
    """Keyword parameters of that class; null leaves a parameter at the class's own default."""
    pooling: str = field(default="last", metadata=choices(allowed.POOLINGS))
    """Which hidden states the head reads: those of the `last` token, a mean over all (`mean`), `image` or `text`
    tokens, a learned weighting (`attention`), those of a learned token behind the prompt (`query`) or of a `token` in
    it; `first` and `alltoken` are those of earlier work."""
    layer: int | None = None
    """Hidden state to read, counted as `hidden_states` is (-2: before the last layer); null: the last."""
    token: str | None = None
    """With `pooling=token`: the token of the prompt whose hidden state is read, such as one of `new_tokens`."""
    loss: str | None = None
    """`bce`, `ce`, `focal`, `mse`, `huber`, `ordinal`, `margin` or `infonce`, as the task allows; null: its first."""
    loss_options: Options = field(default_factory=dict)
    """`gamma` of `focal`, `delta` of `huber` (in standard deviations of the labels), `margin` of `margin`; of `infonce`
    `temperature`, `learned_temperature`, `symmetric`, `widths` and `width_weights`."""
    class_weights: Any = None
    """Weight of each label in the loss: `balanced` (by its rarity in training), or a list in the order of labels."""
    label_smoothing: float = field(default=0.0, metadata=share(is_open_above=True))
    """Share of a target that is spread over all labels."""
    threshold_by: str = field(default="f1", metadata=choices(allowed.THRESHOLD_CRITERIA))
    """Measure that the threshold of `binary` and `multilabel` maximises on the evaluation records: `f1`, `accuracy` or
    `youden`; `none` leaves the threshold at 0.5."""
    weight: float = field(default=1.0, metadata=above(0))
    """Weight of its loss among those of several heads."""
    dim: int | None = field(default=None, metadata=at_least(1))
    """How many numbers a vector of `embedding` has; null: as many as hidden states."""
    prompts: Options = field(default_factory=dict)
    """`query` and `document` of `embedding`: the system turn of what is searched by, and of what is searched for."""


@dataclass
class HeadsConfig(HeadConfig):
    """One prediction head, or several."""

    name: str = "label"
    """The name of the first head where there are several: the key of its value in a record's `label`."""
    extra_heads: dict[str, HeadConfig] = field(default_factory=dict)
    """More heads by their names."""
    generation_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the loss of the records' replies beside the heads'; 0: the model does not learn to write replies."""

    @property
    def by_name(self) -> dict[str, HeadConfig]:
        """Return all heads by their names; none where there is no task."""
        return {} if self.task is None else {self.name: self, **self.extra_heads}


@dataclass
class ModelConfig:
    """A vision-language model as it exists on the Hub, or three parts and what belongs to their composition."""

    hf_name: str | None = None
    """Hub name or local folder of a whole vision-language model of a family in `vlm models`, in place of the parts;
    null: the model is composed."""
    revision: str | None = None
    """Branch, tag or commit of `hf_name` on the Hub; null is the default branch."""
    trust_remote_code: bool = field(default=False, metadata=REMOTE_CODE)
    """Whether code out of the repository of `hf_name` may run."""
    unproved: bool = False
    """Whether a whole model trains although a proof about it could not be made, see `vlm models --check`. One that
    fails a proof is refused all the same."""
    visual_encoder: VisualEncoderConfig = field(default_factory=VisualEncoderConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    anyres: AnyResConfig = field(default_factory=AnyResConfig)
    processor: Options = field(default_factory=dict)
    """With `hf_name`: options of its image processor (`max_pixels`, `size.longest_edge`, `max_patches` …), and under
    `video` of its video processor, as the installed classes take them; null leaves an option as it is saved."""
    native: NativeConfig = field(default_factory=NativeConfig)
    head: HeadsConfig = field(default_factory=HeadsConfig)
    image_token: str = "<image>"
    """The placeholder that image features replace; added to a tokenizer that does not know it."""
    image_start_token: str | None = None
    """A token before each image (`<|vision_start|>`, `<im_start>`); null: none."""
    image_end_token: str | None = None
    """A token after each image; null: none."""
    attn_implementation: str = field(default="auto", metadata=choices(allowed.ATTENTION_IMPLEMENTATIONS))
    """`auto` (the best that is installed), `flash_attention_2`, `sdpa`, `flex_attention` or `eager`."""
