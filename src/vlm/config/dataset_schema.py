"""The keys of `dataset`: where records come from, and how they become tokens.

As in `schema.py`, a new key is a field with its default, its bounds or choices and a docstring.
"""

from dataclasses import dataclass, field

from vlm.config.choices import ALPHA_BACKGROUNDS, COORDINATES, IMAGE_MODES, SUPERVISIONS, THINKING_MODES
from vlm.config.model_schema import Options
from vlm.config.rules import (
    FOLDER,
    above,
    at_least,
    choices,
    imports_unless,
    is_false,
    is_file_or_hub_name,
    is_plain_name,
    reads_outside,
    runs_code,
    share,
)

RECORDS = reads_outside("downloads records from another machine", is_file_or_hub_name)
"""The metadata of each path of records."""


@dataclass
class SourceConfig:
    """Records of one file, folder or data set, and how they are read."""

    path: str | None = field(default=None, metadata=RECORDS)
    """A `.json`, `.jsonl`, `.parquet`, `.csv` or `.tsv` file, a folder of a Hugging Face data set, or `hf://owner/name`
    for one on the Hub. With `dataset.streaming`, also tar shards (`shards/{000..127}.tar`, a folder of them,
    `https://host/{000..127}.tar`)."""
    format: str = field(default="llava", metadata=imports_unless(is_plain_name))
    """Format of the records: a name of the table `FORMATS`, or `package.module:function` for a reader of your own."""
    options: Options = field(default_factory=dict)
    """Keyword parameters of the reader, such as `caption_key` of `caption`."""
    image_folder: str | None = None
    """The folder that image paths in the records are relative to; null: the folder of `path`."""
    follow_links: bool = field(default=False, metadata=reads_outside("follows links out of a data folder", is_false))
    """Whether to follow symbolic links that lead out of a folder of images or records."""
    split: str = "train"
    """The split, if a Hugging Face data set has several."""
    subset: str | None = None
    """The subset, if a data set on the Hub has several."""
    max_samples: int | None = field(default=None, metadata=at_least(1))
    """Number of records to use, drawn with `trainer.seed`; null: all."""
    system_prompt: str | None = None
    """System turn for conversations without one; null: none."""
    fps: float | None = field(default=None, metadata=above(0))
    """Number of frames to use for each second of a video, evenly spaced, at least one and at most `max_frames`; null:
    as many as `max_frames` allows."""


@dataclass
class MixtureSourceConfig(SourceConfig):
    """One of several sources; without an image folder of its own it uses the run's."""

    weight: float = field(default=1.0, metadata=above(0))
    """How often an epoch uses each sample of this source: 2 is twice, 0.5 is half of them, drawn with `trainer.seed`.
    In a stream, how often to draw from this source, relative to the others."""
    loss_weight: float = field(default=1.0, metadata=above(0))
    """Weight of the loss of each token of its replies, relative to other sources."""
    template: str | None = None
    """A template for the records of this source, like `dataset.template`; null: the run's template."""


