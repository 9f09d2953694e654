"""The reference model of a run: what its model was before the first step, computed once or in every step."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.config.schema import RunConfig
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.preference.collator import RECORD_INDEX
from vlm.data.preference.dataset import PreferenceDataset
from vlm.models.text_loss import SupervisedScores
from vlm.train.distributed import broadcast_from_rank0, on_rank0
from vlm.train.feature_cache.fingerprints import code_digest, records_digest, tensors_digests
from vlm.train.lora import is_adapter
from vlm.train.objectives.base import Inputs, ObjectiveTrainer, PreparedRun
from vlm.train.preference.losses import SideScores
from vlm.train.preference.scores import WholeDataset, score_batch, score_dataset
from vlm.train.step.compile import force_eager

log = logging.getLogger(__name__)

ADAPTER, CACHED, COPY = "adapter", "cached", "copy"
FOLDER = "references"
"""The folder of the cache, and of a run directory, with log-probabilities of reference models."""


class Reference(Protocol):
    """Where log-probabilities of a reference model come from."""

    def prepare(self, trainer: ObjectiveTrainer, scores: SupervisedScores) -> None:
        """Do what needs the model as it is trained, before the first step; `scores` are of the run's model."""
        ...

    def training(self, inputs: Inputs) -> Tensor:
        """Return the log-probabilities of a training batch: `(records, 3)`, see `SideScores.reference`."""
        ...

    def evaluation(self, inputs: Inputs) -> Tensor:
        """Return those of a batch of evaluation records."""
        ...


def choose_reference(config: RunConfig, run: PreparedRun) -> Reference:
    """Return the reference of a run whose model is not trained yet.

    Raises:
        ValueError: `trainer.preference.reference=adapter`, and more than adapters trains.
    """
    kind = config.trainer.preference.reference
    others = [
        name for name, parameter in run.model.named_parameters() if parameter.requires_grad and not is_adapter(name)
    ]
    if kind == ADAPTER and others:
        raise ValueError(
            f"trainer.preference.reference=adapter: {others[0]} trains in addition to the adapters, so the model "
            "without them is not the reference; choose cached"
        )
    if kind == ADAPTER or (kind == "auto" and not others):
        return AdapterReference()
    return CopyReference(run.model, run.args) if kind == COPY else CachedReference(config, run)


class AdapterReference:
    """The model with its adapters switched off."""

    def prepare(self, trainer: ObjectiveTrainer, scores: SupervisedScores) -> None:
        """Keep what scores the run's model."""
        self._scores = scores

    @torch.no_grad()
    def training(self, inputs: Inputs) -> Tensor:
        """Run the model without its adapters; its dropout is off too."""
        model = self._scores.model
        trains = model.training
        with adapters_off(model), force_eager():
            model.eval()
            sides, _, _ = score_batch(self._scores, inputs)
        model.train(trains)
        return sides.log_probs

    evaluation = training


