"""The records that two models are compared on: samples with the groups by which results are split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.data.encoding.prompts import prompt_turns
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.sample import BadSample, Record, Sample
from vlm.data.sources import Source
from vlm.evaluation.comparison.questions import question_kind
from vlm.evaluation.probe.grading import Check
from vlm.evaluation.probe.write import CHECK_KEY
from vlm.inference.generate_file import question_text

HELD_OUT, PROBE = "held-out", "probe"
"""The sets of records: those of the user, and those of `vlm.evaluation.probe`."""
KIND_KEY = "kind"
"""The key by which records name the kind of their question."""


@dataclass(frozen=True)
class ComparedRecord:
    """A record that both models answer.

    Attributes:
        sample: the record as this model reads it.
        encoder: encodes it with a reply, for losses.
        dataset: its set, `held-out` or `probe`.
        groups: the name of a way to split results (`source`, `kind`, keys of records) -> the group of this record.
        check: what makes an answer right, of records of the probe.
    """

    sample: Sample
    encoder: SampleEncoder
    dataset: str
    groups: dict[str, str]
    check: Check | None = None


def read_compared(
    source: Source, numbers: Sequence[int] | np.ndarray, dataset: str, keys: Sequence[str] = ()
) -> list[ComparedRecord | BadSample]:
    """Return records of a source by their numbers, or why one cannot be used.

    Results are split by the source, by the kind of question (a record's `kind`, else what its words tell), and by
    `keys` of records.
    """

    def read(number: int) -> ComparedRecord:
        """Read one record."""
        record = source.records[number]
        sample = source.read(record)
        values: Record = record if isinstance(record, dict) else {}
        kind = values.get(KIND_KEY)
        groups = {"source": source.name, "kind": kind if isinstance(kind, str) else _kind_of_sample(sample)}
        groups |= {key: str(values[key]) for key in keys if values.get(key) is not None}
        if dataset != PROBE:
            return ComparedRecord(sample, source.encoder, dataset, groups)
        return ComparedRecord(
            sample, source.encoder, dataset, {"kind": groups["kind"]}, Check.from_record(values.get(CHECK_KEY))
        )

    return [value_or_bad_sample(read, int(number)) for number in numbers]


def _kind_of_sample(sample: Sample) -> str:
    """Return the kind of the last question of a sample."""
    question = next((turn for turn in reversed(prompt_turns(sample)) if turn.role == "user"), None)
    return question_kind("" if question is None else question_text(question))
