"""A head learns vectors that are compared: a query's is near to what it should find. Its top imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vlm.checks.embeddings import embedding_problems, has_parameters
from vlm.checks.preference import unused_preference_problems
from vlm.config.choices import HEAD_METRICS
from vlm.train.objectives.base import Inputs, Objective, ObjectiveTrainer, PreparedRun, RunData

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
    from transformers.utils import ModelOutput

    from vlm.data.pairs.dataset import Members, PairCollator, PairDataset
    from vlm.data.pairs.encoder import PairEncoder
    from vlm.data.processor import Processor
    from vlm.models import VLMForPrediction
    from vlm.train.example_question import ExampleQuestion


class Embedding(Objective):
    """Vectors for retrieval, by contrast with the other records of a micro-batch on all ranks.

    Attributes:
        data: the records, from `load_data` on.
        model_config: the configuration of the model with its head, from `load_data` on.
        members: the distinct members of the evaluation records, from the first evaluation on.
    """

    loss_label = "contrastive loss"
    row_key = "groups"
    memory_note = "embeddings of a whole batch are compared, and the prediction knows replies"
    flops_note = "operations are counted only for a loss on replies, and this run trains embeddings"

    def refusals(self) -> Iterator[str]:
        """Yield what is wrong with the head and its data, and keys that are for runs that learn to write."""
        yield from embedding_problems(self.config)
        yield from unused_preference_problems(self.config)

    def metric_names(self) -> frozenset[str] | None:
        """Return the loss and the metrics of vectors."""
        return frozenset(("loss", *HEAD_METRICS["embedding"]))

    def training_keys(self) -> dict[str, str]:
        """Return the head where it has parameters."""
        head = self.config.model.head
        if has_parameters(head):
            return {"head": f"model.head.type={head.type}"}
        key = "model.head.loss_options.learned_temperature"
        return {"head": f"{key}=true"} if head.loss_options.get("learned_temperature") else {}

    def make_encoder(self, model_config: PreTrainedConfig, processor: Processor) -> PairEncoder:
        """Return what encodes the members of records."""
        from vlm.train.embeddings.data import make_pair_encoder

        return make_pair_encoder(self.config, model_config, processor)

    def load_data(self, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments) -> RunData:
        """Return the records, divided."""
        from vlm.assembly.heads import resolve_vector_head
        from vlm.train.embeddings.data import load_pairs

        self.model_config = resolve_vector_head(self.config.model, model_config, processor)
        self.data = data = load_pairs(self.config, self.make_encoder(model_config, processor), args.seed)
        self.members: Members | None = None
        roles = data.datasets_by_role()
        summary = ", ".join(f"{len(dataset):,} {role}" for role, dataset in roles.items())
        return RunData(data.train, data.evaluation, roles, summary)

    def wrap_model(self, model: PreTrainedModel, args: TrainingArguments) -> VLMForPrediction:
        """Return the model with the head on it."""
        from vlm.train.heads.model import attach_heads

        return attach_heads(model, self.model_config, args.seed)

    def make_collator(self, processor: Processor, data: RunData, args: TrainingArguments) -> PairCollator:
        """Return what makes batches with a row for each member of a record."""
        from vlm.data.pairs.dataset import PairCollator
        from vlm.train.data import make_collator

        prompts = make_collator(processor, data.records.values(), args.world_size, with_stats=False)
        return PairCollator(prompts, self.config.model.head.name)

    @property
    def loss_average(self) -> str:
        """Return that losses are means of means: a record is compared with those of its micro-batch."""
        return "micro_batch"

    def write_first_batch(self, run: PreparedRun, batch: Inputs) -> None:
        """Write the first members as the model sees them."""
        from vlm.data.encoding.labels import IGNORE_INDEX
        from vlm.train.monitor.plots import write_first_batch

        unsupervised = batch["input_ids"].new_full(batch["input_ids"].shape, IGNORE_INDEX)
        write_first_batch({**batch, "labels": unsupervised}, run.processor, run.folder)

    def on_train_begin(self, trainer: ObjectiveTrainer) -> None:
        """Prove that the body reads padded batches."""
        from vlm.assembly.logit_proofs import check_padding, model_label
        from vlm.assembly.model_kinds import get_body

        check_padding(get_body(trainer.model), trainer.processor, model_label(self.config))

    def compute_loss(
        self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, ModelOutput]:
        """Return the contrastive loss over the records of this micro-batch on all ranks."""
        outputs = model(**inputs)
        return outputs.loss, outputs

    def training_metrics(self, trainer: ObjectiveTrainer) -> dict[str, float]:
        """Return the temperature where it is learned."""
        import torch

        model = cast("VLMForPrediction", trainer.model)
        temperature = model.head(model.config.settings[0].name).temperature
        if temperature is None or not temperature.is_learned:
            return {}
        with torch.no_grad():
            return {"temperature": float(temperature())}

    def evaluate(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> dict[str, float]:
        """Return loss, recall and mean reciprocal rank in both directions, the loss alone with an interval."""
        from vlm.data.pairs.dataset import find_members
        from vlm.train.embeddings.vectors import collect_vectors, evaluation_metrics

        pairs = cast("PairDataset", dataset)
        if self.members is None:
            self.members = find_members(pairs)
        vectors = collect_vectors(trainer, pairs, self.members)
        self.record_sums = {"loss": vectors.losses}
        return evaluation_metrics(vectors)

    def after_training(self, run: PreparedRun, trainer: ObjectiveTrainer) -> None:
        """Measure with intervals: on test records too, at every width, and on blank images."""
        from vlm.data.record_identity import identify_records
        from vlm.train.embeddings.vectors import collect_vectors, report

        data = self.data
        sets = {"evaluation": collect_vectors(trainer, data.evaluation, self.members)}
        if data.test is not None:
            sets["test"] = collect_vectors(trainer, data.test)
        measured = data.test or data.evaluation
        blank = None
        if measured.num_images.any():
            blank = collect_vectors(trainer, measured, list(sets.values())[-1].members, blank=True)
        (head,) = self.model_config.settings
        widths = [width for width in head.loss_options.get("widths") or [] if width < self.width]
        if run.args.process_index == 0:
            datasets = {"evaluation": data.evaluation, "test": data.test}
            identities = {name: identify_records(one.dataset) for name, one in datasets.items() if one is not None}
            report(run.folder, head, sets, blank, widths, identities)

    @property
    def width(self) -> int:
        """How many numbers a vector has."""
        (head,) = self.model_config.settings
        return head.dim or self.model_config.get_text_config().hidden_size

    def next_command(self, final: Path, example: ExampleQuestion) -> str:
        """Return the vectors of a file of records."""
        return f"vlm predict {shlex.quote(str(final))} --input RECORDS --output vectors.npy"
