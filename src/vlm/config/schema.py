"""Every key that a run's YAML or command line may set, with its type, its default and what it means.

A new key is a field here, in `model_schema.py` or in `preference_schema.py`, with its default, its bounds or choices
(`metadata`, see `rules.py`) and a docstring, which says what `null` means; `make docs` lists all of them in
`docs/configuration.md`. Imports no torch, so that a mistyped key is refused in a second, and no omegaconf, which cannot
be installed beside lmms-eval.

The keys of `transformers.TrainingArguments` are not copied: they are read out of its source (`training_fields.py`), so
whatever the installed version takes can be set as `trainer.<name>`.
"""

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Any

from vlm.config.choices import (
    ALPHA_BACKGROUNDS,
    CACHE_IMPLEMENTATIONS,
    COORDINATES,
    EVAL_METRICS,
    FSDP2,
    IMAGE_MODES,
    MUON,
    PACKING_STRATEGIES,
    SAMPLING_STRATEGIES,
    SUPERVISIONS,
    THINKING_MODES,
)
from vlm.config.distillation_schema import DistillationConfig
from vlm.config.model_schema import ModelConfig, Options
from vlm.config.preference_schema import PreferenceOptions
from vlm.config.reach import is_packaged_deepspeed, is_start_word, training_argument_reach
from vlm.config.rules import (
    above,
    at_least,
    choices,
    imports_unless,
    is_false,
    is_file_or_hub_name,
    is_plain_name,
    never,
    reads_outside,
    runs_code,
    share,
)
from vlm.config.training_fields import read_training_argument_choices, read_training_argument_fields

RECORDS = reads_outside("asks another machine for records", is_file_or_hub_name)
"""The metadata of each path of records."""
FOLDER = reads_outside("writes into a folder of its own choice", never)
"""The metadata of each folder that is written into."""

PARTS = ("visual_encoder", "connector", "language_model")
"""The parts of a model: the names of Hydra groups, dataclass fields, submodules, parameter groups and table rows."""

TRAIN_FLAGS = {
    "visual_encoder": "train_vision_model",
    "connector": "train_connector",
    "language_model": "train_language_model",
}
"""The key of `trainer.unfreeze` that switches each part."""

HEAD = "head"
"""The name of the prediction heads where parts are listed; they always train."""


@dataclass
class UnfreezeConfig:
    """Which parts train."""

    train_vision_model: bool = False
    """Whether the visual encoder trains."""
    train_connector: bool = True
    """Whether the connector trains."""
    train_language_model: bool = False
    """Whether the language model trains."""


@dataclass
class LearningRateConfig:
    """Peak learning rate of each part; a part that trains needs one."""

    visual_encoder_learning_rate: float | None = None
    """Peak learning rate of the visual encoder."""
    connector_learning_rate: float | None = None
    """Peak learning rate of the connector."""
    language_model_learning_rate: float | None = None
    """Peak learning rate of the language model."""
    head_learning_rate: float | None = None
    """Peak learning rate of the prediction heads."""
    visual_encoder_layer_decay: float | None = field(default=None, metadata=share(is_open_below=True))
    """Factor from the learning rate of a layer of the visual encoder to that of the one before it; null: all of them
    have the part's."""
    language_model_layer_decay: float | None = field(default=None, metadata=share(is_open_below=True))
    """The same of the language model's layers."""


@dataclass
class WeightDecayConfig:
    """Weight decay of each part's matrices; biases and norms are never decayed."""

    visual_encoder_weight_decay: float = 0.0
    """Weight decay of the visual encoder."""
    connector_weight_decay: float = 0.0
    """Weight decay of the connector."""
    language_model_weight_decay: float = 0.0
    """Weight decay of the language model."""
    head_weight_decay: float = 0.0
    """Weight decay of the prediction heads."""


