"""Every key that a run's YAML or command line may set, with its type, its default and what it means.

Imports not torch, so that a mistyped key is refused in a second, nor omegaconf, which cannot be installed beside
lmms-eval. A new key is a field here; a default lives here and nowhere else. `null` in a YAML file means what the
field's docstring says it means.

The keys of `transformers.TrainingArguments` are not copied: they are read out of its source (`training_fields.py`), so
whatever the installed version takes can be set as `trainer.<name>`.
"""

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from vlm.config.choices import (
    ATTENTION_IMPLEMENTATIONS,
    CACHE_IMPLEMENTATIONS,
    EVAL_METRICS,
    FEATURE_STRATEGIES,
    HEAD_TYPES,
    IMAGE_MODES,
    LOSSES,
    MUON,
    POOLINGS,
    QUANTIZATIONS,
    SAMPLING_STRATEGIES,
    THRESHOLD_CRITERIA,
)
from vlm.config.rules import above, at_least, choices, share
from vlm.config.training_fields import read_training_argument_choices, read_training_argument_fields

MISSING: Any = "???"
"""What omegaconf calls a value that has to be given."""

PARTS = ("visual_encoder", "connector", "language_model")
"""The parts of a model: Hydra groups, dataclass fields, submodules, parameter groups and table rows alike."""

TRAIN_FLAGS = {
    "visual_encoder": "train_vision_model",
    "connector": "train_connector",
    "language_model": "train_language_model",
}
"""The key of `trainer.unfreeze` that switches each part."""

HEAD = "head"
"""What a model with prediction heads has besides its parts; it always trains."""


@dataclass
class EncoderConfig:
    """A visual encoder, and which of its features are read."""

    hf_name: str = MISSING
    """Hub name or local folder of an encoder: CLIP, SigLIP, DINOv2, any timm model (`timm/…`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null is the default branch."""
    trust_remote_code: bool = False
    """Whether code out of the encoder's repository may run."""
    feature_layer: Any = None
    """Hidden state to read, counted as `hidden_states` is (-2: before the last layer), or a list of them, whose
    features are concatenated by channel; null: the encoder's output."""
    feature_strategy: str = field(default="patch", metadata=choices(FEATURE_STRATEGIES))
    """Which tokens of it: `patch`, `cls+patch`, `cls` or `full` (all, registers included)."""
    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side of the square in pixels that pictures are squashed to for it, without cropping, where it takes more sizes
    than one (DINOv2); null: as its image processor does it."""


@dataclass
class VisualEncoderConfig(EncoderConfig):
    """Where the image features come from: one encoder, or several side by side."""

    extra_encoders: list[EncoderConfig] = field(default_factory=list)
    """Further encoders that see the same pictures; their features stand behind the first one's, by channel."""
    quantization: str | None = field(default=None, metadata=choices(QUANTIZATIONS))
    """`8bit` or `4bit` (NF4): its matrices are stored so, and stay frozen; adapters train on them (`trainer.lora`)."""


@dataclass
class LanguageModelConfig:
    """The causal language model that reads image features among its text embeddings."""

    hf_name: str = MISSING
    """Hub name or local folder of any `AutoModelForCausalLM` with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null is the default branch."""
    trust_remote_code: bool = False
    """Whether code out of the model's repository may run."""
    quantization: str | None = field(default=None, metadata=choices(QUANTIZATIONS))
    """`8bit` or `4bit` (NF4): its matrices are stored so, and stay frozen; adapters train on them (`trainer.lora`)."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens added to its vocabulary. Where it does not train, their embeddings alone do, at its learning rate."""


@dataclass
class ConnectorConfig:
    """What maps image features to the language model's embedding space."""

    type: str = MISSING
    """A name of the table `CONNECTORS`, or `package.module:Class` for a class of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword parameters of that class; null leaves a parameter at the class's own default."""
    name: str | None = None
    """What the table of parts calls it; null: its type."""


@dataclass
class AnyResConfig:
    """Whether pictures are seen in tiles at high resolution (LLaVA-NeXT, LLaVA-OneVision), and in which."""

    grids: list[list[int]] | None = None
    """Allowed grids, each [rows, columns] of tiles as large as the visual encoder's pictures; the one that keeps most
    pixels is taken. `[]`: each picture is one square; null: as the checkpoint has it, else one square."""
    max_tiles: int | None = field(default=None, metadata=at_least(1))
    """A picture's tiles give at most about the tokens of so many tiles, shrunk bilinearly; null: all stay."""
    tile_several: bool = False
    """Whether several pictures of a sample are tiled too; else each of them is one square."""


