"""The model learns replies as a teacher would give them (docs/distillation.md). Its top imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from vlm.checks.distillation import distillation_problems
from vlm.train.objectives.base import Inputs, ObjectiveTrainer, PreparedRun, RunData
from vlm.train.objectives.generation import Generation

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Dataset
    from transformers import PreTrainedConfig, TrainingArguments
    from transformers.utils import ModelOutput

    from vlm.config.schema import RunConfig
    from vlm.data.batching.collator import Collator
    from vlm.data.dataset import SampleDataset
    from vlm.data.processor import Processor
    from vlm.train.distillation.comparison import Compared, Comparison
    from vlm.train.distillation.targets import StateTargets
    from vlm.train.distillation.teacher import Teacher, TeacherStates


class Distillation(Generation):
    """Text generation with a teacher: cross-entropy and divergence at the supervised tokens.

    Attributes:
        options: `trainer.distillation`.
        teacher: the teacher, from `load_data` on.
        vocabulary: number of ids that both models have logits of.
        shares_inputs: whether the teacher reads the student's batches; else it has inputs of its own.
        targets: reads states of the student; None: none are compared.
        compared: the evaluation samples with what they need of the teacher.
    """

    loss_label = "distillation loss per supervised token"
    memory_note = "the teacher takes memory beside the model that trains"
    flops_note = "the operations of the teacher are not counted"
    teacher: Teacher
    vocabulary: int
    shares_inputs: bool
    targets: StateTargets | None = None
    compared: Dataset[object] | None = None

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.options = config.trainer.distillation
        self._sums: dict[str, Tensor] = {}
        self._num_positions = 0

    # What is refused, and the data.

    def refusals(self) -> Iterator[str]:
        """Yield what text generation refuses, and what is wrong with `trainer.distillation`."""
        yield from super().refusals()
        yield from distillation_problems(self.config)

    def metric_names(self) -> frozenset[str]:
        """Return those of text generation, the divergence from the teacher and the agreement with it."""
        return super().metric_names() | {"divergence", "agreement"}

    def load_data(self, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments) -> RunData:
        """Return the records, once the teacher is open and has the same vocabulary and supervised tokens."""
        from vlm.data.dataset import SampleDataset
        from vlm.train.distillation.data import TeacherDataset
        from vlm.train.distillation.teacher import Teacher

        self.teacher = teacher = Teacher(self.options, args)
        self.vocabulary = teacher.shared_vocabulary(processor, model_config)
        data = super().load_data(model_config, processor, args)
        self.shares_inputs = teacher.shares_inputs_with(processor)
        teacher.check_batches(self.config, model_config, shares_inputs=self.shares_inputs)
        for dataset in data.records.values():
            if isinstance(dataset, SampleDataset) and not self.shares_inputs:
                TeacherDataset(dataset, teacher, self.config.dataset).check(self.config.dataset.check_samples)
        return data

    def make_collator(self, processor: Processor, data: RunData, args: TrainingArguments) -> Collator:
        """Return what lays out, beside the student's batch, what samples have of the teacher."""
        from vlm.train.distillation.data import DistillationCollator

        return DistillationCollator.around(super().make_collator(processor, data, args), self.teacher.make_collator())

    def before_training(self, run: PreparedRun) -> None:
        """Have the teacher's logits computed where they are kept; else attach what maps states to its width."""
        from vlm.train.distillation.targets import HIDDEN_STATES, IMAGE_FEATURES, StateTargets

        train, evaluation = run.data.train, run.data.evaluation  # with images, whatever is cached of them
        super().before_training(run)
        run.data.train = self._add_teacher(run.data.train, train)
        if evaluation is not None and run.data.evaluation is not None:
            self.compared = self._add_teacher(run.data.evaluation, evaluation)
        if self.options.top_k:
            self.teacher.unload()
            return
        options = self.options
        weights = {HIDDEN_STATES: options.hidden_states_weight, IMAGE_FEATURES: options.image_features_weight}
        if weights := {name: weight for name, weight in weights.items() if weight}:
            width = self.teacher.config.get_text_config().hidden_size
            self.targets = StateTargets.attach(run.model, run.parts, weights, width, run.args)

    def _add_teacher(self, dataset: Dataset[object], original: Dataset[object]) -> Dataset[object]:
        """Return samples with what they need of the teacher; `original` are the same with their images."""
        from vlm.train.distillation.data import DistilledDataset, TeacherDataset
        from vlm.train.distillation.logit_cache import TeacherLogitWriter

        samples, images = cast("SampleDataset", dataset), cast("SampleDataset", original)
        config, teacher = self.config.dataset, self.teacher
        if self.options.top_k:
            packs = TeacherLogitWriter(teacher, images, self.vocabulary, self.options, config).open_packs()
            return DistilledDataset(samples, None, packs)
        return dataset if self.shares_inputs else DistilledDataset(samples, TeacherDataset(images, teacher, config))

    def on_train_begin(self, trainer: ObjectiveTrainer) -> None:
        """Prove what text generation takes for granted, of a teacher that runs beside the model, too."""
        super().on_train_begin(trainer)
        if not self.options.top_k:
            self.teacher.prove(
                packing=self.config.trainer.packing, reads_states=bool(self.options.hidden_states_weight)
            )

    # The loss.

    def supervised_losses(self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs) -> tuple[Tensor, ModelOutput]:
        """Return the loss at each supervised position: labels, divergence and other targets by their weights."""
        inputs, comparison, read = self._ask_teacher(inputs)
        compute_scores = self._get_scores(trainer).with_score(partial(self.training_scores, comparison))
        if self.targets is None or read is None:
            scores, _, outputs = compute_scores(inputs, model, comparison.aligned)
            states = {}
        else:
            with self.targets.watching(inputs, trainer.processor) as watched:
                scores, _, outputs = compute_scores(inputs, model, comparison.aligned)
            states = self.targets.losses(watched, read, inputs, trainer.processor)
        label_losses, divergences = scores.unbind(1)
        weight = self.options.label_weight
        losses = weight * label_losses + (1 - weight) * self.options.temperature**2 * divergences
        for name, values in states.items():
            losses = losses + self.targets.weights[name] * values
        self._note({"label_loss": label_losses, "divergence": divergences} | states)
        return losses, outputs

    def _ask_teacher(self, inputs: Inputs) -> tuple[Inputs, Comparison, TeacherStates | None]:
        """Return the student's inputs, what its logits are compared with, and what the teacher read where it runs."""
        from vlm.train.distillation.comparison import KeptComparison, LiveComparison
        from vlm.train.distillation.data import TEACHER_INPUTS, TEACHER_ROWS

        options, vocabulary, temperature = self.options, self.vocabulary, self.options.temperature
        own = {name: value for name, value in inputs.items() if name not in (TEACHER_INPUTS, TEACHER_ROWS)}
        if options.top_k:
            return own, KeptComparison.of(inputs.get(TEACHER_ROWS), options.top_k, vocabulary, temperature), None
        shown = own if self.shares_inputs else self.teacher.to_device(inputs.get(TEACHER_INPUTS, {}))
        read = self.teacher.read(shown, vocabulary, reads_images=bool(options.image_features_weight))
        return own, LiveComparison(read, vocabulary, temperature), read

    def training_scores(self, comparison: Comparison, logits: Tensor, targets: Tensor, *aligned: Tensor) -> Tensor:
        """Return the loss of labels and the divergence of a chunk of supervised tokens: `(S, 2)`."""
        from torch import stack

        return stack([self.token_losses(logits, targets), self.divergences(comparison(logits, *aligned))], dim=1)

    def evaluation_scores(self, comparison: Comparison, logits: Tensor, targets: Tensor, *aligned: Tensor) -> Tensor:
        """Return divergence and agreement of a chunk of supervised tokens: `(S, 2)`."""
        from torch import stack

        compared = comparison(logits, *aligned)
        agrees = logits[:, : self.vocabulary].argmax(-1) == compared.likeliest
        return stack([self.divergences(compared), agrees.float()], dim=1)

    def divergences(self, compared: Compared) -> Tensor:
        """Return the divergence at each position of a chunk: `(S,)`, float32."""
        from vlm.train.distillation.divergences import DIVERGENCES

        return DIVERGENCES[self.options.divergence](compared.teacher, compared.student)

    # What is logged.

    def _note(self, terms: dict[str, Tensor]) -> None:
        for name, values in terms.items():
            self._sums[name] = self._sums.get(name, 0) + values.detach().float().sum()
        self._num_positions += terms["divergence"].numel()

    def training_metrics(self, trainer: ObjectiveTrainer) -> dict[str, float]:
        """Return the mean of each term of the loss over the supervised tokens since the last log, before its weight."""
        from torch import stack

        metrics = super().training_metrics(trainer)
        if not self._sums:
            return metrics
        names, sums = list(self._sums), list(self._sums.values())
        row = stack([*sums, sums[0].new_tensor(self._num_positions)])
        *totals, number = trainer.accelerator.gather(row[None]).sum(0).tolist()
        self._sums, self._num_positions = {}, 0
        return metrics | {name: total / max(number, 1) for name, total in zip(names, totals, strict=True)}

    def evaluate(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> dict[str, float]:
        """Return what text generation does, the divergence from the teacher, and the share of its likeliest tokens.

        `agreement` is the share of supervised tokens at which both find the same token likeliest.
        """
        import torch

        from vlm.data.holdout import unique_records
        from vlm.evaluation.bootstrap import flatten_scores
        from vlm.evaluation.loss import row_losses
        from vlm.evaluation.record_sums import RecordSums, scores_of

        metrics = super().evaluate(trainer, dataset)
        assert self.compared is not None
        gathered = []
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for batch in trainer.evaluation_batches(self.compared, "divergence from the teacher"):
                inputs, comparison, _ = self._ask_teacher(batch)
                compute = self._get_scores(trainer).with_score(partial(self.evaluation_scores, comparison))
                scores = compute(inputs, aligned=comparison.aligned)[0]
                rows = [row_losses(values.contiguous(), inputs["labels"]) for values in scores.unbind(1)]
                row = torch.stack([rows[0][0], rows[1][0], rows[0][1]], dim=1)  # (B, 3)
                gathered.append(trainer.accelerator.gather_for_metrics(row).double().cpu())
        divergences, agreements, numbers = torch.cat(gathered).numpy().T
        _, records = unique_records(cast("SampleDataset", dataset))
        sums = {
            "divergence": RecordSums.of_samples(divergences, numbers, records),
            "agreement": RecordSums.of_samples(agreements, numbers, records),
        }
        self.record_sums = {**self.record_sums, **sums}
        return metrics | flatten_scores(scores_of(sums))