@dataclass
class DatasetConfig(SourceConfig):
    """The records, and how they become tokens."""

    sources: dict[str, MixtureSourceConfig] = field(default_factory=dict)
    """Several sources under names of your choice, instead of `path`."""
    streaming: bool = False
    """Read records one after the other without an index: for tar shards, and for data sets that are not stored on this
    machine. Needs `trainer.max_steps`."""
    shuffle_buffer: int = field(default=1000, metadata=at_least(0))
    """Number of records in each block that a stream shuffles; readers hold two blocks of each source."""
    allow_pipe: bool = field(default=False, metadata=runs_code("runs `path` as a shell command", is_false))
    """Whether `path` may be `pipe:` and a command that a shell runs, such as `pipe:cat shard.tar`."""
    max_frames: int = field(default=8, metadata=at_least(1))
    """The maximum number of frames of a video, evenly spaced: as images, or as a video if the model supports videos.
    LLaVA-OneVision and LLaVA-NeXT-Video get exactly this many frames of every video; frames of a short video are
    repeated."""
    cache_dir: str | None = field(default=None, metadata=FOLDER)
    """Folder for indices, token counts and features; null: `vlm` in the Hugging Face cache (`HF_HOME`)."""
    num_workers: int | None = field(default=None, metadata=at_least(0))
    """Number of processes that count tokens before the first run on a data set; null: one per core."""
    eval_path: str | None = field(default=None, metadata=RECORDS)
    """Records for evaluation, in the same format; null: none, or `eval_split`."""
    eval_image_folder: str | None = None
    """The folder that their image paths are relative to; null: `image_folder`, or else the folder of `eval_path`."""
    eval_split: float | None = field(default=None, metadata=share(is_open_above=True))
    """Share of `path` to hold out for evaluation if there is no `eval_path`, drawn with `trainer.seed`; null: none, or
    0.2 for a head without `folds`. For a head it is stratified by label."""
    max_eval_samples: int | None = field(default=None, metadata=at_least(1))
    """Evaluate only on this many records, from the first on; null: all."""
    test_path: str | None = field(default=None, metadata=RECORDS)
    """For a head: records that only measure the trained head; null: none, or `test_split`."""
    test_image_folder: str | None = None
    """The folder that their image paths are relative to; null: `image_folder`, or else the folder of `test_path`."""
    test_split: float = field(default=0.0, metadata=share(is_open_above=True))
    """For a head: share of `path` to hold out for testing, stratified by label, before evaluation records are held
    out."""
    folds: int | None = field(default=None, metadata=at_least(2))
    """For a head on a frozen model, instead of evaluation records: number of folds of a cross-validation. Each head
    trains without one fold; temperature, threshold and metrics come from its outputs on that fold."""
    cache_features: bool | None = None
    """Compute the outputs of frozen parts once and cache them: for a head the hidden states of each record, for other
    runs the features of each image; null: only for heads on a frozen model."""
    cache_limit_gb: float | None = field(default=None, metadata=above(0))
    """Maximum size of cached image features in 10^9 bytes; those unused for longest are deleted; null: half of the sum
    of their size and the free disk space."""
    overlap: str = field(default="allow", metadata=choices(("allow", "warn", "refuse")))
    """Whether evaluation records may also be in the training data: `warn` and `refuse` compare images by their bytes
    and appearance, and texts by their words, before training (docs/data-quality.md); `allow` compares nothing."""
    template: str | None = None
    """A packaged template (`plain`, `v1`, `chatml` …), `tokenizer` for the tokenizer's own, or a `.jinja` file; null:
    the checkpoint's, or else the tokenizer's own."""
    supervise: str = field(default="replies", metadata=choices(SUPERVISIONS))
    """Which tokens of a conversation are supervised: `replies` and their ends; or `llava-onevision`: in ChatML, the
    assistant's whole turns, and the markers of turns and line breaks of other turns, as in the training of
    LLaVA-OneVision."""
    loss_patterns: dict[str, float] = field(default_factory=dict)
    """Loss weights for parts of replies: a mapping from regular expressions to factors above 0, which apply to every
    token with a character in a match (`{"<answer>.*?</answer>": 2}`); the last matching pattern counts. Only in YAML
    files, because Hydra's command line cannot quote such keys."""
    image_mode: str | None = field(default=None, metadata=choices(IMAGE_MODES))
    """`square`: resized by the encoder's image processor; `pad`: padded to a square first; `native`: at the image's own
    size and aspect ratio, within the limits of `model.native`; null: the checkpoint's, or else `native` for SigLIP 2
    with NaFlex and Qwen's vision towers, and `square` for others."""
    thinking: str = field(default="template", metadata=choices(THINKING_MODES))
    """Thinking in replies (`reasoning_content`, or `<think>…</think>` before the text): `template`: train on what the
    chat template writes; `keep`: train on all of it, and reject records whose thinking the template drops; `drop`:
    train without it."""
    alpha_background: str | None = field(default=None, metadata=choices(ALPHA_BACKGROUNDS))
    """Background of transparent images: `white`, `black` or `grey`; `drop`: ignore transparency, as in LLaVA, so that
    black ink on a transparent background is all black; null: the checkpoint's, or else `white`."""
    max_image_tokens: int | None = field(default=None, metadata=at_least(1))
    """Maximum number of tokens of an image or a video frame: larger images are shrunk, by options of the model's own
    processor, which are saved with it; null: as many as the processor makes."""
    coordinates: str = field(default="auto", metadata=choices(COORDINATES, custom="package.module:Class"))
    """Format of boxes, points and time spans (docs/coordinates.md); `auto`: the checkpoint's, or else the family's, or
    `llava` for composed models."""
    max_length: int | None = 2048
    """Maximum number of tokens of a sample, image tokens included; null: the number of positions of the language
    model."""
    over_length: str = field(default="error", metadata=choices(("error", "skip", "truncate", "split")))
    """What to do with a longer sample: `error`, `skip` (listed in `skipped.jsonl`), `truncate` (replies, never image
    tokens), or `split` it before questions into several samples, so that each reply is trained on once
    (docs/data.md)."""
    on_bad_sample: str = field(default="error", metadata=choices(("error", "skip")))
    """What to do with an unusable record: `error`, or `skip` (listed in `skipped.jsonl` with the reason)."""
    max_skipped: float = field(default=0.1, metadata=share())
    """The run stops if more than this share of the records is unusable."""
    check_samples: int | None = field(default=100, metadata=at_least(0))
    """Number of records of each source, from the first on, whose images are decoded before training; images of
    evaluation records are always decoded. Other images are only checked to exist and to begin like images. null: decode
    all."""
