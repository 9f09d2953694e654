"""What heads read of samples: hidden states that a frozen body computes once, in place of ids and images."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

from transformers import TrainingArguments

from vlm.assembly.checkpoint import is_prediction_model
from vlm.config.schema import DatasetConfig
from vlm.data.cache import resolve_cache_folder
from vlm.data.feature_cache.heads import HeadFeatureDataset, HeadFeatures
from vlm.data.heads.dataset import BlankHeadDataset, HeadCollator, HeadDataset
from vlm.train.feature_cache.fingerprints import body_digest
from vlm.train.feature_cache.heads import load_or_compute_features
from vlm.train.objectives.base import PreparedRun
from vlm.train.run_directory import SkippedRecords


def make_feature_reader(
    run: PreparedRun, config: DatasetConfig, datasets: Sequence[HeadDataset], collate: HeadCollator
) -> Callable[[HeadDataset], HeadFeatureDataset]:
    """Return what gives the features of samples; all of the records are computed now, blank images when asked for.

    Args:
        run: the run, whose model has a frozen body.
        config: cache, and what happens with records that cannot be used.
        datasets: all records of the run, before any are held out.
        collate: makes batches for the body.
    """
    model, args = run.model, run.args
    assert is_prediction_model(model)
    on_skipped = SkippedRecords(run, config, 1, is_writer=args.process_index == 0)
    features: dict[int, HeadFeatures] = {}
    find: Callable[..., HeadFeatures] = partial(
        load_or_compute_features, model, body_digest(model), collate=collate, args=args,
        cache=resolve_cache_folder(config.cache_dir),
    )  # fmt: skip
    for dataset in datasets:  # what is held out has the same sources
        features[id(dataset.dataset.sources[0])] = find(dataset, on_skipped=on_skipped)

    def read(dataset: HeadDataset) -> HeadFeatureDataset:
        is_blank = isinstance(dataset, BlankHeadDataset)
        rows = find(dataset) if is_blank else features[id(dataset.dataset.sources[0])]
        return HeadFeatureDataset(dataset, rows, model.config.settings)

    return read


def disable_workers(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments for rows that lie in memory: workers would take longer to start than to read them."""
    args = copy.copy(args)
    args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
    args.dataloader_persistent_workers = False
    return args
