"""What a frozen visual encoder gives for the pictures of a run, computed once by all ranks and kept on disk.

Later epochs, and later runs with the same encoder, read it in place of opening pictures. It is kept by the content of
pictures, so that runs which share some share their features; see `data/feature_files.py`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from vlm.config.schema import DatasetConfig
from vlm.data.cache import cache_folder, digest_of
from vlm.data.collate import Collator
from vlm.data.dataset import SampleDataset, Skipped, dummy_image
from vlm.data.feature_files import ImageFeatures, Pack, finish_pack, new_pack, open_packs, opened_rows
from vlm.data.pictures import check_picture
from vlm.data.sample import BadSample
from vlm.data.seen import (
    BLANK_SIZE,
    FRAME,
    WHOLE,
    SeenDataset,
    blank_key,
    blanks_of,
    feature_inputs,
    found_in,
    kinds_of,
    picture_key,
    seen_of,
)
from vlm.data.sources import Source
from vlm.models import VLMConfig
from vlm.train.encoding import BLANK, Encoding, Pictures, Request
from vlm.train.ranks import as_first_rank, gathered_objects, wait

log = logging.getLogger(__name__)

Problem = tuple[str, str | None]
"""Why a picture does not open, and its file."""


@dataclass
class Plan:
    """A pack that is to be computed.

    Attributes:
        folder: where it is written.
        keys: of its pictures.
        requests: the pictures.
        starts: `(pictures,)`: the first view of each.
        views: `(pictures,)`: as `AnyRes.num_views` counts them.
        sizes: `(pictures, 2)`: height and width, where known before; else 0.
        problems: which do not open.
    """

    folder: Path
    keys: list[bytes]
    requests: list[Request]
    starts: np.ndarray
    views: np.ndarray
    sizes: np.ndarray
    problems: dict[int, Problem] = field(default_factory=dict)


def check_composed(model_config: Any) -> None:
    """Raise ValueError where a model's own code reads its pictures, which then has to have them."""
    if not isinstance(model_config, VLMConfig):
        raise ValueError(
            f"dataset.cache_features=true: model_type={model_config.model_type} reads pictures itself; features are "
            "kept for composed models alone. Leave it out"
        )


def with_features(
    model: Any, processor: Any, datasets: Sequence[Any], collate: Collator, config: DatasetConfig,
    args: TrainingArguments,
) -> tuple[Any, ...]:  # fmt: skip
    """The samples of a run with features in place of pictures; what is not kept yet is computed.

    Args:
        model: a composed model whose encoder is frozen, before the trainer has it.
        processor: the run's.
        datasets: what trains, and what is evaluated on, with blank pictures too; None where there is nothing.
        collate: lays them out; its dummy becomes one of features.
        config: cache, its limit, and what happens with pictures that do not open.
        args: batch size, workers, devices, precision.

    Raises:
        ValueError: there is no room for them, or a picture does not open.
    """
    given = [one for one in datasets if one is not None]
    sources = list({id(source): source for one in given for source in one.sources}.values())
    with Encoding(model, processor, args) as encoding:
        filler = Filler(encoding, sources, config)
        filler.add(lambda: wanted(given, sources, config))
        for evaluated in given[1:]:
            filler.add(partial(wanted_blanks, evaluated, filler.features))
    collate.dummy = featured_dummy(processor, filler.features)
    return tuple(None if one is None else SeenDataset(one, filler.features) for one in datasets)


def featured_dummy(processor: Any, features: ImageFeatures) -> tuple[list[int], dict[str, Tensor]]:
    """The dummy image of batches without pictures, its features in place of its pixels."""
    ids, inputs = dummy_image(processor)
    seen = [found_in(features, dummy_key(processor))]
    return ids, feature_inputs(features, seen, tiled="image_views" in inputs)


def dummy_key(processor: Any) -> bytes:
    """The key of the picture that the dummy is."""
    return blank_key(BLANK_SIZE, dummy_kind(processor))


def dummy_kind(processor: Any) -> str:
    """How it is seen."""
    return FRAME if processor.pools_frames else WHOLE


