"""The records of a run with heads: those that train, those that things are chosen by, and those only measured on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from vlm.assembly.heads import suffix_ids
from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.heads.dataset import HeadCollator, HeadDataset, fold_by_label, split_by_label, values_per_head
from vlm.data.heads.labels import HeadLabels, resolve_labels, strata
from vlm.data.overlap import check_overlap
from vlm.data.processor import Processor
from vlm.data.skipped import Skipped
from vlm.train.data import load_other_file, max_sample_length
from vlm.train.monitor.plots import write_first_batch
from vlm.train.objectives.base import Inputs

MAX_LOGGED_LABELS = 12
"""Most labels of a head that the log names."""

MAX_SHOWN_PROMPTS = 8
"""Most prompts of `first_batch.html`."""

DEFAULT_EVAL_SHARE = 0.2
"""Share of the records that is held out where nothing says how much."""


@dataclass
class HeadData:
    """The records of a run.

    Attributes:
        all_datasets: all records of training, and of other files that are named, before any are held out of them.
        train: the records that train the heads.
        evaluation: the records that thresholds and temperatures are chosen by; None if there are folds.
        test: the records that are only measured on; None: there are none.
        folds: for each, what trains and what is held out; empty where there is `evaluation`.
        heads: what each head learns.
    """

    all_datasets: list[HeadDataset]
    train: HeadDataset
    evaluation: HeadDataset | None
    test: HeadDataset | None
    folds: list[tuple[HeadDataset, HeadDataset]]
    heads: list[HeadLabels]

    def datasets_by_role(self) -> dict[str, SampleDataset]:
        """Return role -> samples, for `data.json`."""
        datasets = {"train": self.train, "eval": self.evaluation, "test": self.test}
        return {role: dataset.dataset for role, dataset in datasets.items() if dataset is not None}

    def summary(self) -> str:
        """Return how the records are divided, and how many of those that train have each label of each head."""
        sizes = ", ".join(f"{len(dataset):,} {role}" for role, dataset in self.datasets_by_role().items())
        lines = [f"{sizes}, in {len(self.folds)} folds" if self.folds else sizes]
        for head in self.heads:
            known = [value for value in self.train.values(head.name) if value is not None]
            labels = chain.from_iterable(value if isinstance(value, list) else [value] for value in known)
            counts = Counter(map(str, labels))
            listed = ", ".join(f"{label} {counts[str(label)]:,}" for label in head.labels[:MAX_LOGGED_LABELS])
            more = f" … ({len(head.labels)} labels)" if len(head.labels) > MAX_LOGGED_LABELS else ""
            lines.append(
                f"{head.name} ({head.task}), {len(known):,} with a label{': ' if listed else ''}{listed}{more}"
            )
        return "\n".join(lines)


def load_head_data(config: RunConfig, encoder: PromptEncoder, seed: int) -> HeadData:
    """Read, check, count and divide the records; every label is known to be one before a weight is loaded.

    Raises:
        ValueError: a record or a label cannot be used, or there are too few to hold some out.
    """
    data, names = config.dataset, list(config.model.head.by_name)
    loaded = {"train": load_dataset(data, encoder, seed=seed)}
    for role, path, folder, max_samples in (
        ("eval", data.eval_path, data.eval_image_folder, data.max_eval_samples),
        ("test", data.test_path, data.test_image_folder, None),
    ):
        if path is not None:
            loaded[role] = load_other_file(data, encoder, path, folder, max_samples)
    values = values_per_head(loaded["train"].labels, names)
    check_labels(loaded["train"], values, "train")
    heads = [
        resolve_labels(name, str(head.task), head.labels, values[name])
        for name, head in config.model.head.by_name.items()
    ]
    sets = _hold_out_sets(data, loaded, heads, seed)
    for role, dataset in sets.items():
        _check_set(role, dataset, heads)
        if role != "train":
            check_overlap(data, sets["train"], dataset)
    folds = []
    if data.folds is not None:
        folds = fold_by_label(sets["train"], _strata(sets["train"], heads), data.folds, seed, heads[0].labels)
    by_role = {role: HeadDataset(dataset, heads) for role, dataset in sets.items()}
    return HeadData(
        all_datasets=[HeadDataset(dataset, heads) for dataset in loaded.values()],
        train=by_role["train"],
        evaluation=by_role.get("eval"),
        test=by_role.get("test"),
        folds=[(HeadDataset(rest, heads), HeadDataset(held_out, heads)) for rest, held_out in folds],
        heads=heads,
    )


def _strata(dataset: SampleDataset, heads: Sequence[HeadLabels]) -> np.ndarray:
    """Return the stratum of each sample: by the labels of the first head."""
    values = values_per_head(dataset.labels, [head.name for head in heads])
    return strata(heads[0], values[heads[0].name])


def _hold_out_sets(
    config: DatasetConfig, sets: Mapping[str, SampleDataset], heads: Sequence[HeadLabels], seed: int
) -> dict[str, SampleDataset]:
    """Return role -> samples, those without a file held out of the training samples, stratified by labels."""
    sets = dict(sets)
    eval_share = config.eval_split
    if eval_share is None and config.folds is None and "eval" not in sets:
        eval_share = DEFAULT_EVAL_SHARE
    for role, share in (("test", config.test_split), ("eval", eval_share)):
        if share:
            train, key = sets["train"], f"dataset.{role}_split"
            groups = _strata(train, heads)
            try:
                sets["train"], sets[role] = split_by_label(train, groups, share, seed, heads[0].labels, key)
            except ValueError as error:
                raise ValueError(f"{error}{_explain_share(config, role)}") from error
    if config.max_eval_samples is not None and "eval" in sets:
        sets["eval"] = sets["eval"].subset(range(len(sets["eval"]))[: config.max_eval_samples])
    return sets


def _explain_share(config: DatasetConfig, role: str) -> str:
    """Return what a message about a share adds: that it is the default, and that test records were held out before."""
    notes = []
    if role == "eval" and config.eval_split is None:
        notes.append(f"{DEFAULT_EVAL_SHARE} is the default; dataset.eval_path=FILE names records instead")
    if role == "eval" and config.test_split:
        notes.append(f"dataset.test_split={config.test_split} was held out before")
    return f" ({'; '.join(notes)})" if notes else ""


def _check_set(role: str, dataset: SampleDataset, heads: Sequence[HeadLabels]) -> None:
    """Raise ValueError where a label is absent from training, or a set cannot be measured on."""
    values = values_per_head(dataset.labels, [head.name for head in heads])
    if role == "train":
        for head in heads:
            resolve_labels(head.name, head.task, head.labels or None, values[head.name])
        return
    check_labels(dataset, values, role)
    for name, label_values in values.items():
        if all(value is None for value in label_values):
            raise ValueError(
                f"head {name}: none of {len(label_values)} {role} records has a label for it; hold out more records "
                f"(dataset.{role}_split), or give others (dataset.{role}_path)"
            )


def make_prompt_encoder(config: RunConfig, model_config: PreTrainedConfig, processor: Processor) -> PromptEncoder:
    """Return what encodes prompts, with the reply behind them where it is learned too."""
    head = config.model.head
    return PromptEncoder(
        processor,
        max_sample_length(config.dataset, model_config),
        truncate=False,
        suffix=suffix_ids(config.model, processor.tokenizer),
        answers=head.generation_weight > 0,
        thinking=config.dataset.thinking,
    )


def check_labels(dataset: SampleDataset, values: Mapping[str, Sequence[object]], role: str) -> None:
    """Raise ValueError where a record has no label for any head."""
    without = np.flatnonzero([all(value is None for value in row) for row in zip(*values.values(), strict=True)])
    if len(without) == 0:
        return
    number, record = dataset.places[without[0]].tolist()
    source = dataset.sources[number]
    raise ValueError(
        f"{source.path}: {len(without)} of {len(dataset)} {role} records have no label; the first is "
        f"record {record}. {explain_label_key(source.config)}"
    )


def explain_label_key(config: SourceConfig) -> str:
    """Return the sentence about where the labels of a source are read, and what names another key."""
    key, option = config.options.get("label_key", "label"), "dataset.options.label_key=KEY"
    other = (
        f"{option} names another key"
        if config.format == "labelled"
        else f"dataset.format=labelled {option} reads another key"
    )
    return f"Labels are read from `{key}`; {other}"


def targets_by_head(dataset: HeadDataset) -> dict[str, np.ndarray]:
    """Return head -> `(N, width)`, the targets of a data set."""
    return {head.name: dataset.targets(head.name) for head in dataset.heads}


def write_first_prompts(
    dataset: HeadDataset, collate: HeadCollator, processor: Processor, folder: Path, batch_size: int
) -> None:
    """Write `first_batch.html`: the first prompts of a data set as the model sees them."""
    items = [dataset.model_item(index) for index in range(min(batch_size, len(dataset), MAX_SHOWN_PROMPTS))]
    batch: Inputs = dict(collate.collate([item for item in items if not isinstance(item, Skipped)]))
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    write_first_batch(batch, processor, folder)