@dataclass
class LoraPartConfig:
    """The adapter of one part; it trains at the part's learning rate."""

    r: int | None = field(default=None, metadata=at_least(1))
    """Rank of its updates; null: the part has no adapter."""
    alpha: int | None = field(default=None, metadata=at_least(1))
    """Updates are scaled by `alpha / r`; null: twice `r`."""
    target_modules: list[str] | None = None
    """Name endings of the layers that get one (`[q_proj, v_proj]`); null: all Linear layers but `lm_head`."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on parts that do not train as a whole."""

    visual_encoder: LoraPartConfig = field(default_factory=LoraPartConfig)
    connector: LoraPartConfig = field(default_factory=LoraPartConfig)
    language_model: LoraPartConfig = field(default_factory=LoraPartConfig)
    dropout: float = field(default=0.0, metadata=share(is_open_above=True))
    """Dropout on the inputs of the adapters."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of each weight vector beside its direction (DoRA, arXiv:2402.09353)."""
    bias: str = field(default="none", metadata=choices(("none", "lora_only", "all")))
    """Which biases train too: `none`, `lora_only` (of the layers with an adapter), `all` (of the parts with one)."""
    init: str = field(default="default", metadata=choices(("default", "gaussian", "orthogonal")))
    """First weights: `default`, `gaussian` or `orthogonal`; a model answers as before with each of them."""


