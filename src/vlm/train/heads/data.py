"""The records of a head's run: what trains, what things are chosen by, and what they are only measured on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from vlm.assembly.heads import suffix_ids
from vlm.config.derived import get_heads
from vlm.config.schema import DatasetConfig, RunConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.heads.dataset import HeadDataset, fold_by_label, split_by_label, values_per_head
from vlm.data.heads.labels import HeadLabels, resolve_labels, strata

MAX_LOGGED_LABELS = 12
"""Most labels of a head that the log names."""

DEFAULT_EVAL_SHARE = 0.2
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

    all_datasets: list[HeadDataset]
    train: HeadDataset
    evaluation: HeadDataset | None
    test: HeadDataset | None
    folds: list[tuple[HeadDataset, HeadDataset]]
    heads: list[HeadLabels]

    def datasets_by_role(self) -> dict[str, SampleDataset]:
        """Role -> samples, for `data.json`."""
        found = {"train": self.train, "eval": self.evaluation, "test": self.test}
        return {role: one.dataset for role, one in found.items() if one is not None}

    def summary(self) -> str:
        """How the records are divided, and what each head's labels are among those that train."""
        sets = [f"{len(one):,} {role}" for role, one in self.datasets_by_role().items()]
        lines = [f"{', '.join(sets)}{f', in {len(self.folds)} folds' if self.folds else ''}"]
        label_values = values_per_head(self.train.dataset.labels, [head.name for head in self.heads])
        for head in self.heads:
            known = [one for one in label_values[head.name] if one is not None]
            counts = Counter(map(str, chain.from_iterable(one if isinstance(one, list) else [one] for one in known)))
            listed = ", ".join(f"{label} {counts[str(label)]:,}" for label in head.labels[:MAX_LOGGED_LABELS])
            more = f" … ({len(head.labels)} labels)" if len(head.labels) > MAX_LOGGED_LABELS else ""
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
    encoder = make_prompt_encoder(config, model_config, processor)
    all_samples = load_dataset(data, encoder, seed=seed)
    given = {
        "eval": _load_other_file(data, encoder, data.eval_path, data.eval_image_folder, data.max_eval_samples),
        "test": _load_other_file(data, encoder, data.test_path, data.test_image_folder, None),
    }
    named = get_heads(config.model.head)
    values = values_per_head(all_samples.labels, list(named))
    check_labels(all_samples, values)
    heads = [resolve_labels(name, str(one.task), one.labels, values[name]) for name, one in named.items()]

    train, parts = all_samples, {role: one for role, one in given.items() if one is not None}
    if data.test_split:
        train, parts["test"] = _hold_out(train, heads[0], data.test_split, seed, "dataset.test_split")
    share = (
        DEFAULT_EVAL_SHARE
        if data.eval_split is None and data.folds is None and "eval" not in parts
        else data.eval_split
    )
    if share:
        train, parts["eval"] = _hold_out(train, heads[0], share, seed, "dataset.eval_split")
    if data.max_eval_samples is not None and "eval" in parts:
        parts["eval"] = parts["eval"].subset(range(len(parts["eval"]))[: data.max_eval_samples])
    trained = values_per_head(train.labels, list(named))
    for head in heads:
        resolve_labels(head.name, head.task, head.labels or None, trained[head.name])  # none is absent from training
    for role, one in parts.items():
        label_values_of_role = values_per_head(one.labels, list(named))
        check_labels(one, label_values_of_role, role)
        check_labels_for_each_head(label_values_of_role, role)

    folds = []
    if data.folds is not None:
        groups = strata(heads[0], trained[heads[0].name])
        folds = fold_by_label(train, groups, data.folds, seed, heads[0].labels)
    return HeadData(
        all_datasets=[HeadDataset(one, heads) for one in (all_samples, *given.values()) if one is not None],
        train=HeadDataset(train, heads),
        evaluation=HeadDataset(parts["eval"], heads) if "eval" in parts else None,
        test=HeadDataset(parts["test"], heads) if "test" in parts else None,
        folds=[(HeadDataset(rest, heads), HeadDataset(held, heads)) for rest, held in folds],
        heads=heads,
    )


def make_prompt_encoder(config: RunConfig, model_config: Any, processor: Any) -> PromptEncoder:
    """What encodes the prompts of a run: at most as long as it says, and as the language model has positions."""
    positions = model_config.get_text_config().max_position_embeddings
    longest = min(config.dataset.max_length or positions, positions)
    suffix = suffix_ids(config.model, processor.tokenizer)
    return PromptEncoder(
        processor, longest, truncate=False, suffix=suffix, answers=config.model.head.generation_weight > 0
    )


def _load_other_file(
    data: DatasetConfig, encoder: PromptEncoder, path: str | None, folder: str | None, first: int | None
) -> SampleDataset | None:
    """Records of another file, read as those of the run are."""
    if path is None:
        return None
    config = replace(data, path=path, image_folder=folder or data.image_folder, sources={}, max_samples=None)
    return load_dataset(config, encoder, first=first, evaluates=True)


def _hold_out(
    dataset: SampleDataset, head: HeadLabels, share: float, seed: int, key: str
) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a share, stratified by the first head's labels."""
    values = values_per_head(dataset.labels, [head.name])[head.name]
    return split_by_label(dataset, strata(head, values), share, seed, head.labels, key)


def check_labels(dataset: SampleDataset, values: dict[str, list[Any]], role: str = "train") -> None:
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


def check_labels_for_each_head(values: dict[str, list[Any]], role: str) -> None:
    """Raise ValueError where no record of a set has a label for a head, which could not be measured then."""
    for name, label_values in values.items():
        if all(one is None for one in label_values):
            raise ValueError(
                f"head {name}: none of {len(label_values)} {role} records has a label for it; give more of them "
                f"(dataset.{role}_split), or others (dataset.{role}_path)"
            )


def targets_by_head(heads: Sequence[HeadLabels], dataset: HeadDataset) -> dict[str, np.ndarray]:
    """Head -> `(N, width)`, the targets of a dataset."""
    return {head.name: dataset.targets(head.name) for head in heads}
