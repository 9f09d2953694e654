"""What prediction heads say of a file of records, as a table: in batches, and gone on with where it was stopped.

Rows are written to `OUTPUT.partial`, which becomes OUTPUT when it is complete; `OUTPUT.partial.json` beside it says
what is being predicted, so that another run goes on with nothing but that.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.config.schema import SourceConfig
from vlm.data.cache import digest_of
from vlm.data.collate import Collator
from vlm.data.dataset import encoded_item
from vlm.data.labels import HeadLabels
from vlm.data.prompts import PromptEncoder
from vlm.data.sample import BadSample, Sample
from vlm.data.sources import Source
from vlm.inference.calibration import Calibration
from vlm.inference.generate import on_device
from vlm.inference.predict import Prediction, Predictor
from vlm.inference.predict_command import need_new
from vlm.inference.scores import as_table, scores


@dataclass(frozen=True)
class Predicted:
    """What came of a file of records.

    Attributes:
        records: how many there are.
        bad: how many could not be read.
        measures: of those that have labels, as tables.
    """

    records: int
    bad: int
    measures: str


def predict_file(
    predictor: Predictor, config: SourceConfig, output: Path, *, cache: Path, fingerprint: str, batch_size: int = 16,
    num_workers: int = 2, max_frames: int, overwrite: bool = False,
) -> "Predicted":  # fmt: skip
    """Predict every record of a file.

    Args:
        predictor: the model.
        config: the records and how they are read.
        output: a `.csv` or `.jsonl` file.
        cache: where indices of records are kept.
        fingerprint: of the checkpoint.
        batch_size: records at a time.
        num_workers: processes that read and decode pictures.
        max_frames: of a video.
        overwrite: whether what is there, or was begun, is replaced.

    Returns:
        How many records there were, and measures of those that have labels.

    Raises:
        ValueError: the output is there already, or was begun with something else.
    """
    need_new(output, overwrite=overwrite)
    source = source_of(predictor, config, cache, max_frames)
    table = Table(output, column_names(predictor), digest_of(fingerprint, heads_digest(predictor), source.fingerprint))
    done = table.begin(overwrite=overwrite)
    with table.opened() as write, tqdm(total=len(source), initial=done, desc="predicting", unit="record") as bar:
        for read, batch in _loader(source, predictor, done, batch_size, num_workers):
            said = iter(predictor.of(on_device(batch, predictor.processor, predictor.model.device)) if batch else [])
            write([
                row_of(predictor, sample, None if isinstance(problem, BadSample) else next(said), problem)
                for sample, problem in read
            ])  # fmt: skip
            bar.update(len(read))
    rows = table.rows()
    table.finish()
    return Predicted(len(rows), sum(bool(row["error"]) for row in rows), measured(predictor, rows))


def heads_digest(predictor: Predictor) -> str:
    """A name for a model's heads and what they decide by: they are too small for a fingerprint of pieces of files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.heads.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest_of(digest.hexdigest(), predictor.model.config.heads)


def source_of(predictor: Predictor, config: SourceConfig, cache: Path, max_frames: int) -> Source:
    """The records, each as the prompt that it was in training."""
    model_config = predictor.model.config
    longest = model_config.get_text_config().max_position_embeddings
    encoder = PromptEncoder(predictor.processor, longest, truncate=False, suffix=tuple(model_config.suffix_ids))
    return Source(Path(str(config.path)).name, config, cache, encoder, max_frames)


class _Prompts(Dataset[Any]):
    """Records from a number on: each sample, and what the model reads of it or why it cannot be read.

    Of a record that is no sample, what it calls itself and its label are kept.
    """

    def __init__(self, source: Source, start: int):
        self.source, self.start = source, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index: int) -> tuple[Sample, dict[str, Any] | BadSample]:
        sample, record = None, None
        try:
            record = self.source.records[self.start + index]
            sample = self.source.read(record)
            return self._named(sample, index), encoded_item(self.source, sample)
        except BadSample as error:
            label = record.get("label") if isinstance(record, dict) else None
            sample = sample or Sample(error.sample_id, (), label)
            return self._named(sample, index), error

    def _named(self, sample: Sample, index: int) -> Sample:
        """A sample that calls itself nothing is called by its file and its number there, from 0."""
        return sample if sample.id != "?" else replace(sample, id=f"{self.source.name}:{self.start + index}")


def _loader(source: Source, predictor: Predictor, start: int, batch_size: int, num_workers: int) -> DataLoader:
    """Batches of (samples with their problem or None, inputs of those that have none)."""
    collate = Collator.of(predictor.processor)

    def lay_out(rows: list[tuple[Sample, Any]]) -> tuple[list[tuple[Sample, BadSample | None]], dict[str, Any]]:
        read = [(sample, item if isinstance(item, BadSample) else None) for sample, item in rows]
        whole = [item for _, item in rows if not isinstance(item, BadSample)]
        return read, collate(whole) if whole else {}

    return DataLoader(_Prompts(source, start), batch_size, collate_fn=lay_out, num_workers=num_workers)


