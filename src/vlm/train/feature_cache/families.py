"""Training a family's model on what its frozen part gives for the images of a run, in place of the images.

Features are kept by the content of a sample's images, so that runs with the same frozen part share those of the same
images, as for composed models (`images.py`). Before the first step a batch proves that they change no loss.
"""

import logging
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.dataset import SampleDataset, join_inputs
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.feature_cache.families import (
    MAX_DIMS,
    BlankInputs,
    CachedFamilyDataset,
    dummy_cache_key,
    read_features,
    sample_cache_key,
)
from vlm.data.feature_cache.images import find_image, require_image
from vlm.data.feature_cache.store import FeatureFormat, FeatureStore, Pack, PackPlan
from vlm.data.processor import Processor, SampleInputs
from vlm.data.progress import show_progress
from vlm.data.sample import BadSample, MediaSize, Sample
from vlm.data.skipped import Skipped
from vlm.data.vision.images import read_media_sizes
from vlm.families.parts import get_part_names
from vlm.models.text_loss import SupervisedScores
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.feature_cache.fingerprints import code_digest, tensors_digests
from vlm.train.feature_cache.images import ADVICE, refuse_unless_skipped
from vlm.train.feature_cache.replay import KEY, FrozenPart, NotCacheable, find_frozen_part
from vlm.train.feature_cache.writer import FeatureCacheWriter, ItemFeatures, PacksAndPlans
from vlm.train.objectives.base import ObjectiveTrainer

log = logging.getLogger(__name__)

NUMBERS_PER_PACK = 2**30
"""About so many numbers are in a pack: a run that is stopped while it encodes loses those of the last pack."""

Place = tuple[int, int]
"""The numbers of a source and of a record in it; (-1, 0) for the dummy sample of batches without images."""
DUMMY: Place = (-1, 0)

Inputs = dict[str, Tensor]


def replace_family_images(
    model: PreTrainedModel,
    processor: Processor,
    datasets: Sequence[SampleDataset | None],
    collate: Collator,
    config: DatasetConfig,
    args: TrainingArguments,
    *,
    connector_trains: bool,
) -> tuple[SampleDataset | None, ...]:
    """Return the samples of a run with features beside blank images; those that are not in the cache are computed.

    The model takes features out of its batches from then on. The collator's dummy image gets features too.

    Raises:
        ValueError: the model's features cannot be kept, there is no room for them, or an image does not open.
    """
    label = f"{KEY}: model_type={model.config.model_type}"
    present = [dataset for dataset in datasets if dataset is not None]
    if any(dataset.has_videos for dataset in present):
        raise ValueError(f"{label}: records have videos, whose features cannot be cached; leave it out")
    try:
        part, names = find_frozen_part(model, connector_trains=connector_trains)
        with part_on_device(model, names, args):
            writer = FamilyFeatureWriter(model, part, names, processor, present, config, args)
            packs = writer.open_all()
    except NotCacheable as reason:
        raise ValueError(f"{label}: {reason}; otherwise leave it out") from reason
    part.attach(model)
    if collate.dummy is not None:
        ids, inputs = collate.dummy
        collate.dummy = ids, {**inputs, **read_features(require_image(packs, dummy_cache_key()))}
    return tuple(None if dataset is None else CachedFamilyDataset(dataset, packs) for dataset in datasets)


