"""The model learns which of two replies is better, or whether a reply is wanted. Its top imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vlm.checks.heads import unused_head_problems
from vlm.checks.preference import preference_problems
from vlm.checks.run import evaluation_problems
from vlm.train.objectives.base import Collate, Inputs, ObjectiveTrainer, PreparedRun, RunData
from vlm.train.objectives.generation import Generation

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Dataset
    from transformers import PreTrainedConfig, TrainingArguments
    from transformers.utils import ModelOutput

    from vlm.data.batching.step_layout import SampleCosts
    from vlm.data.encoding.preference import PreferenceEncoder
    from vlm.data.preference.collator import PreferenceCollator
    from vlm.data.preference.dataset import PreferenceDataset
    from vlm.data.processor import Processor
    from vlm.train.example_question import ExampleQuestion
    from vlm.train.preference.losses import SideScores
    from vlm.train.preference.metrics import StepMetrics
    from vlm.train.preference.reference import Reference


class Preference(Generation):
    """Preferences: the loss of a record is of the log-probabilities of its sides, and of a reference model's.

    The loss of a step is the mean over its pairs on all ranks, of `kto` over its replies.

    Attributes:
        options: `trainer.preference`.
        reference: what the reference model says; None: the loss has none.
        metrics: what is logged of the steps since the last log.
    """

    loss_label = "preference loss"
    memory_note = "the replies of a pair are computed together, and the prediction knows single replies"
    row_key = "record_index"
    takes_loss_weights = False
    packing_proofs = ("packing", "pairs")
    reference: Reference | None = None
    metrics: StepMetrics

    def refusals(self) -> Iterator[str]:
        """Yield keys of prediction heads, and what contradicts itself in `trainer.preference` and the data."""
        if (task := self.config.model.head.task) is not None:
            yield f"model.head.task={task}: trainer.objective=preference trains no head; leave one of them out"
        yield from unused_head_problems(self.config)
        yield from preference_problems(self.config)
        yield from evaluation_problems(self.config)

    def metric_names(self) -> frozenset[str]:
        """Return the loss, rewards, margin, accuracy, and the divergence where there is a reference."""
        from vlm.config.choices import PREFERENCE_METRICS, REFERENCE_FREE_LOSSES

        is_free = self.config.trainer.preference.loss in REFERENCE_FREE_LOSSES
        return frozenset(("loss", *(name for name in PREFERENCE_METRICS if not (is_free and name == "kl"))))

    @property
    def loss_average(self) -> str:
        """Return that sums are divided by the number of items of the step, which `count_items` counts."""
        return "token"

    def make_encoder(self, model_config: PreTrainedConfig, processor: Processor) -> PreferenceEncoder:
        """Return what encodes both sides, the replies in which they differ supervised."""
        from vlm.data.encoding.preference import PreferenceEncoder
        from vlm.train.data import max_sample_length

        data, options = self.config.dataset, self.config.trainer.preference
        return PreferenceEncoder(
            processor,
            max_sample_length(data, model_config),
            truncate=False,
            supervise=data.supervise,
            thinking=data.thinking,
            labelled=options.loss == "kto",
            rejects_image=options.rejected_image != "same",
        )

    def load_data(self, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments) -> RunData:
        """Return the training records, and those of `dataset.eval_path` or `dataset.eval_split`, with their sides."""
        from vlm.assembly.language_models import check_writes
        from vlm.data.dataset import SampleDataset
        from vlm.data.preference.dataset import PreferenceDataset
        from vlm.train.data import load_data, set_thinking
        from vlm.train.preference.losses import needs_mismatches

        check_writes(model_config)
        train, held_out = load_data(self.config.dataset, self.make_encoder(model_config, processor), args)
        assert isinstance(train, SampleDataset)
        set_thinking(processor, self.config.inference, train)
        options = self.config.trainer.preference

        def with_sides(dataset: SampleDataset) -> PreferenceDataset:
            """Return records with their sides."""
            return PreferenceDataset(
                dataset, rejected_image=options.rejected_image, mismatches=needs_mismatches(options)
            )

        evaluation = None if held_out is None else with_sides(held_out)
        records = {"train": train} if held_out is None else {"train": train, "eval": held_out}
        return RunData(with_sides(train), evaluation, records)

    def make_collator(self, processor: Processor, data: RunData, args: TrainingArguments) -> PreferenceCollator:
        """Return what makes batches with the chosen sides of its records, then the rejected ones."""
        from vlm.data.preference.collator import PreferenceCollator
        from vlm.train.data import make_collator

        return PreferenceCollator(make_collator(processor, data.records.values(), args.world_size))

    def make_row_collator(self, run: PreparedRun, costs: SampleCosts, max_tokens: int | None) -> Collate:
        """Return what puts the sides of each record of a micro-batch behind one prompt.

        Raises:
            ValueError: a record may be longer than a row.
        """
        from vlm.data.batching.shared_prompt import BranchMerger
        from vlm.data.preference.packing import PackedPreferenceCollator, check_records_fit

        if max_tokens is not None:
            check_records_fit(cast("PreferenceDataset", run.data.train), max_tokens)
        padded = cast("PreferenceCollator", run.collate).collate
        return PackedPreferenceCollator(padded, BranchMerger.of(run.processor), costs, max_tokens)

    def before_training(self, run: PreparedRun) -> None:
        """Choose the reference, while the model is what it is at the start of the run."""
        from vlm.train.preference.losses import uses_reference
        from vlm.train.preference.metrics import StepMetrics
        from vlm.train.preference.reference import choose_reference

        self.metrics = StepMetrics()
        if uses_reference(self.config.trainer.preference):
            self.reference = choose_reference(self.config, run)

    def on_train_begin(self, trainer: ObjectiveTrainer) -> None:
        """Prove what the loss takes for granted of the model, and compute what the reference model says."""
        from vlm.assembly.packed_rows import check_shared_prompts

        super().on_train_begin(trainer)
        if self.config.trainer.packing:
            check_shared_prompts(trainer.model, trainer.processor)
        if self.reference is not None:
            self.reference.prepare(trainer, self._get_scores(trainer))

    def count_items(self, inputs: Inputs) -> Tensor:
        """Return the number of pairs of a batch, of `kto` that of its replies."""
        from vlm.data.encoding.preference import MISMATCHED
        from vlm.data.preference.collator import RECORD_INDEX, ROLES

        if self.config.trainer.preference.loss == "kto":
            return (inputs[ROLES] != MISMATCHED).sum()
        return inputs[RECORD_INDEX].new_tensor(len(inputs[RECORD_INDEX]))

    def compute_loss(
        self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, ModelOutput]:
        """Return the sum of the losses of a batch's records over the number of items of the step."""
        from vlm.models.text_loss import add_balance_loss
        from vlm.train.preference.losses import record_losses
        from vlm.train.preference.metrics import metric_sums
        from vlm.train.preference.scores import score_batch

        options = self.config.trainer.preference
        reference = None if self.reference is None else self.reference.training(inputs)
        sides, mean, outputs = score_batch(self._get_scores(trainer), inputs, model)
        sides = replace(sides, reference=reference)
        divergence = self._estimate_divergence(trainer, sides)
        self.metrics.add(metric_sums(sides, options, divergence))
        number = self.count_items(inputs)
        items = number.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = (record_losses(sides, options, divergence).sum() + 0 * mean) / items
        if (balance_loss := outputs.get("aux_loss")) is not None:
            self._balance_losses += (balance_loss.detach(),)
            loss = add_balance_loss(loss, outputs, trainer.model.config.get_text_config(), number, items)
        return loss, outputs

    def _estimate_divergence(self, trainer: ObjectiveTrainer, sides: SideScores) -> Tensor | None:
        """Return the estimate of `kto` from the mismatched replies of a micro-batch on all ranks."""
        from torch import stack

        from vlm.train.preference.losses import estimate_divergence, needs_mismatches

        if not needs_mismatches(self.config.trainer.preference):
            return None
        total, number = trainer.accelerator.gather(stack(estimate_divergence(sides))[None]).sum(dim=0)
        return total / number.clamp(min=1)

    def training_metrics(self, trainer: ObjectiveTrainer) -> dict[str, float]:
        """Return rewards, margin, accuracy and divergence, and the balance loss of a mixture of experts."""
        return super().training_metrics(trainer) | self.metrics.take(trainer.accelerator.gather)

    def evaluate(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> dict[str, float]:
        """Return the loss of held-out records, rewards, margin, accuracy and divergence, with intervals."""
        from vlm.evaluation.bootstrap import flatten_scores
        from vlm.train.preference.metrics import bootstrap_records, evaluate_records
        from vlm.train.preference.scores import score_batch, score_dataset

        scores, reference = self._get_scores(trainer), self.reference

        def score(inputs: Inputs) -> SideScores:
            """Score a batch with the model and its reference."""
            sides, _, _ = score_batch(scores, inputs)
            return sides if reference is None else replace(sides, reference=reference.evaluation(inputs))

        sides = score_dataset(trainer, cast("PreferenceDataset", dataset), "preference", score)
        self.record_sums = evaluate_records(sides, self.config.trainer.preference)
        return flatten_scores(bootstrap_records(self.record_sums))

    def next_commands(self, final: Path, example: ExampleQuestion) -> dict[str, str]:
        """Return a question about an image, and more; `vlm eval` does not read pairs, which its evaluation has."""
        commands = super().next_commands(final, example)
        return {what: command for what, command in commands.items() if what != "measure it"}