def column_names(predictor: Predictor) -> list[str]:
    """The columns of a table for a model's heads.

    What a record calls itself, its pictures, its label if it has one, what the head says, or why it could not be read.
    With several heads `label`, `score` and `prediction` are followed by `_` and a head's name.
    """
    heads = predictor.heads
    ends = [""] if len(heads) == 1 else [f"_{one.name}" for one in heads]
    own = [f"{name}{end}" for end in ends for name in ("label", "score", "prediction")]
    return ["source", "image_path", *own, "error"]


def row_of(
    predictor: Predictor, sample: Sample, found: dict[str, Prediction] | None, problem: BadSample | None
) -> dict[str, Any]:  # fmt: skip
    """A record's row; in JSON lines with the `outputs` of its heads and the `probabilities` of labels beside."""
    shown = problem.file or "" if problem is not None else ";".join(map(str, sample.media))
    row: dict[str, Any] = {"source": sample.id, "image_path": shown}
    label = sample.label
    for one in predictor.heads:
        end = "" if len(predictor.heads) == 1 else f"_{one.name}"
        said = None if found is None else found[one.name]
        row |= {
            f"label{end}": label.get(one.name) if isinstance(label, dict) else label,
            f"score{end}": None if said is None else said.score,
            f"prediction{end}": None if said is None else said.prediction,
            f"probabilities{end}": {} if said is None else {str(k): v for k, v in said.probabilities.items()},
            f"outputs{end}": None if said is None else list(said.outputs),
        }
    return {**row, "error": "" if problem is None else problem.reason}


class Table:
    """A file of rows that is complete once it has its name; until then it is JSON lines, whatever it is to be.

    Args:
        path: the file to be.
        columns: of a `.csv`; JSON lines have whatever a row has.
        fingerprint: of what is written into it.
    """

    def __init__(self, path: Path, columns: Sequence[str], fingerprint: str):
        self.path, self.columns, self.fingerprint = path, columns, fingerprint
        self.partial = path.with_name(f"{path.name}.partial")
        self.facts = path.with_name(f"{path.name}.partial.json")

    def begin(self, *, overwrite: bool) -> int:
        """How many rows are there already, of a run that was stopped; what it left of a last row is cut off.

        Raises:
            ValueError: what was begun is something else.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.partial.exists() and self.facts.exists()) or overwrite:
            self.facts.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
            self.partial.write_bytes(b"")
            return 0
        if json.loads(self.facts.read_text(encoding="utf-8"))["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.partial} was begun with another checkpoint, other records or other options; name another "
                "output, or give --overwrite"
            )
        content = self.partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        self.partial.write_bytes(whole)
        return whole.count(b"\n")

    @contextmanager
    def opened(self) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
        """A function that writes rows, which are on disk then."""
        with self.partial.open("a", encoding="utf-8") as file:

            def write(rows: Sequence[dict[str, Any]]) -> None:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()

            yield write

    def rows(self) -> list[dict[str, Any]]:
        """What has been written."""
        with self.partial.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def finish(self) -> None:
        """Give the file its form and its name."""
        if self.path.suffix == ".csv":
            table = self.path.with_name(f"{self.path.name}.partial.csv")
            with table.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows({name: _cell(value) for name, value in row.items()} for row in self.rows())
            table.replace(self.path)
            self.partial.unlink()
        else:
            self.partial.replace(self.path)
        self.facts.unlink()


def _cell(value: Any) -> Any:
    """A value of a row as a cell: what a list holds is joined by `;`."""
    return ";".join(map(str, value)) if isinstance(value, list) else value


def attempted(labels: HeadLabels, value: Any) -> list[float] | ValueError:
    """A label as numbers, or why the head does not know it."""
    try:
        return labels.target(value)
    except ValueError as error:
        return error


def measured(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> str:
    """Measures of what was said of records that have labels that a head knows, as tables, and how many it does not."""
    tables = []
    for one in predictor.heads:
        end = "" if len(predictor.heads) == 1 else f"_{one.name}"
        known = [row for row in rows if row[f"label{end}"] is not None and not row["error"]]
        if not known or one.task == "pairwise":
            continue
        labels = HeadLabels(one.name, one.task, tuple(one.labels))
        said = [attempted(labels, row[f"label{end}"]) for row in known]
        if strange := [number for number, target in enumerate(said) if isinstance(target, ValueError)]:
            tables.append(f"{len(strange)} of {len(known)} labels are left out of the measures, the first is that of "
                          f"{known[strange[0]]['source']}: {said[strange[0]]}")  # fmt: skip
        known = [row for row, target in zip(known, said, strict=True) if not isinstance(target, ValueError)]
        if not known:
            continue
        targets = np.array([target for target in said if not isinstance(target, ValueError)])
        outputs = np.array([row[f"outputs{end}"] for row in known])
        chosen = Calibration(one.temperature, one.threshold)
        found = scores(one.task, outputs, targets if one.task == "multilabel" else targets[:, 0], chosen)
        tables.append(f"{one.name} ({one.task}), {len(known):,} records with a label\n\n{as_table(found)}")
    return "\n\n".join(tables)