@dataclass
class HeadConfig:
    """What is predicted from the language model's hidden states at a prompt: a class, several, a number or an order."""

    task: str | None = field(default=None, metadata=choices(LOSSES))
    """`binary`, `multiclass`, `multilabel`, `regression`, `ordinal` or `pairwise`; null: there is no head, the model
    writes text."""
    labels: list[Any] | None = None
    """The labels in order (`binary`: negative, positive); null: those of the training records, sorted."""
    type: str = field(default="linear", metadata=choices(HEAD_TYPES, custom="package.module:Class"))
    """A name of the table `HEADS`, or `package.module:Class` for a class of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword parameters of that class; null leaves a parameter at the class's own default."""
    pooling: str = field(default="last", metadata=choices(POOLINGS))
    """Which hidden states it reads, a name of the table `POOLINGS`: the last token's, a mean over `mean` (all),
    `image` or `text` tokens, `attention`, a learned `query` token behind the prompt, those at a `token`; or `first` and
    `alltoken`, as earlier work did."""
    layer: int | None = None
    """Hidden state to read, counted as `hidden_states` is (-2: before the last layer); null: the last."""
    token: str | None = None
    """With `pooling=token`: the token of the prompt at which it reads, such as one of `new_tokens`."""
    loss: str | None = None
    """`bce`, `ce`, `focal`, `mse`, `huber`, `ordinal` or `margin`, as the task allows; null: the task's first."""
    loss_options: dict[str, Any] = field(default_factory=dict)
    """`gamma` of `focal`, `delta` of `huber` (in standard deviations of the labels), `margin` of `margin`."""
    class_weights: Any = None
    """What each label counts in the loss: `balanced` (by its rarity in training), or a list in the order of labels."""
    label_smoothing: float = field(default=0.0, metadata=share(is_open_above=True))
    """Share of a target that is spread over all labels."""
    threshold_by: str = field(default="f1", metadata=choices(THRESHOLD_CRITERIA))
    """What the threshold of `binary` and `multilabel` is chosen for on the evaluation records: `f1`, `accuracy`,
    `youden`, or `none` for 0.5."""
    weight: float = field(default=1.0, metadata=above(0))
    """What its loss counts among those of several heads."""


@dataclass
class HeadsConfig(HeadConfig):
    """One prediction head, or several."""

    name: str = "label"
    """What it is called where there are several: the key of its value in a record's `label`."""
    extra_heads: dict[str, HeadConfig] = field(default_factory=dict)
    """Further heads by their names."""
    generation_weight: float = field(default=0.0, metadata=at_least(0))
    """What the loss of the records' replies counts beside the heads'; 0: the model does not learn to write them."""

    @property
    def by_name(self) -> dict[str, HeadConfig]:
        """All heads by their names; none where there is no task."""
        return {} if self.task is None else {self.name: self, **self.extra_heads}


