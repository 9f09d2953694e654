"""Certificates: what `vlm verify` compared, in `verification.json` beside a checkpoint. Imports no torch.

A certificate holds the fingerprint of the files that it is about; where those have changed, it is stale, and no model
card shows it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlm.hub.folders import NON_WEIGHT_FILES, read_json, write_json

CERTIFICATE_FILE = "verification.json"
WEIGHT_PATTERN = "*.safetensors"

PLAIN_TEXT = re.compile(r"[\w .,+()-]{1,80}")
"""Names and dates that go into a card: nothing that Markdown makes a link or a tag of, whoever wrote the file."""


@dataclass(frozen=True)
class ComparedStage:
    """What was found of one stage: its name, the cases, the largest difference and the largest that is rounding."""

    stage: str
    cases: int
    largest: float
    allowed: float


@dataclass(frozen=True)
class Certificate:
    """The result of one comparison.

    Attributes:
        engine: the engine with its version.
        is_run: whether the engine ran; False for a check on paper.
        difference: what differs, where and by how much, as one sentence; None where nothing does.
        different_stage: where it differs first: `pixels`, `ids`, a layer, `logits`, `answers` or `settings`.
        stages: what was compared before the answers.
        answers: how many answers were compared.
        equal_answers: how many of them are equal.
        tied_answers: how many of the others differ first in two tokens whose logits differ by rounding.
        dtype: the precision of both.
        date: in UTC, as `2026-11-30`.
        version: of this package.
        fingerprint: of the checkpoint's files, see `fingerprint_files`.
        notes: what a reader has to know, as sentences.
    """

    engine: str
    is_run: bool
    difference: str | None
    different_stage: str | None
    stages: Sequence[ComparedStage]
    answers: int
    equal_answers: int
    tied_answers: int
    dtype: str
    date: str
    version: str
    fingerprint: str
    notes: Sequence[str] = field(default=())

    def row(self) -> tuple[str, str, str, str, str]:
        """Return the cells of a table: engine, what was compared, largest difference of logits, answers, date.

        A difference is named by its stage alone: its sentence may hold texts of the user's records.
        """
        engine = self.engine if self.is_run else f"{self.engine}, on paper: not run"
        compared = [stage.stage for stage in self.stages] if self.is_run else ["names", "shapes", "settings"]
        sizes = [f"{stage.largest:.2g}" for stage in self.stages if stage.stage == "logits"]
        tied = f", {self.tied_answers} tied" if self.tied_answers else ""
        answers = f"{self.equal_answers} of {self.answers} equal{tied}" if self.answers else "–"
        result = f"differs: {self.different_stage}" if self.difference else ", ".join(compared)
        return engine, result, sizes[0] if sizes else "–", answers, self.date


TABLE_TITLES = ("engine", "compared", "largest difference of logits", "greedy answers", "date")
"""The titles of `Certificate.row`."""


def fingerprint_files(folder: Path) -> str:
    """Return a hash of all that a checkpoint is loaded from: weights, configuration, tokenizer, processor, template."""
    digest = hashlib.sha256()
    files = {file for pattern in (WEIGHT_PATTERN, *NON_WEIGHT_FILES) for file in folder.glob(pattern)}
    for file in sorted(files - {folder / CERTIFICATE_FILE}):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def add_certificate(file: Path, key: str, certificate: Certificate) -> None:
    """Write a certificate into a file, in place of an earlier one of the same engine, `key`, beside those of others."""
    write_json(file, read_json(file) | {key: asdict(certificate)})


def read_certificates(folder: Path) -> list[Certificate]:
    """Return the certificates beside a checkpoint that are about its files as they are now.

    Entries that `vlm verify` of this version does not write are passed over as stale ones are.
    """
    entries = read_json(folder / CERTIFICATE_FILE)
    if not entries:
        return []
    fingerprint = fingerprint_files(folder)
    found = [_read_entry(entries[key]) for key in sorted(entries)]
    return [certificate for certificate in found if certificate is not None and certificate.fingerprint == fingerprint]


def _read_entry(entry: object) -> Certificate | None:
    """Return a certificate; None for an entry with other fields, or with values that do not belong into a card."""
    if not isinstance(entry, dict):
        return None
    try:
        certificate = Certificate(**{**entry, "stages": [ComparedStage(**stage) for stage in entry["stages"]]})
    except (KeyError, TypeError):
        return None
    texts = [certificate.engine, certificate.date, certificate.different_stage or "none"]
    texts += [stage.stage for stage in certificate.stages]
    numbers = [certificate.answers, certificate.equal_answers, certificate.tied_answers]
    numbers += [stage.largest for stage in certificate.stages]
    is_plain = all(isinstance(text, str) and PLAIN_TEXT.fullmatch(text) for text in texts)
    return certificate if is_plain and all(isinstance(number, int | float) for number in numbers) else None
