"""The records of a head's run: what trains, what things are chosen by, and what they are only measured on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from vlm.assembly.heads import suffix_ids
from vlm.config.derived import heads_of
from vlm.config.schema import DatasetConfig, RunConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.heads.dataset import HeadDataset, fold_labelled, split_labelled, values_of
from vlm.data.heads.labels import HeadLabels, settle_labels, strata

SHOWN = 12
"""Most labels of a head that the log names."""

HELD_OUT = 0.2
"""Share of the records that is held out where nothing says how much."""


@dataclass
class HeadData:
    """The records of a run.

    Attributes:
        every: all records of training, and of other files that are named, before anything is held out of them.
        train: what trains.
        evaluation: what thresholds and temperatures are chosen by; None where there are folds.
        test: what things are only measured on; None: nothing.
        folds: for each, what trains and what is held out; none where there is `evaluation`.
        heads: what each head learns.
    """

    every: list[HeadDataset]
    train: HeadDataset
    evaluation: HeadDataset | None
    test: HeadDataset | None
    folds: list[tuple[HeadDataset, HeadDataset]]
    heads: list[HeadLabels]

    def roles(self) -> dict[str, SampleDataset]:
        """Role -> samples, for `data.json`."""
        found = {"train": self.train, "eval": self.evaluation, "test": self.test}
        return {role: one.dataset for role, one in found.items() if one is not None}

    def as_text(self) -> str:
        """How the records are divided, and what each head's labels are among those that train."""
        sets = [f"{len(one):,} {role}" for role, one in self.roles().items()]
        lines = [f"{', '.join(sets)}{f', in {len(self.folds)} folds' if self.folds else ''}"]
        said = values_of(self.train.dataset.labels, [head.name for head in self.heads])
        for head in self.heads:
            known = [one for one in said[head.name] if one is not None]
            counts = Counter(map(str, chain.from_iterable(one if isinstance(one, list) else [one] for one in known)))
            listed = ", ".join(f"{label} {counts[str(label)]:,}" for label in head.labels[:SHOWN])
            more = f" … ({len(head.labels)} labels)" if len(head.labels) > SHOWN else ""
            lines.append(
                f"{head.name} ({head.task}), {len(known):,} with a label{': ' if listed else ''}{listed}{more}"
            )
        return "\n".join(lines)


def load_head_data(config: RunConfig, model_config: Any, processor: Any, seed: int) -> HeadData:
    """Read, check, count and divide the records; every label is known to be one before a weight is loaded.

    Raises:
        ValueError: a record or a label cannot be used, or there are too few to hold some out.
    """
    data = config.dataset
    encoder = prompt_encoder(config, model_config, processor)
    whole = load_dataset(data, encoder, seed=seed)
    given = {
        "eval": _other(data, encoder, data.eval_path, data.eval_image_folder, data.max_eval_samples),
        "test": _other(data, encoder, data.test_path, data.test_image_folder, None),
    }
    named = heads_of(config.model.head)
    values = values_of(whole.labels, list(named))
    need_labels(whole, values)
    heads = [settle_labels(name, str(one.task), one.labels, values[name]) for name, one in named.items()]

    train, parts = whole, {role: one for role, one in given.items() if one is not None}
    if data.test_split:
        train, parts["test"] = _held_out(train, heads[0], data.test_split, seed, "dataset.test_split")
    share = HELD_OUT if data.eval_split is None and data.folds is None and "eval" not in parts else data.eval_split
    if share:
        train, parts["eval"] = _held_out(train, heads[0], share, seed, "dataset.eval_split")
    if data.max_eval_samples is not None and "eval" in parts:
        parts["eval"] = parts["eval"].subset(range(len(parts["eval"]))[: data.max_eval_samples])
    trained = values_of(train.labels, list(named))
    for head in heads:
        settle_labels(head.name, head.task, head.labels or None, trained[head.name])  # none is absent from training
    for role, one in parts.items():
        measured = values_of(one.labels, list(named))
        need_labels(one, measured, role)
        need_each_head(measured, role)

    folds = []
    if data.folds is not None:
        groups = strata(heads[0], trained[heads[0].name])
        folds = fold_labelled(train, groups, data.folds, seed, heads[0].labels)
    return HeadData(
        every=[HeadDataset(one, heads) for one in (whole, *given.values()) if one is not None],
        train=HeadDataset(train, heads),
        evaluation=HeadDataset(parts["eval"], heads) if "eval" in parts else None,
        test=HeadDataset(parts["test"], heads) if "test" in parts else None,
        folds=[(HeadDataset(rest, heads), HeadDataset(held, heads)) for rest, held in folds],
        heads=heads,
    )


def prompt_encoder(config: RunConfig, model_config: Any, processor: Any) -> PromptEncoder:
    """What encodes the prompts of a run: at most as long as it says, and as the language model has positions."""
    positions = model_config.get_text_config().max_position_embeddings
    longest = min(config.dataset.max_length or positions, positions)
    suffix = suffix_ids(config.model, processor.tokenizer)
    return PromptEncoder(
        processor, longest, truncate=False, suffix=suffix, answers=config.model.head.generation_weight > 0
    )


def _other(
    data: DatasetConfig, encoder: PromptEncoder, path: str | None, folder: str | None, first: int | None
) -> SampleDataset | None:
    """Records of another file, read as those of the run are."""
    if path is None:
        return None
    config = replace(data, path=path, image_folder=folder or data.image_folder, sources={}, max_samples=None)
    return load_dataset(config, encoder, first=first, evaluates=True)


def _held_out(
    dataset: SampleDataset, head: HeadLabels, share: float, seed: int, key: str
) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a share, stratified by the first head's labels."""
    values = values_of(dataset.labels, [head.name])[head.name]
    return split_labelled(dataset, strata(head, values), share, seed, head.labels, key)


def need_labels(dataset: SampleDataset, values: dict[str, list[Any]], role: str = "train") -> None:
    """Raise ValueError where a record has no label for any head."""
    without = np.flatnonzero([all(one is None for one in row) for row in zip(*values.values(), strict=True)])
    if len(without) == 0:
        return
    source, record = dataset.places[without[0]].tolist()
    raise ValueError(
        f"{dataset.sources[source].path}: {len(without)} of {len(dataset)} {role} records have no label, the first is "
        f"record {record}. A label is looked for as `label` of each record; dataset.format=labelled takes another "
        "column as dataset.options.label_key"
    )


def need_each_head(values: dict[str, list[Any]], role: str) -> None:
    """Raise ValueError where no record of a set has a label for a head, which could not be measured then."""
    for name, said in values.items():
        if all(one is None for one in said):
            raise ValueError(
                f"head {name}: none of {len(said)} {role} records has a label for it; give more of them "
                f"(dataset.{role}_split), or others (dataset.{role}_path)"
            )


def targets_of(heads: Sequence[HeadLabels], dataset: HeadDataset) -> dict[str, np.ndarray]:
    """Head -> `(N, width)`, the targets of a dataset."""
    return {head.name: dataset.targets(head.name) for head in heads}