@dataclass
class ModelConfig:
    """A vision-language model as it exists on the Hub, or three parts and what belongs to their composition."""

    hf_name: str | None = None
    """Hub name or local folder of a whole vision-language model of a family in `vlm models`, in place of the parts;
    null: the model is composed."""
    revision: str | None = None
    """Branch, tag or commit of `hf_name` on the Hub; null is the default branch."""
    trust_remote_code: bool = False
    """Whether code out of the repository of `hf_name` may run."""
    visual_encoder: VisualEncoderConfig = field(default_factory=VisualEncoderConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    anyres: AnyResConfig = field(default_factory=AnyResConfig)
    head: HeadsConfig = field(default_factory=HeadsConfig)
    image_token: str = "<image>"
    """The placeholder token that image features replace; added to the tokenizer where it does not know it."""
    image_start_token: str | None = None
    """A token before each image (`<|vision_start|>`, `<im_start>`); null: none."""
    image_end_token: str | None = None
    """A token after each image; null: none."""
    attn_implementation: str = field(default="auto", metadata=choices(ATTENTION_IMPLEMENTATIONS))
    """`auto` (the best that is installed), `flash_attention_2`, `sdpa`, `flex_attention` or `eager`."""


@dataclass
class UnfreezeConfig:
    """Which parts train."""

    train_vision_model: bool = False
    train_connector: bool = True
    train_language_model: bool = False


@dataclass
class LearningRateConfig:
    """Peak learning rate of each part; a part that trains needs one."""

    visual_encoder_learning_rate: float | None = None
    connector_learning_rate: float | None = None
    language_model_learning_rate: float | None = None
    head_learning_rate: float | None = None


@dataclass
class WeightDecayConfig:
    """Weight decay of each part's matrices; biases and norms are never decayed."""

    visual_encoder_weight_decay: float = 0.0
    connector_weight_decay: float = 0.0
    language_model_weight_decay: float = 0.0
    head_weight_decay: float = 0.0


@dataclass
class LoraPartConfig:
    """The adapter of one part; it trains at the part's learning rate."""

    r: int | None = field(default=None, metadata=at_least(1))
    """Rank of its updates; null: the part has no adapter."""
    alpha: int | None = field(default=None, metadata=at_least(1))
    """Updates are scaled by `alpha / r`; null: twice `r`."""
    target_modules: list[str] | None = None
    """How the names of its layers end (`[q_proj, v_proj]`); null: all Linear layers of the part but `lm_head`."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on parts that do not train as a whole."""

    visual_encoder: LoraPartConfig = field(default_factory=LoraPartConfig)
    connector: LoraPartConfig = field(default_factory=LoraPartConfig)
    language_model: LoraPartConfig = field(default_factory=LoraPartConfig)
    dropout: float = field(default=0.0, metadata=share(is_open_above=True))
    """Dropout on what the adapters read."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of each weight vector beside its direction (DoRA, arXiv:2402.09353)."""
    bias: str = field(default="none", metadata=choices(("none", "lora_only", "all")))
    """Which biases train too: `none`, `lora_only` (of the layers with an adapter), `all` (of the parts with one)."""
    init: str = field(default="default", metadata=choices(("default", "gaussian", "orthogonal")))
    """First weights: `default`, `gaussian` or `orthogonal`; each leaves the model's answers as they are."""


@dataclass
class TrainerOptions:
    """The keys of `trainer` besides those of `TrainingArguments`, which `TrainerConfig` has too."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the value of a field of `TrainingArguments`, which `TrainerConfig` gets when it is made."""

    objective: str | None = None
    """What the model learns: `generation` (replies), `prediction` (labels or numbers, by heads), or an objective of
    your own, `package.module:Class`; null: `prediction` where there is a head (`model.head.task`), else `generation`."""
    output_dir: str | None = None
    """The run directory; null: `outputs/<config name>-<time>`."""
    from_pretrained: str | None = None
    """A checkpoint of this framework to start from; its architecture wins over `model`."""
    resume_from_checkpoint: str | None = None
    """`true` for the newest complete checkpoint in `output_dir`, or the path of one."""
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)
    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)
    weight_decay: WeightDecayConfig = field(default_factory=WeightDecayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    deepspeed: Any = None
    """A DeepSpeed configuration: `zero0` to `zero3`, the path of a JSON file, a mapping, or null for none."""
    packing: bool = False
    """Fill batches by tokens: samples stand one behind the other without padding, and attend to themselves alone.
    `train_sampling_strategy` is for padded batches."""
    max_tokens_per_batch: int | None = field(default=None, metadata=at_least(1))
    """With `packing`, most tokens of a batch, image tokens counted; null: as many as `per_device_train_batch_size`
    samples have on average."""
    checkpointed_parts: list[str] | None = field(default=None, metadata=choices(PARTS))
    """With `activation_checkpointing`, the parts whose layers are computed anew for their gradient, of
    `visual_encoder`, `connector` and `language_model`; null: all that gradients flow through."""
    loss_average: str = field(default="token", metadata=choices(("token", "micro_batch")))
    """`token`: mean over all supervised tokens of the step, on all ranks; `micro_batch`: mean of means, as LLaVA."""
    num_samples: int = 4
    """How many evaluation (else training) samples are answered into `samples.md` at each evaluation and at the end."""
    eval_metrics: list[str] = field(
        default_factory=list, metadata=choices(EVAL_METRICS, custom="package.module:function")
    )
    """Metrics of answers to evaluation records, drawn as `inference` says, logged as `eval_<metric>` beside the loss:
    `exact_match`, `vqa_accuracy`, `anls`, `cider`, `bleu`, `rouge`, or a function of your own."""
    eval_metrics_samples: int = field(default=64, metadata=at_least(1))
    """The first so many evaluation records are answered for them; every rank answers all of them."""
    peak_tflops: float | None = field(default=None, metadata=above(0))
    """What a device can do at most, in 10^12 operations a second, as the measure of `mfu`; null: dense bfloat16 as the
    data sheet of the GPU says, or measured in the run's precision where it is not known."""
    profile: bool = False
    """Leave a trace of a few steps in `profile/` of the run directory, and a table of where their time went."""


OWN_TRAINER_FIELDS = frozenset(f.name for f in fields(TrainerOptions))


TRAINING_ARGUMENT_FIELDS = {
    name: kind for name, kind in read_training_argument_fields().items() if name not in OWN_TRAINER_FIELDS
}
"""The `trainer` keys that go to `TrainingArguments` as they are."""

OUR_DEFAULTS = {
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "report_to": "tensorboard",
    "remove_unused_columns": False,
    "dataloader_num_workers": 2,
    "save_total_limit": 2,
    "eval_strategy": "no",
}
"""Where our default differs from `TrainingArguments`': log often, show a NaN as NaN, keep two checkpoints."""

CLOSED_LISTS = {name: choices(names) for name, names in read_training_argument_choices().items()} | {
    "optim": choices((*read_training_argument_choices()["optim"], MUON), custom="package.module:Class"),
    "train_sampling_strategy": choices(SAMPLING_STRATEGIES),
}
"""Fields of `TrainingArguments` that hold one of several names, and those that ours take besides."""

TrainerConfig = make_dataclass(
    "TrainerConfig",
    [
        (name, kind, field(default=OUR_DEFAULTS.get(name, default), metadata=CLOSED_LISTS.get(name)))
        for name, (kind, default) in TRAINING_ARGUMENT_FIELDS.items()
    ],
    bases=(TrainerOptions,),
)
TrainerConfig.__module__ = __name__


@dataclass
class SourceConfig:
    """Records of one file, folder or data set, and how they are read."""

    path: str | None = None
    """A `.json`, `.jsonl`, `.parquet`, `.csv` or `.tsv` file, a folder of a Hugging Face data set, `hf://owner/name`
    for one on the Hub; where `dataset.streaming` is on, tar shards too (`shards/{000..127}.tar`, a folder of them)."""
    format: str = "llava"
    """What a record looks like: a name of the table `FORMATS`, or `package.module:function` for your own reader."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword parameters of that reader, such as `caption_key` of `caption`."""
    image_folder: str | None = None
    """What the records' image paths are relative to; null: the folder of `path`."""
    split: str = "train"
    """Of a Hugging Face data set that has several."""
    subset: str | None = None
    """Of a data set on the Hub that has several."""
    max_samples: int | None = field(default=None, metadata=at_least(1))
    """Use so many records only, drawn with `trainer.seed`; null: all."""
    system_prompt: str | None = None
    """Said at the start of conversations that have no system turn of their own; null: nothing."""


@dataclass
class MixtureSourceConfig(SourceConfig):
    """One of several sources; without an image folder of its own it has the run's."""

    weight: float = field(default=1.0, metadata=above(0))
    """How often an epoch takes each of its samples: 2 is twice, 0.5 a half of them, drawn with `trainer.seed`. In a
    stream, how often it is drawn from, in relation to the others."""
    template: str | None = None
    """A template for its records alone, named as `dataset.template` is; null: the run's."""


@dataclass
class DatasetConfig(SourceConfig):
    """The records, and how they become tokens."""

    sources: dict[str, MixtureSourceConfig] = field(default_factory=dict)
    """Several sources under names of your choice, in place of `path`."""
    streaming: bool = False
    """Read records one after the other, and never ask for one by its number: for tar shards, and for data sets that
    are not to be stored here. Needs `trainer.max_steps`."""
    shuffle_buffer: int = field(default=1000, metadata=at_least(0))
    """How many records of a stream wait to be drawn from."""
    allow_pipe: bool = False
    """Whether `path` may be `pipe:` and a command that a shell runs, such as `pipe:cat shard.tar`."""
    max_frames: int = field(default=8, metadata=at_least(1))
    """Most frames of a video that are seen, evenly spread: as pictures, or as a video where the model knows videos.
    LLaVA-OneVision and LLaVA-NeXT-Video get so many of every video, those of a short one repeated."""
    cache_dir: str | None = None
    """Where indices and token counts are kept; null: `vlm` in the folder of Hugging Face's caches (`HF_HOME`)."""
    num_workers: int | None = field(default=None, metadata=at_least(0))
    """Processes that count tokens before the first run on a data set; null: as many as there are cores."""
    eval_path: str | None = None
    """Records for the evaluation loss, of the same format; null: none, or `eval_split`."""
    eval_image_folder: str | None = None
    """What their image paths are relative to; null: `image_folder`, else the folder of `eval_path`."""
    eval_split: float | None = field(default=None, metadata=share(is_open_above=True))
    """Share of `path` to hold out for evaluation where there is no `eval_path`, drawn with `trainer.seed`; null: none,
    for a head 0.2 where there are no `folds` either. For a head it is stratified by label."""
    max_eval_samples: int | None = field(default=None, metadata=at_least(1))
    """Evaluate on the first so many records only; null: all."""
    test_path: str | None = None
    """For a head: records that nothing is chosen by, only measured on; null: none, or `test_split`."""
    test_image_folder: str | None = None
    """What their image paths are relative to; null: `image_folder`, else the folder of `test_path`."""
    test_split: float = field(default=0.0, metadata=share(is_open_above=True))
    """For a head: share of `path` to hold out for that, stratified by label, before anything else is held out."""
    folds: int | None = field(default=None, metadata=at_least(2))
    """For a head on a frozen body, in place of evaluation records: train so many times, each time without another part
    of the records, and choose and measure on what each head says of the part that it has not seen."""
    cache_features: bool | None = None
    """Compute what a frozen part gives once, and keep it in the cache: for a head, what it reads of each record, for
    other runs what a frozen visual encoder gives for each picture; null: for heads where the body is frozen."""
    cache_limit_gb: float | None = field(default=None, metadata=above(0))
    """Most that features of pictures may take in the cache, in 10^9 bytes: what was not used for longest goes; null:
    half of what they and the free disk are."""
    template: str | None = None
    """A packaged template (`plain`, `v1`, `chatml` …), `tokenizer` for the tokenizer's own, or a `.jinja` file;
    null: the checkpoint's, else the tokenizer's own."""
    image_mode: str | None = field(default=None, metadata=choices(IMAGE_MODES))
    """`square`: as the encoder's image processor does it; `pad`: padded to a square first; null: the checkpoint's,
    else `square`."""
    max_length: int | None = 2048
    """Longest sample in tokens, image tokens counted; null: as long as the language model's positions."""
    over_length: str = field(default="error", metadata=choices(("error", "skip", "truncate")))
    """A longer sample: `error`, `skip` (listed in `skipped.jsonl`) or `truncate` (replies only, never image tokens)."""
    on_bad_sample: str = field(default="error", metadata=choices(("error", "skip")))
    """A record that cannot be used: `error`, or `skip` (listed in `skipped.jsonl` with the reason)."""
    max_skipped: float = field(default=0.1, metadata=share())
    """The run stops where more than this share of the records cannot be used."""
    check_samples: int | None = field(default=100, metadata=at_least(0))
    """Pictures of the first so many records of each source are decoded before training, and of all evaluation records;
    of the others, whether they are there and begin like pictures. null: all are decoded."""


@dataclass
class InferenceConfig:
    """How answers are drawn, for `samples.md` and as defaults for generation."""

    temperature: float = field(default=0.0, metadata=at_least(0, "0 (greedy) or more"))
    """0 is greedy."""
    top_p: float = field(default=1.0, metadata=share(is_open_below=True))
    """Tokens are drawn from the most likely ones whose probabilities reach this share."""
    num_beams: int = field(default=1, metadata=at_least(1))
    """Beams of a beam search; 1: none."""
    max_new_tokens: int = field(default=128, metadata=at_least(1))
    """Longest answer in tokens."""
    cache_implementation: str | None = field(default=None, metadata=choices(CACHE_IMPLEMENTATIONS))
    """How keys and values are kept: `dynamic` grows, `static` has its full length at once, and transformers compiles
    the decoding of a token for it on GPUs; `offloaded` keeps on the GPU those of a layer at a time. None: the model's
    own way."""


@dataclass
class RunConfig:
    """One run: what is built, how it is trained, on what."""

    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerOptions = field(default_factory=TrainerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def key_names(path: str) -> list[str]:
    """The keys that a dotted path into the schema may continue with (`"trainer.unfreeze"` -> its fields)."""
    node: Any = RunConfig
    for name in [step for step in path.split(".") if step]:
        found = next((f for f in fields(node) if f.name == name), None)
        if found is None or found.default_factory is NO_DEFAULT or found.default_factory is dict:
            return []
        node = found.default_factory
    return [f.name for f in fields(node)]