@dataclass
class TrainerOptions:
    """The keys of `trainer` besides those of `TrainingArguments`, which `TrainerConfig` has too."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the value of a field of `TrainingArguments`, which `TrainerConfig` gets when it is made."""

    objective: str | None = field(default=None, metadata=imports_unless(is_plain_name))
    """What the model learns: `generation` (replies), `distillation` (replies, as a teacher would give them),
    `prediction` (labels or numbers, by heads), `embedding` (vectors), `preference` (which of two replies is better), or
    an objective of yours, `package.module:Class`; null: `prediction` where there is a head (`model.head.task`), else
    `generation`."""
    output_dir: str | None = field(default=None, metadata=FOLDER)
    """The run directory; null: `outputs/<config name>-<time>`."""
    from_pretrained: str | None = None
    """A checkpoint of this framework to start from; its architecture wins over `model`."""
    starts_from: str | None = None
    """The run whose model this one trains further, such as `pretrain-smol`: without `from_pretrained` the run is then
    refused, since its connector would be random; null: it may start from its parts. Whole models (`model.hf_name`)
    start from themselves."""
    preflight: bool = False
    """Before a run begins, make a few steps, throw them away, and say what the run will do, as `vlm check` does, in the
    log and in `preflight.html` of the run directory; `preflight=true` for short. The run stays the same to the bit."""
    resume_from_checkpoint: str = field(
        default="auto", metadata=reads_outside("reads the saved state of a run elsewhere", is_start_word)
    )
    """`auto`: go on from the newest whole checkpoint in `output_dir`, begin where there is none, and leave a run that
    is done as it is; `never`: begin anew, and rename the directory of a run that is there; or a checkpoint's path."""
    resume_changes: str = field(default="refuse", metadata=choices(("refuse", "accept")))
    """What becomes of settings, data and ranks that changed since a run was saved, and would change what it trains:
    `refuse` them, or `accept` them from there on. Changes that do no such thing are always taken."""
    on_save_error: str = field(default="stop", metadata=choices(("stop", "continue")))
    """What a run does where a checkpoint cannot be saved, such as on a full disk: `stop`, or `continue` and try again
    at the next save. Either way what was saved before is kept; a model that cannot be saved at the end is an error."""
    async_save: bool = False
    """Whether the large files of a checkpoint are written while the run goes on: they are copied into the host's memory
    first, which has to hold them a second time. Not under DeepSpeed."""
    keep_best: str | None = None
    """A metric of evaluations, such as `eval_loss`: the best one's complete model is in `best` of the run directory,
    and its checkpoint stays whatever `save_total_limit` says; null: none. Lower is better for losses and errors
    (`greater_is_better` overrides that)."""
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)
    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)
    weight_decay: WeightDecayConfig = field(default_factory=WeightDecayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    deepspeed: Any = field(
        default=None, metadata=reads_outside("has settings of its own, which can name files", is_packaged_deepspeed)
    )
    """A DeepSpeed configuration: `zero0` to `zero3`, the path of a JSON file, a mapping, or null for none."""
    sharding: str | None = field(default=None, metadata=choices((FSDP2,)))
    """Shards weights, gradients and optimiser states over the ranks without DeepSpeed: `fsdp2` is PyTorch's
    `fully_shard`, which computes what ZeRO-3 does; null: nothing is sharded but by `deepspeed`."""
    packing: bool = False
    """Lay the samples of a step in rows without padding, one behind the other; each attends to itself alone."""
    packing_strategy: str = field(default="step", metadata=choices(PACKING_STRATEGIES))
    """With `packing`: `step` lays out the samples that each optimiser step has without packing, so that its loss and
    gradient are the same; `best_fit` fills rows of about equal length out of all samples, in an order of its own, and
    counts each row as a micro-batch."""
    max_tokens_per_batch: int | None = field(default=None, metadata=at_least(1))
    """With `packing`, the most tokens of a row, image tokens included. With `step`, samples that do not fit go into
    further rows; null: as many rows as padded micro-batches. With `best_fit`, rows are filled up to it; null: as many
    tokens as `per_device_train_batch_size` samples have on average."""
    auto_batch: bool = False
    """With `packing`, find the largest `max_tokens_per_batch` whose step is predicted to fit into a device's memory;
    the samples of a step stay the same. It is recorded in `config.yaml`, and a run that is resumed keeps it."""
    auto_batch_memory_gb: float | None = field(default=None, metadata=above(0))
    """The most memory that `auto_batch` may use on a device, in 10^9 bytes; null: nine tenths of what the GPU has, or
    on a CPU the machine or its container."""
    average_decay: float | None = field(default=None, metadata=share(is_open_above=True))
    """Keep an exponential moving average of the weights that train, of which a step keeps this share (0.999):
    evaluations, `best` and `final` have the average, checkpoints hold both; null: none. Not where weights are sharded
    (ZeRO-3, FSDP2)."""
    checkpointed_parts: list[str] | None = field(default=None, metadata=choices(PARTS))
    """Parts whose layers `activation_checkpointing` recomputes in the backward pass; null: all that gradients reach."""
    loss_average: str = field(default="token", metadata=choices(("token", "micro_batch")))
    """`token`: mean over all supervised tokens of the step, on all ranks; `micro_batch`: mean of means, as LLaVA."""
    on_nonfinite: str = field(default="stop", metadata=choices(("stop", "skip")))
    """What is done about a step whose loss or gradient is NaN or infinite, before its update is applied: `stop` ends
    the run (exit code 76); `skip` leaves the update out and counts it (`skipped_steps`). `guard.jsonl` lists the step's
    samples."""
    max_skipped_steps: int = field(default=10, metadata=at_least(1))
    """The run stops where more updates in a row are left out."""
    spike_action: str | None = field(default="warn", metadata=choices(("warn", "skip")))
    """What is done about a step whose loss or gradient norm is far above those of the steps before it: `warn`, or
    `skip` its update. `guard.jsonl` lists its samples. null: spikes are not looked for."""
    spike_window: int = field(default=100, metadata=at_least(2))
    """Number of steps that a step is compared with."""
    spike_threshold: float = field(default=10.0, metadata=above(0))
    """Number of deviations (median absolute deviations, scaled to standard ones) above the median that is a spike."""
    stuck_after: float | None = field(default=1200.0, metadata=above(0))
    """Seconds without progress on any rank, in training, evaluation or saving, after which every rank writes the stacks
    of its threads into `stuck/` and the run ends (exit code 76); null: it waits for ever."""
    num_samples: int = 4
    """Number of evaluation (else training) samples answered into `samples.md`, at each evaluation and at the end."""
    eval_metrics: list[str] = field(default_factory=list, metadata=choices(EVAL_METRICS, "package.module:function"))
    """Metrics of evaluation records, logged as `eval_<metric>`: those of answers (`inference` has the generation
    settings), and `retrieval`, how often an image's own text has the lowest loss among several."""
    eval_metrics_samples: int = field(default=64, metadata=at_least(1))
    """Number of evaluation records that these are measured on, from the first on; `retrieval` takes the first with
    images. Every rank answers all of them; for `retrieval`, ranks share them."""
    eval_retrieval_candidates: int = field(default=10, metadata=at_least(2))
    """Number of texts among which `retrieval` looks for an image's own, that one included."""
    before_after: bool = False
    """Whether the model at the start of the run is compared with the one at its end, on evaluation records and on
    questions about generated images: `before_after/report.md` says what it gained and what it forgot."""
    before_after_samples: int = field(default=200, metadata=at_least(1))
    """The most evaluation records that are compared, drawn with `trainer.seed`; every rank answers all of them."""
    before_after_probe: int = field(default=24, metadata=at_least(0))
    """Number of generated questions for each of seven abilities; 0: none."""
    peak_tflops: float | None = field(default=None, metadata=above(0))
    """Peak of a device in 10^12 operations a second, which `mfu` is a share of; null: dense bfloat16 of the GPU's data
    sheet, or measured in the run's precision where that is not known."""
    profile: bool = False
    """Write a trace of a few steps to `profile/` of the run directory, and a table of where their time went."""


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
"""Defaults that differ from those of `TrainingArguments`: log often, show a NaN as NaN, keep two checkpoints."""

CLOSED_LISTS = {name: choices(names) for name, names in read_training_argument_choices().items()} | {
    "optim": choices((*read_training_argument_choices()["optim"], MUON), custom="package.module:Class"),
    "train_sampling_strategy": choices(SAMPLING_STRATEGIES),
}
"""Fields of `TrainingArguments` that hold one of several names, and those that ours take besides."""

TrainerConfig = make_dataclass(
    "TrainerConfig",
    [
        (name, kind, field(default=value, metadata=training_argument_reach(name, value) | CLOSED_LISTS.get(name, {})))
        for name, (kind, default) in TRAINING_ARGUMENT_FIELDS.items()
        for value in [OUR_DEFAULTS.get(name, default)]
    ],
    bases=(TrainerOptions,),
    namespace={"__doc__": "How a run trains."},
)
TrainerConfig.__module__ = __name__


@dataclass
class SourceConfig:
    """Records of one file, folder or data set, and how they are read."""

    path: str | None = field(default=None, metadata=RECORDS)
    """A `.json`, `.jsonl`, `.parquet`, `.csv` or `.tsv` file, a folder of a Hugging Face data set, `hf://owner/name`
    for one on the Hub; where `dataset.streaming` is on, tar shards too (`shards/{000..127}.tar`, a folder of them,
    `https://host/{000..127}.tar`)."""
    format: str = field(default="llava", metadata=imports_unless(is_plain_name))
    """Format of a record: a name of the table `FORMATS`, or `package.module:function` for a reader of your own."""
    options: Options = field(default_factory=dict)
    """Keyword parameters of that reader, such as `caption_key` of `caption`."""
    image_folder: str | None = None
    """What the records' image paths are relative to; null: the folder of `path`."""
    follow_links: bool = field(
        default=False, metadata=reads_outside("reads files that links in a data folder lead to", is_false)
    )
    """Whether links in a folder of images or records are followed where they lead out of that folder."""
    split: str = "train"
    """Of a Hugging Face data set that has several."""
    subset: str | None = None
    """Of a data set on the Hub that has several."""
    max_samples: int | None = field(default=None, metadata=at_least(1))
    """Number of records that are used, drawn with `trainer.seed`; null: all."""
    system_prompt: str | None = None
    """System turn of conversations that have none of their own; null: none."""
    fps: float | None = field(default=None, metadata=above(0))
    """Frames of a video that are used for each second of it, evenly spaced: one at least, and `max_frames` at most;
    null: as many as `max_frames` allows."""


@dataclass
class MixtureSourceConfig(SourceConfig):
    """One of several sources; without an image folder of its own it has the run's."""

    weight: float = field(default=1.0, metadata=above(0))
    """How often an epoch takes each sample of this source: 2 is twice, 0.5 is half of them, drawn with `trainer.seed`.
    In a stream, how often this source is drawn from, relative to the others."""
    loss_weight: float = field(default=1.0, metadata=above(0))
    """How much the loss of each token of its replies counts, beside that of other sources."""
    template: str | None = None
    """A template for its records alone, named as `dataset.template` is; null: the run's."""


@dataclass
class DatasetConfig(SourceConfig):
    """The records, and how they become tokens."""

    sources: dict[str, MixtureSourceConfig] = field(default_factory=dict)
    """Several sources under names of your choice, in place of `path`."""
    streaming: bool = False
    """Read records one after the other, never by their index: for tar shards, and for data sets that are not stored on
    this machine. Needs `trainer.max_steps`."""
    shuffle_buffer: int = field(default=1000, metadata=at_least(0))
    """Number of records of a block within which a stream is shuffled; readers hold two blocks of each source."""
    allow_pipe: bool = field(default=False, metadata=runs_code("lets a shell run what `path` names", is_false))
    """Whether `path` may be `pipe:` and a command that a shell runs, such as `pipe:cat shard.tar`."""
    max_frames: int = field(default=8, metadata=at_least(1))
    """The most frames of a video that are used, evenly spaced: as images, or as a video where the model takes videos.
    LLaVA-OneVision and LLaVA-NeXT-Video get exactly so many of every video; frames of a short one are repeated."""
    cache_dir: str | None = field(default=None, metadata=FOLDER)
    """Folder of indices, token counts and features; null: `vlm` in the folder of Hugging Face's caches (`HF_HOME`)."""
    num_workers: int | None = field(default=None, metadata=at_least(0))
    """Processes that count tokens before the first run on a data set; null: as many as there are cores."""
    eval_path: str | None = field(default=None, metadata=RECORDS)
    """Records for the evaluation loss, of the same format; null: none, or `eval_split`."""
    eval_image_folder: str | None = None
    """What their image paths are relative to; null: `image_folder`, else the folder of `eval_path`."""
    eval_split: float | None = field(default=None, metadata=share(is_open_above=True))
    """Share of `path` to hold out for evaluation where there is no `eval_path`, drawn with `trainer.seed`; null: none,
    for a head 0.2 where there are no `folds` either. For a head it is stratified by label."""
    max_eval_samples: int | None = field(default=None, metadata=at_least(1))
    """Evaluate on the first so many records only; null: all."""
    test_path: str | None = field(default=None, metadata=RECORDS)
    """For a head: records that the trained head is only measured on; null: none, or `test_split`."""
    test_image_folder: str | None = None
    """What their image paths are relative to; null: `image_folder`, else the folder of `test_path`."""
    test_split: float = field(default=0.0, metadata=share(is_open_above=True))
    """For a head: share of `path` to hold out for testing, stratified by label, before evaluation records are."""
    folds: int | None = field(default=None, metadata=at_least(2))
    """For a head on a frozen model, in place of evaluation records: number of folds of a cross-validation. Each head
    trains without one fold; temperature, threshold and metrics come from its outputs on that fold."""
    cache_features: bool | None = None
    """Compute the outputs of frozen parts once and keep them in the cache: for a head the hidden states of each record,
    for other runs the features of each image; null: for heads on a frozen model only."""
    cache_limit_gb: float | None = field(default=None, metadata=above(0))
    """The most bytes, in 10^9, of image features in the cache: those unused for longest are deleted; null: half of the
    sum of what they take and what is free on the disk."""
    template: str | None = None
    """A packaged template (`plain`, `v1`, `chatml` …), `tokenizer` for the tokenizer's own, or a `.jinja` file;
    null: the checkpoint's, else the tokenizer's own."""
    supervise: str = field(default="replies", metadata=choices(SUPERVISIONS))
    """What is supervised of a conversation: `replies` and their ends; `llava-onevision`: in ChatML, the assistant's
    turns as a whole, and the marks of turns and line breaks in those of others, as LLaVA-OneVision was trained."""
    loss_patterns: dict[str, float] = field(default_factory=dict)
    """How much the loss of some tokens of replies counts: a regular expression -> a factor above 0, of every token with
    a character in one of its matches (`{"<answer>.*?</answer>": 2}`); of several that match, the last one counts. Such
    keys are read in YAML files only, since Hydra's command line has no quotes for them."""
    image_mode: str | None = field(default=None, metadata=choices(IMAGE_MODES))
    """`square`: as the encoder's image processor does it; `pad`: padded to a square first; `native`: each image in its
    own size and aspect ratio, within the bounds of `model.native`; null: the checkpoint's, else what the encoder reads:
    `native` for SigLIP 2 with NaFlex and Qwen's vision towers, `square` for others."""
    thinking: str = field(default="template", metadata=choices(THINKING_MODES))
    """Thinking of replies (`reasoning_content`, or `<think>…</think>` before the text): `template`: what the chat
    template writes of it is learned; `keep`: all of it, and a record whose thinking the template drops cannot be used;
    `drop`: none."""
    alpha_background: str | None = field(default=None, metadata=choices(ALPHA_BACKGROUNDS))
    """What shows through transparent images: `white`, `black` or `grey`; `drop`: transparency is ignored, as in LLaVA,
    so that black ink on a transparent ground is all black; null: the checkpoint's, else `white`."""
    max_image_tokens: int | None = field(default=None, metadata=at_least(1))
    """The most tokens of an image, and of a frame of a video: larger images are made smaller, by the options of the
    model's own processor, which are saved with it; null: as many as the processor makes."""
    coordinates: str = field(default="auto", metadata=choices(COORDINATES, custom="package.module:Class"))
    """How boxes, points and time spans of records are written (docs/coordinates.md); `auto`: as the checkpoint was
    trained, else as its family writes them, for composed models `llava`."""
    max_length: int | None = 2048
    """Longest sample in tokens, image tokens included; null: as long as the language model's positions."""
    over_length: str = field(default="error", metadata=choices(("error", "skip", "truncate", "split")))
    """For a longer sample: `error`, `skip` (listed in `skipped.jsonl`), `truncate` (replies, never image tokens), or
    `split`: into several, in front of questions, of which each reply is learned once (docs/data.md)."""
    on_bad_sample: str = field(default="error", metadata=choices(("error", "skip")))
    """For a record that cannot be used: `error`, or `skip` (listed in `skipped.jsonl` with the reason)."""
    max_skipped: float = field(default=0.1, metadata=share())
    """The run stops where more than this share of the records cannot be used."""
    check_samples: int | None = field(default=100, metadata=at_least(0))
    """Number of records of each source, from the first on, whose images are decoded before training, as are those of
    all evaluation records; other images are checked to exist and to begin like images. null: all are decoded."""


@dataclass
class InferenceConfig:
    """Settings of generation, for `samples.md` and metrics of answers while training, and for commands with `-cn`."""

    temperature: float = field(default=0.0, metadata=at_least(0, "0 (greedy) or more"))
    """Temperature of sampling; 0 is greedy."""
    top_p: float = field(default=1.0, metadata=share(is_open_below=True))
    """Tokens are drawn from the most likely ones whose probabilities reach this share."""
    num_beams: int = field(default=1, metadata=at_least(1))
    """Beams of a beam search; 1: none."""
    max_new_tokens: int = field(default=128, metadata=at_least(1))
    """Longest answer in tokens."""
    cache_implementation: str | None = field(default=None, metadata=choices(CACHE_IMPLEMENTATIONS))
    """Cache of keys and values: `dynamic` grows; `static` is allocated at full length, and transformers compiles
    decoding for it on GPUs; `offloaded` keeps one layer at a time on the GPU; null: the model's own."""
    thinking: bool | None = None
    """Whether the model is to think before it answers, for chat templates that ask (`enable_thinking`); it is saved
    with the model. null: as the model was trained: true once it was trained on records with thinking."""


@dataclass
class RunConfig:
    """A run: the model that is built, how it trains, on which data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerOptions = field(default_factory=TrainerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def key_names(path: str) -> list[str]:
    """Return the keys that may follow a dotted path into the schema (`"trainer.unfreeze"` -> its fields)."""
    node: Any = RunConfig
    for name in [step for step in path.split(".") if step]:
        found = next((f for f in fields(node) if f.name == name), None)
        if found is None or not is_dataclass(found.default_factory):
            return []
        node = found.default_factory
    return [f.name for f in fields(node)]
