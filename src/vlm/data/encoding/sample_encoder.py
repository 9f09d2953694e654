"""Encodes samples as ids and labels, for one run."""

import hashlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from vlm.data.cache import json_digest
from vlm.data.encoding.labels import IGNORE_INDEX, SMALLER_IMAGES, Encoded, encode, get_media_token_ids, limit_length
from vlm.data.encoding.loss_weights import ALL_ONE, LossWeights
from vlm.data.encoding.renderer import Renderer
from vlm.data.encoding.supervision import SUPERVISIONS
from vlm.data.encoding.thinking import drop_thinking
from vlm.data.processor import Processor
from vlm.data.sample import MediaSize, Sample

NO_LIMIT = 2**31 - 1
"""The maximum number of tokens of a sample where nothing bounds them: the largest number that counts of tokens hold."""


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes samples for a run that trains on replies.

    Attributes:
        processor: determines every token.
        longest: the largest number of tokens of a sample; `NO_LIMIT` for any.
        truncate: whether a longer sample is cut at its end, instead of being refused.
        supervise: which tokens are supervised, `dataset.supervise`.
        thinking: how the thinking of replies is treated, `dataset.thinking`.
        factors: how much the losses of tokens count, `dataset.loss_patterns` and `dataset.sources.….loss_weight`.
    """

    encodes_labels: ClassVar[bool] = False
    """Whether `label_and_group` reads the labels of records."""
    needs_reply: ClassVar[bool] = True
    """Whether a record needs a reply to train on."""

    processor: Processor
    longest: int
    truncate: bool
    supervise: str = "replies"
    thinking: str = "template"
    factors: LossWeights = ALL_ONE

    def __call__(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids and labels of a sample, given the `sizes` of its images if the processor needs them.

        Raises:
            BadSample: it cannot be used, or is too long.
        """
        media = get_media_token_ids(self.processor)
        hint = SMALLER_IMAGES if sample.media and self.processor.needs_image_sizes else ""
        encoded = self.encode(sample, sizes)
        return limit_length(encoded, self.longest, media, sample.id, truncate=self.truncate, hint=hint)

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids and labels of a sample, without a limit of length.

        Raises:
            BadSample: it cannot be used.
        """
        sample = self.with_thinking(sample)
        keep = self.thinking == "keep"
        label = SUPERVISIONS[self.supervise]
        return encode(self.processor, sample, sizes, label, self.renderer, keep_thinking=keep, factors=self.factors)

    def with_thinking(self, sample: Sample) -> Sample:
        """Return a sample with the thinking that the run uses."""
        return drop_thinking(sample) if self.thinking == "drop" else sample

    @cached_property
    def renderer(self) -> Renderer:
        """Renders conversations with the processor's template."""
        return Renderer(self.processor)

    def min_length(self, encoded: Encoded) -> int:
        """Return the fewest tokens that a sample may be cut to: up to its last image or video, and its first label."""
        ids, labels = encoded.input_ids, encoded.labels
        first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        media = get_media_token_ids(self.processor)
        behind_media = max((len(ids) - ids[::-1].index(media_id) for media_id in media if media_id in ids), default=0)
        return max(first + 1, behind_media)

    def label_and_group(self, sample: Sample) -> tuple[str | None, str | None]:
        """Return the label of a sample as JSON, and its group; nothing if only replies are trained on."""
        return None, None

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        """The settings that ids and labels depend on, besides the processor."""
        return type(self).__name__, self.supervise, self.thinking


DATA_FOLDER = Path(__file__).parent.parent
DATA_FILES = ("*.py", "coordinates/*.py", "encoding/*.py", "records/*.py", "vision/*.py")
PROCESSOR_FILES = (
    *("*process*.py", "anyres.py", "image_inputs.py", "native.py", "pixels.py", "table.py", "videos.py"),
)
"""The files on which ids and counts depend: those of this package, and those of processors (in the folder of the
processor's class, and in `vlm/models`, whose functions all processors call)."""


def processor_digest(processor: Processor) -> str:
    """Return a digest of everything on which ids depend: tokenizer, template, settings, and the encoding's code."""
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    processor_folders = dict.fromkeys((Path(inspect.getfile(type(processor))).parent, DATA_FOLDER.parent / "models"))
    folders = {DATA_FOLDER: DATA_FILES, **dict.fromkeys(processor_folders, PROCESSOR_FILES)}
    files = [file for folder, names in folders.items() for name in names for file in sorted(folder.glob(name))]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    text = (processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template)
    images = (processor.image_token_ids(), processor.image_token)
    return json_digest(*text, *images, processor.to_dict(), versions, code.hexdigest())
