"""Every key that a run's YAML or command line may set, with its type, default and meaning.

A new key is a field here, or in the `…_schema.py` of its section, with its default, its bounds or choices (`metadata`,
see `rules.py`) and a docstring, which says what `null` means; `make docs` lists all of them in `docs/configuration.md`.
Imports no torch, so that a mistyped key is refused in a second, and no omegaconf, which cannot be installed beside
lmms-eval.

The keys of `transformers.TrainingArguments` are not copied: they are read out of its source (`training_fields.py`), so
every field of the installed version can be set as `trainer.<name>`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Any

from vlm.config.choices import CACHE_IMPLEMENTATIONS, EVAL_METRICS, FSDP2, MUON, PACKING_STRATEGIES, SAMPLING_STRATEGIES
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.distillation_schema import DistillationConfig
from vlm.config.model_schema import ModelConfig
from vlm.config.preference_schema import PreferenceOptions
from vlm.config.reach import is_packaged_deepspeed, is_start_word, training_argument_reach
from vlm.config.rules import (
    FOLDER,
    above,
    at_least,
    choices,
    imports_unless,
    is_plain_name,
    never,
    reads_outside,
    runs_code,
    share,
)
from vlm.config.training_fields import read_training_argument_choices, read_training_argument_fields

PARTS = ("visual_encoder", "connector", "language_model")
"""The parts of a model: the names of Hydra groups, dataclass fields, submodules, parameter groups and table rows."""

TRAIN_FLAGS = {
    "visual_encoder": "train_vision_model",
    "connector": "train_connector",
    "language_model": "train_language_model",
}
"""The key of `trainer.unfreeze` that switches each part."""

HEAD = "head"
"""The name of the prediction heads in lists of parts; they always train."""


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
    """Learning rate of each layer of the visual encoder relative to the next one; null: all layers have the part's
    rate."""
    language_model_layer_decay: float | None = field(default=None, metadata=share(is_open_below=True))
    """The same for the layers of the language model."""


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
    """Rank of the updates; null: the part has no adapter."""
    alpha: int | None = field(default=None, metadata=at_least(1))
    """Updates are scaled by `alpha / r`; null: twice `r`."""
    target_modules: list[str] | None = None
    """Endings of the names of layers that get an adapter (`[q_proj, v_proj]`); null: all Linear layers except
    `lm_head`."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on parts that do not train as a whole."""

    visual_encoder: LoraPartConfig = field(default_factory=LoraPartConfig)
    connector: LoraPartConfig = field(default_factory=LoraPartConfig)
    language_model: LoraPartConfig = field(default_factory=LoraPartConfig)
    dropout: float = field(default=0.0, metadata=share(is_open_above=True))
    """Dropout on the inputs of the adapters."""
    use_rslora: bool = False
    """Scale updates by `alpha / sqrt(r)` instead of `alpha / r` (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each weight vector separately from its direction (DoRA, arXiv:2402.09353)."""
    bias: str = field(default="none", metadata=choices(("none", "lora_only", "all")))
    """Which biases train too: `none`, `lora_only` (those of layers with an adapter) or `all` (those of parts with an
    adapter)."""
    init: str = field(default="default", metadata=choices(("default", "gaussian", "orthogonal")))
    """Initial weights: `default`, `gaussian` or `orthogonal`. None of them changes the model's initial answers."""


