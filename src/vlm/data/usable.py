"""Whether a record can be used: the one place that training, `vlm data show`, `stats` and `clean` ask.

A record that cannot be used is a `BadSample` with the reason. What depends on a model (its template, its longest
sequence) is the encoder's to refuse; `clean` adds rules of its own, such as the smallest side of an image.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm.data.records.guess import with_hint
from vlm.data.records.links import check_links
from vlm.data.sample import BadSample, Sample


@dataclass(frozen=True)
class RecordReader:
    """Reads records of one format, with its options, as samples.

    Attributes:
        read: the reader of `records.formats`, with its options bound.
        folder: what paths are relative to.
        format: its name, for messages.
        options: of the format, for messages.
        follow_links: whether links that lead out of the folder are followed.
        tool: how messages name options: as a `run` has them, `clean` or `convert`.
    """

    read: Callable[[object, Path], Sample]
    folder: Path
    format: str
    options: Mapping[str, object] = field(default_factory=dict)
    follow_links: bool = False
    tool: str = "run"

    def __call__(self, record: object) -> Sample:
        """Read a record as a sample; its blank replies are not learned.

        Raises:
            BadSample: it cannot be used.
        """
        if isinstance(record, BadSample):
            raise record
        try:
            sample = self.read(record, self.folder).map_sides(Sample.without_blank_replies)
            if not self.follow_links:
                check_links(sample, self.folder)
            return sample
        except BadSample as error:
            raise with_hint(error, record, self.format, self.options, self.tool) from None
        except Exception as error:  # a user's own reader may raise anything, and that concerns this record only
            name = str(record.get("id", "?")) if isinstance(record, dict) else "?"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            raise BadSample(name, f"its reader raised {type(error).__name__}: {error} ({place})") from error


def check_reply(sample: Sample, *, needed: bool) -> None:
    """Raise BadSample if a reply is needed and there is none to learn from; before any image is decoded."""
    if needed and (problem := sample.reply_problem):
        raise BadSample(sample.id, problem)