def wanted(
    datasets: Sequence[SampleDataset], sources: Sequence[Source], config: DatasetConfig
) -> dict[bytes, Request]:  # fmt: skip
    """The distinct pictures of datasets, and the blank one of a dummy."""
    processor = datasets[0].processor
    found = {dummy_key(processor): Request(BLANK, 0, 0, dummy_kind(processor))}
    for dataset in datasets:
        numbers = [next(n for n, one in enumerate(sources) if one is source) for source in dataset.sources]
        places = np.unique(dataset.places[dataset.num_images > 0], axis=0).tolist()
        for source, record in tqdm(places, "looking for pictures", leave=False, disable=None):
            try:
                sample = dataset.sources[source].sample(record)
                kinds = kinds_of(sample, processor)
                keys = [picture_key(one, kind) for one, kind in zip(sample.pictures, kinds, strict=True)]
            except (BadSample, OSError) as error:
                problem = error if isinstance(error, BadSample) else BadSample("?", str(error))
                refuse_bad(problem, dataset.sources[source], record, config)
                continue  # the record is left out when its turn comes
            for place, (key, kind) in enumerate(zip(keys, kinds, strict=True)):
                found.setdefault(key, Request(numbers[source], record, place, kind))
    return found


def wanted_blanks(dataset: SampleDataset, features: ImageFeatures) -> dict[bytes, Request]:
    """The blank pictures that stand for those of a dataset."""
    found = {}
    for index in np.flatnonzero(dataset.num_images).tolist():
        try:
            sample = dataset.sample(index)
            seen = seen_of(sample, dataset.processor, features)
        except BadSample:  # evaluation refuses it before it comes to blank pictures
            continue
        for key, size, kind in blanks_of(sample, seen, dataset.processor):
            found.setdefault(key, Request(BLANK, 0, 0, kind, size))
    return found


def refuse_bad(error: BadSample, source: Source, record: int, config: DatasetConfig) -> None:
    """Raise ValueError at a record that cannot be used, where such are not left out."""
    if config.on_bad_sample == "error":
        raise Skipped.by(error, source, record).refusal() from error