@dataclass
class TrainerOptions:
    """The keys of `trainer` that are not fields of `TrainingArguments`; `TrainerConfig` has both."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the value of a field of `TrainingArguments`, which `TrainerConfig` adds."""

    objective: str | None = field(default=None, metadata=imports_unless(is_plain_name))
    """What the run trains: `generation` (replies), `distillation` (replies, with a teacher's predictions), `prediction`
    (labels or numbers, with heads), `embedding` (vectors), `preference` (which of two replies is better), or an
    objective of your own, `package.module:Class`; null: `prediction` if there is a head (`model.head.task`), otherwise
    `generation`."""
    output_dir: str | None = field(default=None, metadata=FOLDER)
    """The run directory; null: `outputs/<config name>-<time>`."""
    from_pretrained: str | None = None
    """A checkpoint of this framework to start from; its architecture overrides `model`."""
    starts_from: str | None = None
    """The run whose model this one continues to train, such as `pretrain-smol`. Without `from_pretrained` the run is
    then refused, since its connector would be random. null: the run may start from its parts. Whole models
    (`model.hf_name`) start from themselves."""
    preflight: bool = False
    """Before the run begins, train a few steps, discard them, and report what the run will do, as `vlm check` does: in
    the log and in `preflight.html` of the run directory. `preflight=true` for short. The run itself is unchanged, bit
    for bit."""
    resume_from_checkpoint: str = field(
        default="auto", metadata=reads_outside("reads the saved state of another run", is_start_word)
    )
    """`auto`: resume from the newest complete checkpoint in `output_dir`, start if there is none, and leave a finished
    run unchanged; `never`: start again, and rename the directory of an existing run; or the path of a checkpoint."""
    resume_changes: str = field(default="refuse", metadata=choices(("refuse", "accept")))
    """What to do with settings, data and ranks that have changed since the run was saved and affect training: `refuse`
    them, or `accept` them from there on. Other changes are always accepted."""
    on_save_error: str = field(default="stop", metadata=choices(("stop", "continue")))
    """What to do if a checkpoint cannot be saved, for example on a full disk: `stop`, or `continue` and try again at
    the next save. Earlier checkpoints are kept in both cases. A final model that cannot be saved is always an error."""
    async_save: bool = False
    """Whether training continues while the large files of a checkpoint are written. They are first copied into host
    memory, which must hold them a second time. Not with DeepSpeed."""
    keep_best: str | None = None
    """An evaluation metric such as `eval_loss`. The complete model of the best evaluation is kept in `best` of the run
    directory, with its checkpoint, whatever `save_total_limit` says; null: none. Lower is better for losses and errors
    (`greater_is_better` overrides that)."""
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)
    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)
    weight_decay: WeightDecayConfig = field(default_factory=WeightDecayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    deepspeed: Any = field(
        default=None, metadata=reads_outside("has its own settings, which can name files", is_packaged_deepspeed)
    )
    """A DeepSpeed configuration: `zero0` to `zero3`, the path of a JSON file, a mapping, or null for none."""
    sharding: str | None = field(default=None, metadata=choices((FSDP2,)))
    """Shard weights, gradients and optimiser states over the ranks without DeepSpeed: `fsdp2` is PyTorch's
    `fully_shard`, which is equivalent to ZeRO-3; null: only `deepspeed` shards."""
    packing: bool = False
    """Pack the samples of a step into rows without padding; each sample attends only to itself."""
    packing_strategy: str = field(default="step", metadata=choices(PACKING_STRATEGIES))
    """With `packing`: `step` packs the samples that each optimiser step has without packing, so loss and gradient are
    unchanged; `best_fit` fills rows of about equal length from all samples, in its own order, and counts each row as a
    micro-batch."""
    max_tokens_per_batch: int | None = field(default=None, metadata=at_least(1))
    """With `packing`, the maximum number of tokens of a row, image tokens included. With `step`, samples that do not
    fit go into additional rows; null: as many rows as padded micro-batches. With `best_fit`, rows are filled up to this
    number; null: as many tokens as `per_device_train_batch_size` samples have on average."""
    auto_batch: bool = False
    """With `packing`, find the largest `max_tokens_per_batch` whose step is predicted to fit into the memory of a
    device; the samples of a step stay the same. `config.yaml` records it, and a resumed run keeps it."""
    auto_batch_memory_gb: float | None = field(default=None, metadata=above(0))
    """The maximum memory that `auto_batch` may use on a device, in 10^9 bytes; null: nine tenths of the memory of
    the GPU, or on a CPU of the machine or its container."""
    average_decay: float | None = field(default=None, metadata=share(is_open_above=True))
    """Keep an exponential moving average of the trained weights with this decay (0.999). Evaluations, `best` and
    `final` use the average, and checkpoints hold both; null: none. Not with sharded weights (ZeRO-3, FSDP2)."""
    checkpointed_parts: list[str] | None = field(default=None, metadata=choices(PARTS))
    """Parts whose layers `activation_checkpointing` recomputes in the backward pass; null: all parts that receive
    gradients."""
    loss_average: str = field(default="token", metadata=choices(("token", "micro_batch")))
    """`token`: mean over all supervised tokens of the step, on all ranks; `micro_batch`: mean of the means of
    micro-batches, as in LLaVA."""
    on_nonfinite: str = field(default="stop", metadata=choices(("stop", "skip")))
    """What to do with a step whose loss or gradient is NaN or infinite, before its update: `stop` ends the run (exit
    code 76); `skip` skips the update and counts it (`skipped_steps`). `guard.jsonl` lists the samples of the step."""
    max_skipped_steps: int = field(default=10, metadata=at_least(1))
    """The run stops after more skipped updates in a row than this."""
    spike_action: str | None = field(default="warn", metadata=choices(("warn", "skip")))
    """What to do with a step whose loss or gradient norm is far above those of the previous steps: `warn`, or `skip`
    its update. `guard.jsonl` lists its samples. null: ignore spikes."""
    spike_window: int = field(default=100, metadata=at_least(2))
    """Number of previous steps that a step is compared with."""
    spike_threshold: float = field(default=10.0, metadata=above(0))
    """A step is a spike if it is this many deviations above the median (median absolute deviations, scaled to standard
    deviations)."""
    stuck_after: float | None = field(default=1200.0, metadata=above(0))
    """If no rank makes progress in training, evaluation or saving for this many seconds, every rank writes the stack
    traces of its threads to `stuck/` and the run ends (exit code 76); null: wait forever."""
    alert_command: list[str] = field(default_factory=list, metadata=runs_code("runs a program on this machine", never))
    """A program and its arguments that rank 0 runs when the run is `done`, `stopped` by a signal, `failed`, `diverged`
    (a guard ended it) or `stuck`. It runs without a shell for at most 30 seconds, and gets the event as JSON on its
    standard input and in `VLM_EVENT`, `VLM_RUN`, `VLM_STEP` and `VLM_MESSAGE`. Its outcome never affects the run."""
    num_samples: int = 4
    """Number of evaluation samples (training samples if there are none) to answer in `samples.md`, at each evaluation
    and at the end."""
    eval_metrics: list[str] = field(default_factory=list, metadata=choices(EVAL_METRICS, "package.module:function"))
    """Metrics of evaluation records, logged as `eval_<metric>`: metrics of answers, which use the settings of
    `inference`, and `retrieval`, how often an image's own text has the lowest loss among several."""
    eval_metrics_samples: int = field(default=64, metadata=at_least(1))
    """Number of evaluation records for these metrics, from the first on; `retrieval` uses the first ones with images.
    Every rank answers all of them, except for `retrieval`, where ranks share them."""
    eval_retrieval_candidates: int = field(default=10, metadata=at_least(2))
    """Number of texts that `retrieval` compares, including the image's own text."""
    before_after: bool = False
    """Whether to compare the model at the start of the run with the one at its end, on evaluation records and on
    questions about generated images. `before_after/report.md` says what it gained and what it forgot."""
    before_after_samples: int = field(default=200, metadata=at_least(1))
    """The maximum number of evaluation records to compare, drawn with `trainer.seed`; every rank answers all of
    them."""
    before_after_probe: int = field(default=24, metadata=at_least(0))
    """Number of generated questions for each of seven abilities; 0: none."""
    peak_tflops: float | None = field(default=None, metadata=above(0))
    """Peak of a device in 10^12 operations per second, which `mfu` is relative to; null: dense bfloat16 from the GPU's
    data sheet, or measured in the run's precision if that is unknown."""
    profile: bool = False
    """Write a trace of a few steps to `profile/` in the run directory, and a table of where their time went."""


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
"""Fields of `TrainingArguments` with a fixed set of names, and the names that this framework adds."""

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
class InferenceConfig:
    """Generation settings, for `samples.md` and metrics of answers during training, and for commands with `-cn`."""

    temperature: float = field(default=0.0, metadata=at_least(0, "0 (greedy) or more"))
    """Sampling temperature; 0 is greedy."""
    top_p: float = field(default=1.0, metadata=share(is_open_below=True))
    """Sample only from the most likely tokens whose probabilities add up to this share."""
    num_beams: int = field(default=1, metadata=at_least(1))
    """Number of beams of a beam search; 1: no beam search."""
    max_new_tokens: int = field(default=128, metadata=at_least(1))
    """Maximum number of tokens of an answer."""
    cache_implementation: str | None = field(default=None, metadata=choices(CACHE_IMPLEMENTATIONS))
    """Cache of keys and values: `dynamic` grows; `static` is allocated at full length, so that transformers compiles
    decoding on GPUs; `offloaded` keeps one layer at a time on the GPU; null: the model's own choice."""
    thinking: bool | None = None
    """Whether the model thinks before it answers, for chat templates with this setting (`enable_thinking`); saved with
    the model. null: as in training: true if the records had thinking."""


@dataclass
class RunConfig:
    """A run: the model, how it trains, and the data."""

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


def dotted_keys() -> list[str]:
    """Return every key of a run that takes a value, with its section: `trainer.max_steps`."""
    return [*_find_keys(RunConfig, "")]


def _find_keys(section: Any, prefix: str) -> Iterator[str]:
    for found in fields(section):
        if is_dataclass(found.default_factory):
            yield from _find_keys(found.default_factory, f"{prefix}{found.name}.")
        else:
            yield f"{prefix}{found.name}"