class CopyReference:
    """A frozen copy of a model."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments):
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._device = args.device

    def prepare(self, trainer: ObjectiveTrainer, scores: SupervisedScores) -> None:
        """Move the copy to the device."""
        self._model.to(self._device)  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        self._scores = SupervisedScores(self._model)

    @torch.no_grad()
    def training(self, inputs: Inputs) -> Tensor:
        """Run the copy."""
        with force_eager():
            sides, _, _ = score_batch(self._scores, inputs)
        return sides.log_probs

    evaluation = training


class CachedReference:
    """Log-probabilities that are computed in one pass over the records, and read by later epochs and runs.

    They are kept in the cache, and in the run directory, for a run that is resumed.
    """

    def __init__(self, config: RunConfig, run: PreparedRun):
        self.folders = run.folder / FOLDER, resolve_cache_folder(config.dataset.cache_dir) / FOLDER
        self.datasets: dict[str, PreferenceDataset] = {}
        for role, dataset in (("train", run.data.train), ("eval", run.data.evaluation)):
            if dataset is not None:
                assert isinstance(dataset, PreferenceDataset)
                self.datasets[role] = dataset
        self.keys = fingerprint(run.model, self.datasets, run.args)
        self.tables: dict[str, Tensor] = {}

    def prepare(self, trainer: ObjectiveTrainer, scores: SupervisedScores) -> None:
        """Read the log-probabilities, or compute those that are not kept.

        Raises:
            ValueError: they are not kept, and the model has been trained already.
        """
        for role, dataset in self.datasets.items():
            table = broadcast_from_rank0(self._read(role))
            if table is None:
                if trainer.state.global_step > 0:
                    raise ValueError(
                        f"trainer.preference.reference=cached: the scores of the initial model for the {role} records "
                        f"are neither in the run directory nor in {self.folders[1]}, and the model has since been "
                        "trained. Start over (trainer.resume_from_checkpoint=never), or set "
                        "trainer.preference.reference=copy and trainer.resume_changes=accept"
                    )
                table = self._compute(trainer, scores, role, dataset)
            on_rank0(lambda role=role, table=table: self._write(role, table))
            self.tables[role] = torch.from_numpy(table).to(trainer.args.device)

    def _read(self, role: str) -> np.ndarray | None:
        """Return the log-probabilities of some records, `(records, 3)`; None: they are not kept."""
        for folder in self.folders:
            if (file := folder / f"{self.keys[role]}.npy").is_file():
                return np.load(file, allow_pickle=False)
        return None

    def _compute(
        self, trainer: ObjectiveTrainer, scores: SupervisedScores, role: str, dataset: PreferenceDataset
    ) -> np.ndarray:
        """Return the log-probabilities of some records, computed now; NaN for those that cannot be used."""

        def score(inputs: Inputs) -> SideScores:
            """Score a batch with the model as it stands."""
            return score_batch(scores, inputs)[0]

        sides = score_dataset(trainer, WholeDataset(dataset), "reference", score)
        log.info("The reference model has scored %s %s records", f"{len(dataset):,}", role)
        return torch.where(sides.is_there, sides.log_probs, torch.nan).numpy()

    def _write(self, role: str, table: np.ndarray) -> None:
        """Keep the log-probabilities of some records in the run directory and in the cache, where they are not yet."""
        for file in (folder / f"{self.keys[role]}.npy" for folder in self.folders):
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(f".{os.getpid()}.npy")
                np.save(partial, table, allow_pickle=False)
                partial.replace(file)

    def training(self, inputs: Inputs) -> Tensor:
        """Return what is kept of the records of a training batch."""
        return self.tables["train"][inputs[RECORD_INDEX]]

    def evaluation(self, inputs: Inputs) -> Tensor:
        """Return what is kept of the records of an evaluation batch."""
        return self.tables["eval"][inputs[RECORD_INDEX]]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, a model computes what it would without its adapters.

    peft's own switch turns gradients of adapters off and on too, which DDP and ZeRO rely on to stay as they are.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import, and only runs with an adapter need it

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def fingerprint(
    model: PreTrainedModel, datasets: Mapping[str, PreferenceDataset], args: TrainingArguments
) -> dict[str, str]:
    """Return, for each data set, a fingerprint of all that its log-probabilities depend on; the same on every rank."""
    weights = fingerprint_weights(model)

    def digest() -> dict[str, str]:
        """Return the fingerprints."""
        config = {name: value for name, value in model.config.to_dict().items() if name not in UNRELATED}
        computation = weights, config, str(model.dtype), args.bf16, args.fp16, code_digest(SideScores)
        return {
            role: json_digest(
                *computation,
                records_digest(dataset.dataset, np.arange(len(dataset))),
                dataset.rejected_image,
                dataset.mismatches,
            )
            for role, dataset in datasets.items()
        }

    return on_rank0(digest)


UNRELATED = ("recipe", "_name_or_path", "transformers_version", "vlm_version")
"""Keys of a model's configuration that say where it comes from."""


def fingerprint_weights(model: nn.Module) -> list[str]:
    """Return a fingerprint of each weight of a model, on rank 0; those that ZeRO-3 shards are gathered one by one."""
    if not is_deepspeed_zero3_enabled():
        return on_rank0(lambda: tensors_digests(model.state_dict()))
    import deepspeed  # takes seconds

    digests: list[str] = []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            digests += on_rank0(lambda name=name, parameter=parameter: tensors_digests({name: parameter}))
    return digests