class Filler:
    """Finds what is kept of pictures, and has all ranks compute the rest.

    Args:
        encoding: what computes it.
        sources: of all records.
        config: cache, its limit, and what happens with pictures that do not open.
    """

    def __init__(self, encoding: Encoding, sources: Sequence[Source], config: DatasetConfig):
        self.encoding, self.sources, self.config = encoding, sources, config
        self.form = encoding.form()
        first = encoding.args.process_index == 0
        self.store = (
            cache_folder(config.cache_dir) / "image_features" / as_first_rank(encoding.digest() if first else "")
        )
        self.features = ImageFeatures([])

    def add(self, find: Callable[[], dict[bytes, Request]]) -> None:
        """Open the packs that hold the pictures which `find()` gives on rank 0, after one of those that none holds."""
        with self._first_rank_alone() as first:
            requests = find() if first else {}
            packs = self._kept(requests) if first else []
            missing = {key: one for key, one in requests.items() if ImageFeatures(packs).find(key) is None}
            with self._written(missing, packs) if first else nullcontext() as plan:
                plan = as_first_rank(plan)
                if plan is not None:
                    self._fill(plan)
                    if first:
                        finish_pack(
                            plan.folder, self.form, plan.keys, plan.starts, plan.views, plan.sizes, plan.problems
                        )
                        packs.append(Pack(plan.folder.with_suffix("")))
            mine = {pack.folder: pack for pack in packs}
            known = {pack.folder for pack in self.features.packs}
            new = [folder for folder in as_first_rank(list(mine)) if folder not in known]
            opened = [mine.pop(folder) if first else Pack(folder) for folder in new]
            for pack in mine.values():  # open already
                pack.close()
            self.features = ImageFeatures([*self.features.packs, *opened])
            wait()
        for pack in self.features.packs:
            pack.touch()

    @contextmanager
    def _first_rank_alone(self) -> Iterator[bool]:
        """Whether this is rank 0, which lets no other run compute for this encoder meanwhile."""
        if self.encoding.args.process_index != 0:
            yield False
            return
        self.store.mkdir(parents=True, exist_ok=True)
        with FileLock(self.store / "lock"):
            yield True

    def _kept(self, requests: Mapping[bytes, Request]) -> list[Pack]:
        """The packs that hold any of the pictures."""
        found = []
        for pack in open_packs(self.store):
            if any(pack.place(key) is not None for key in requests):
                found.append(pack)
            else:
                pack.close()
        return found

    @contextmanager
    def _written(self, missing: dict[bytes, Request], packs: Sequence[Pack]) -> Iterator[Plan | None]:
        """What is to be computed, with a folder for it; None: nothing is."""
        if not missing:
            yield None
            return
        keys = sorted(missing, key=lambda key: (missing[key].source, missing[key].record))
        requests = [missing[key] for key in keys]
        views, sizes, problems = self._measured(requests)
        ends = np.maximum(views, 1).cumsum()
        kept = [*packs, *self.features.packs]
        log.info("The visual encoder sees %s pictures, %.3g GB", f"{len(keys):,}", ends[-1] * self.form.nbytes / 1e9)
        limit = self.config.cache_limit_gb
        with new_pack(
            self.store, digest_of([key.hex() for key in keys]), int(ends[-1]), self.form, limit, kept
        ) as folder:
            yield Plan(folder, keys, requests, ends - np.maximum(views, 1), views, sizes, problems)

    def _measured(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray, dict[int, Problem]]:
        """Views of each picture; sizes and problems as far as they are known then: all where sizes decide on views."""
        views = np.array([0 if one.kind == FRAME else 1 for one in requests])
        sizes = np.zeros((len(requests), 2), dtype=np.int64)
        problems: dict[int, Problem] = {}
        tiling = self.encoding.processor.tiling
        if tiling is None:
            return views, sizes, problems
        for number, one in enumerate(requests):
            if one.kind == FRAME:
                continue
            try:
                sizes[number] = one.size if one.source == BLANK else self._size(one)
            except BadSample as error:
                refuse_bad(error, self.sources[one.source], one.record, self.config)
                problems[number] = error.reason, error.file
                continue
            if one.kind != WHOLE:
                (views[number],) = tiling.num_views([tuple(sizes[number].tolist())])
        return views, sizes, problems

    def _size(self, request: Request) -> tuple[int, int]:
        sample = self.sources[request.source].sample(request.record)
        width, height = check_picture(sample.pictures[request.place], sample.id)
        return height, width

    def _fill(self, plan: Plan) -> None:
        """Compute a plan's rows: this rank's share, every so many batches of records; sizes and problems get known."""
        args = self.encoding.args
        rows = opened_rows(plan.folder, self.form)
        jobs: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(plan.requests):
            if number not in plan.problems:
                together = (BLANK, number) if one.source == BLANK else (one.source, one.record)
                jobs.setdefault(together, []).append(number)
        work = list(jobs.values())
        size = args.per_device_train_batch_size
        batches = [list(range(start, min(start + size, len(work)))) for start in range(0, len(work), size)]
        loader = DataLoader(
            Pictures(self.encoding.processor, self.sources, plan.requests, work),
            batch_sampler=batches[args.process_index :: args.world_size], collate_fn=_listed,
            num_workers=args.dataloader_num_workers,
        )  # fmt: skip
        found: dict[int, tuple[int, int]] = {}
        problems: dict[int, Problem] = {}
        for seen in tqdm(loader, "seeing pictures", disable=args.disable_tqdm or args.process_index != 0):
            whole = [one for one in seen if not isinstance(one[1], BadSample)]
            for number, error in (one for one in seen if isinstance(one[1], BadSample)):
                request = plan.requests[number]
                refuse_bad(error, self.sources[request.source], request.record, self.config)
                problems[number] = error.reason, error.file
            self._write(rows, plan, whole)
            found |= {number: size for number, (_, size) in whole}
        rows.flush()  # pyright: ignore[reportAttributeAccessIssue] - a memory map
        for sizes, bad in gathered_objects((found, problems)):
            plan.problems |= bad
            for number, size in sizes.items():
                plan.sizes[number] = size
        wait()

    def _write(self, rows: np.ndarray, plan: Plan, seen: Sequence[tuple[int, tuple[Tensor, tuple[int, int]]]]) -> None:
        """Encode pictures, and put their features in their places."""
        if not seen:
            return
        pixels = [pixels for _, (pixels, _) in seen]
        features = self.encoding(torch.cat(pixels))
        for (number, _), one in zip(seen, features.split([len(views) for views in pixels]), strict=True):
            start = int(plan.starts[number])
            rows[start : start + len(one)] = one.contiguous().view(torch.uint8).flatten(1).numpy()


def _listed(items: Sequence[list[tuple[int, Any]]]) -> list[tuple[int, Any]]:
    return [one for item in items for one in item]