@contextmanager
def part_on_device(model: PreTrainedModel, names: Sequence[str], args: TrainingArguments) -> Iterator[None]:
    """Within, all that runs before the language model's layers is whole on this rank's device, also under ZeRO-3.

    These are the frozen part, which has these names, the connector behind it, and the embeddings of tokens.
    """
    parts = get_part_names(model.config)
    frozen, embeddings = {*names}, {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    needed = [
        parameter
        for name, parameter in model.named_parameters()
        if name in frozen or id(parameter) in embeddings or parts.part_of(name) != "language_model"
    ]
    with ExitStack() as stack:
        if is_deepspeed_zero3_enabled():
            import deepspeed  # takes seconds

            stack.enter_context(deepspeed.zero.GatheredParameters(needed))
        for tensor in (*needed, *model.buffers()):
            tensor.data = tensor.data.to(args.device)
        model.eval()
        yield


class FamilyFeatureWriter(FeatureCacheWriter[Place, list[tuple[int, Inputs]]]):
    """Finds the features of a run's samples in the cache, and has those of other samples computed."""

    description = "encoding images"
    reason = "it encodes images with the same encoder"

    def __init__(
        self,
        model: PreTrainedModel,
        part: FrozenPart,
        names: Sequence[str],
        processor: Processor,
        datasets: Sequence[SampleDataset],
        config: DatasetConfig,
        args: TrainingArguments,
    ):
        self.model, self.part, self.processor, self.args = model, part, processor, args
        self.sources = list({id(source): source for dataset in datasets for source in dataset.sources}.values())
        self.datasets, self.on_skipped = datasets, partial(refuse_unless_skipped, config)
        self.collate, self.blanks = Collator.of(processor), BlankInputs(processor)
        self._shapes: dict[tuple[MediaSize, ...], np.ndarray] = {}
        dummy = self._dummy_item()
        one = self._output(self._batch([dummy]))
        part.learn(one, self._output(self._batch([dummy, dummy])))
        part.keep_used(model, self._batch([dummy]), one)
        self._check_without_images(dummy, one)
        self.num_tensors = len(tensors := part.tensors(one))
        if not tensors:
            raise NotCacheable(f"the language model does not use what its {part.attribute} returns")
        size = tensors[0].dtype.itemsize
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        self.format = broadcast_from_rank0(FeatureFormat(dtype, 1, mmap.PAGESIZE // size, mmap.PAGESIZE))
        digest = broadcast_from_rank0(self._digest(names) if args.process_index == 0 else "")
        folder = resolve_cache_folder(config.cache_dir) / "image_features" / digest
        self.store = FeatureStore(folder, config.cache_limit_gb, f"{KEY}: features of the images", ADVICE)

    def _check_without_images(self, dummy: SampleInputs, one: object) -> None:
        """Refuse a part that returns something for samples without images, whose features a batch does not bring."""
        text: SampleInputs = {"input_ids": [self.collate.pad_token_id], "labels": [IGNORE_INDEX]}
        other = self.part.tensors(self._output(self._batch([dummy, text])))
        if [tensor.shape for tensor in other] != [tensor.shape for tensor in self.part.tensors(one)]:
            raise NotCacheable(f"its {self.part.attribute} also returns features for samples without images")

    def open_all(self) -> list[Pack]:
        """Open the packs of all samples with images, after those of other samples were computed."""
        return self.open(lambda: self._find_packs(self._find_places()))

    def _digest(self, names: Sequence[str]) -> str:
        """Return a fingerprint of all that features depend on besides the images."""
        args, part = self.args, self.part
        state = dict(self.model.named_parameters())
        weights = tensors_digests({name: state[name] for name in names})
        config = {name: value for name, value in self.model.config.to_diff_dict().items() if name != "name_or_path"}
        precision = args.bf16, args.fp16, args.deepspeed is None
        taken = part.attribute, [str(field) for field in part.fields]
        return json_digest(weights, config, self.processor.to_dict(), precision, taken, code_digest(type(self)))

    def _find_places(self) -> dict[bytes, Place]:
        """Return where the distinct images of samples are, by their keys; records that cannot be used are left out."""
        places: dict[bytes, Place] = {dummy_cache_key(): DUMMY}
        numbers = {id(source): number for number, source in enumerate(self.sources)}
        for dataset in self.datasets:
            rows = np.unique(dataset.places[dataset.num_images > 0], axis=0).tolist()
            for number, record in show_progress(rows, "looking for images", silent=self.args.process_index > 0):
                source = dataset.sources[number]
                try:
                    key = sample_cache_key(source.sample(record), self.processor)
                except BadSample as error:
                    self.on_skipped([Skipped.from_error(error, source, record)], 0)
                    continue
                places.setdefault(key, (numbers[id(source)], record))
        return places

    def _find_packs(self, places: dict[bytes, Place]) -> PacksAndPlans[Place]:
        """Return the packs that hold any of the images, and packs to write, each in a pass of its own."""
        packs = [pack for pack in self.store.open_packs() if any(pack.find(key) is not None for key in places)]
        keys = [key for key in places if find_image(packs, key) is None]
        return packs, [[plan] for plan in self._plan_packs(keys, [places[key] for key in keys])] if keys else []

    def _plan_packs(self, keys: list[bytes], places: list[Place]) -> list[PackPlan[Place]]:
        """Distribute samples over packs."""
        shapes = np.zeros((len(keys), self.num_tensors, MAX_DIMS), dtype=np.int64)
        skipped: dict[int, Skipped] = {}
        for index, place in enumerate(show_progress(places, "measuring images", silent=self.args.process_index > 0)):
            try:
                shapes[index] = self._shapes_of(place)
            except BadSample as error:
                skipped[index] = Skipped.from_error(error, self.sources[place[0]], place[1])
                self.on_skipped([skipped[index]], 0)
        numbers = np.where(shapes.any(axis=2), np.where(shapes == 0, 1, shapes).prod(axis=2), 0).sum(axis=1)
        rows = np.maximum(-(-numbers // self.format.width), 1)
        log.info(
            "Caching outputs of %s for %s images or groups of images (%.3g GB)",
            self.part.attribute,
            f"{len(keys):,}",
            int(rows.sum()) * self.format.stride / 1e9,
        )
        groups = (rows.cumsum() * self.format.width - 1) // NUMBERS_PER_PACK
        plans = []
        for group in np.unique(groups).tolist():
            chosen = np.flatnonzero(groups == group).tolist()
            first = chosen[0]
            plans.append(
                PackPlan(
                    json_digest([keys[index].hex() for index in chosen]),
                    self.format,
                    [places[index] for index in chosen],
                    np.frombuffer(b"".join(keys[index] for index in chosen), np.uint64).reshape(-1, 2),
                    rows[chosen],
                    shapes[chosen].reshape(len(chosen), -1),
                    {index - first: skipped[index] for index in chosen if index in skipped},
                )
            )
        return plans

    def _shapes_of(self, place: Place) -> np.ndarray:
        """Return the shapes of the tensors of a sample, `(tensors, MAX_DIMS)`: those of blank images of its sizes.

        Raises:
            BadSample: an image of the sample does not open.
        """
        if place == DUMMY:
            return self._measure(self._dummy_item())
        source, record = self.sources[place[0]], place[1]
        sample = source.sample(record)
        sizes = read_media_sizes(sample, self.processor)
        key = tuple(sizes) if sizes else (None,) * len(sample.media)
        if key not in self._shapes:
            blanks = self.blanks.images(sample, sizes)
            self._shapes[key] = self._measure(self._item(sample, source.encoder, sizes, blanks))
        return self._shapes[key]

    def _measure(self, item: SampleInputs) -> np.ndarray:
        tensors = self.part.tensors(self._output(self._batch([item])))
        return np.array([[*tensor.shape, *[0] * (MAX_DIMS - tensor.ndim)] for tensor in tensors], dtype=np.int64)

    def _item(
        self, sample: Sample, encoder: SampleEncoder, sizes: Sequence[MediaSize], images: Mapping[str, Tensor]
    ) -> SampleInputs:
        return join_inputs(self.processor, encoder(sample, sizes), images)

    def _dummy_item(self) -> SampleInputs:
        ids, inputs = dummy_image(self.processor)
        return {"input_ids": list(ids), "labels": [IGNORE_INDEX] * len(ids), **inputs}

    def _batch(self, items: Sequence[SampleInputs]) -> Inputs:
        """Return a batch on this rank's device, as training has it."""
        batch = {name: value for name, value in self.collate(items).items() if isinstance(value, Tensor)}
        batch.pop("labels")
        if "pixel_values" in batch:
            batch["pixel_values"] = self.processor.normalise(batch["pixel_values"])
        return {name: value.to(self.args.device) for name, value in batch.items()}

    @torch.no_grad()
    def _output(self, inputs: Inputs) -> object:
        """Return the output of the frozen part for a batch, in the run's precision."""
        args = self.args
        half = torch.bfloat16 if args.bf16 else torch.float16
        mixed = (args.bf16 or args.fp16) and args.deepspeed is None  # DeepSpeed's models are in it as a whole
        with torch.autocast(args.device.type, half, enabled=mixed):
            return self.part.output_of(self.model, inputs)

    def batches(self, plan: PackPlan[Place]) -> list[list[int]]:
        """Return the samples one by one: so each has the features that it has alone."""
        return [[index] for index in range(len(plan.items)) if index not in plan.skipped]

    def load(self, plan: PackPlan[Place], indices: list[int]) -> tuple[dict[int, Skipped], list[tuple[int, Inputs]]]:
        """Decode the images of samples."""
        skipped: dict[int, Skipped] = {}
        loaded: list[tuple[int, Inputs]] = []
        for index in indices:
            place = plan.items[index]
            if place == DUMMY:
                loaded.append((index, self._dummy_item()))
                continue
            source = self.sources[place[0]]
            try:
                sample = source.sample(place[1])
                dataset = next(one for one in self.datasets if any(own is source for own in one.sources))
                sizes, images = dataset.media_inputs(sample)
                loaded.append((index, self._item(sample, source.encoder, sizes, images)))
            except BadSample as error:
                skipped[index] = Skipped.from_error(error, source, place[1])
        return skipped, loaded

    def compute(
        self, plans: list[PackPlan[Place]], batch: list[tuple[int, Inputs]]
    ) -> Iterable[tuple[int, ItemFeatures]]:
        """Return the features of samples as rows of numbers, the last of which is filled up with 0."""
        (plan,) = plans
        for index, item in batch:
            tensors = self.part.tensors(self._output(self._batch([item])))
            shapes = [[*tensor.shape, *[0] * (MAX_DIMS - tensor.ndim)] for tensor in tensors]
            if not np.array_equal(np.array(shapes).ravel(), plan.details[index]):
                raise NotCacheable("the shapes of its outputs depend on more than the sizes of images")
            numbers = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
            rows = numbers.new_zeros(int(plan.counts[index]) * self.format.width)
            rows[: len(numbers)] = numbers
            yield index, [rows.view(-1, 1, self.format.width)]


def prove_cached_losses(
    trainer: ObjectiveTrainer, scores: SupervisedScores, cached: SampleDataset, uncached: SampleDataset, label: str
) -> None:
    """Prove on a batch of each rank that cached features give the losses that images give.

    Raises:
        ValueError: they do not.
    """
    number = trainer.args.eval_batch_size * trainer.args.world_size
    chosen = np.flatnonzero(uncached.num_images)[:number].tolist()
    if not chosen:
        return
    sides: list[list[Tensor]] = []
    with torch.no_grad():
        for dataset in (cached, uncached):
            batches = trainer.evaluation_batches(Subset(dataset, chosen), "comparing cached features")
            sides.append([scores(batch)[0].float() for batch in batches])
    tolerance = 5e-2 if trainer.args.bf16 or trainer.args.fp16 else 1e-3
    worst = torch.zeros(2, device=trainer.args.device)
    for one, two in zip(*sides, strict=True):
        differences = (one - two).abs() / two.abs().clamp(min=1)
        place = int(differences.argmax()) if len(differences) else None
        if place is not None and not differences[place] <= worst[0]:
            worst = torch.stack([differences[place], two[place]])
    found = trainer.accelerator.gather(worst[None])
    difference, loss = found[int(found[:, 0].nan_to_num(torch.inf).argmax())].tolist()
    if not difference <= tolerance:
        raise ValueError(
            f"{label}: {KEY}: with cached features the loss of a token differs by {difference:.3g} of {loss:.4g}, more "
            f"than {tolerance:g}; leave it out"
        )
    log.info("Losses with cached features differ from those with images by at most %.2g", difference)
