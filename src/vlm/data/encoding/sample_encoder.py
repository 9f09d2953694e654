"""From a sample to ids and labels, for one run."""

import hashlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.cache import json_digest
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded, encode, get_media_token_ids, limit_length
from vlm.data.sample import MediaSize, Sample


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes samples for one run: the replies are learnt.

    Attributes:
        processor: decides every token.
        longest: most tokens that a sample may have.
        truncate: whether a longer one loses its end, instead of being refused.
    """

    encodes_labels: ClassVar[bool] = False
    """Whether labels of records are asked for, see `learnt`."""

    processor: Any
    longest: int
    truncate: bool

    def __call__(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Ids and labels of a sample; `sizes` of its pictures, where the processor needs them.

        Raises:
            BadSample: it cannot be used, or is too long.
        """
        encoded = self.encode(sample, sizes)
        return limit_length(
            encoded, self.longest, get_media_token_ids(self.processor), sample.id, truncate=self.truncate
        )

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """The same of a whole sample, however long it is.

        Raises:
            BadSample: it cannot be used.
        """
        return encode(self.processor, sample, sizes)

    def min_length(self, encoded: Encoded) -> int:
        """The fewest tokens that it may be cut to: up to its last image or video, and its first supervised one."""
        ids, labels = encoded.input_ids, encoded.labels
        first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        media = get_media_token_ids(self.processor)
        behind_media = max((len(ids) - ids[::-1].index(one) for one in media if one in ids), default=0)
        return max(first + 1, behind_media)

    def label_and_group(self, sample: Sample) -> tuple[str | None, str | None]:
        """What a prediction head learns of a sample, as JSON, and its group; nothing where replies are learnt alone."""
        return None, None

    @property
    def fingerprint_fields(self) -> tuple[Any, ...]:
        """What ids and labels depend on besides the processor."""
        return (type(self).__name__,)


def processor_digest(processor: Any) -> str:
    """A name for what a processor makes of text: its tokenizer, template and settings, and the code that runs."""
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    code = hashlib.sha256()
    sides = Path(inspect.getfile(type(processor))).parent
    names = ("*process*.py", "anyres.py", "table.py", "videos.py")
    beside = [file for name in names for file in sorted(sides.glob(name))]
    files = [*sorted(Path(__file__).parent.glob("*.py")), *beside]
    for file in files:
        code.update(file.read_bytes())
    return json_digest(
        processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template, processor.image_token_ids(),
        processor.image_token, processor.to_dict(), versions, code.hexdigest(),
    )  # fmt: skip
