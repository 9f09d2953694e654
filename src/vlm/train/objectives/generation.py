"""The model learns to write: the loss of replies, token by token. Its top imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vlm.checks.feature_cache import cache_problems
from vlm.checks.heads import unused_head_problems
from vlm.checks.preference import unused_preference_problems
from vlm.checks.run import evaluation_problems
from vlm.config.choices import EVAL_METRICS, EVALUATION_LOSSES, GROUP_BY_MODALITY_LENGTH, LOSS_METRICS
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.derived import training_keys
from vlm.evaluation.text_metrics import check_metrics
from vlm.runs.samples import SAMPLES_FILE
from vlm.train.objectives.base import Inputs, Objective, ObjectiveTrainer, PreparedRun, RunData

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
    from transformers.utils import ModelOutput

    from vlm.config.schema import TrainerOptions
    from vlm.data.batching.collator import Collator
    from vlm.data.dataset import SampleDataset
    from vlm.data.encoding.sample_encoder import SampleEncoder
    from vlm.data.processor import Processor
    from vlm.evaluation.loss_metrics import LossMetric
    from vlm.models import VLMProcessor
    from vlm.models.text_loss import SupervisedScores
    from vlm.train.before_after import BeforeAfter
    from vlm.train.example_question import ExampleQuestion

PLAIN_TEMPLATE = "plain"
"""The template that leaves prompts out."""


class Generation(Objective):
    """Text generation: cross-entropy of the supervised tokens.

    Attributes:
        answer_metrics: computes those of `trainer.eval_metrics` that are of a model's answers; None: there are none.
        loss_metrics: those that are of losses.
        before_after: compares the model with the one that the run began with; None: that is not asked for.
        uncached: the training samples with their images, where a family's features are cached; None: they are not.
    """

    loss_label = "loss per supervised token"
    takes_loss_weights = True
    answer_metrics: Callable[[PreTrainedModel, Callable[[], None]], dict[str, float]] | None = None
    loss_metrics: Sequence[LossMetric] = ()
    before_after: BeforeAfter | None = None
    uncached: SampleDataset | None = None
    _scores: SupervisedScores | None = None
    _balance_losses: tuple[Tensor, ...] = ()

    def refusals(self) -> Iterator[str]:
        """Yield keys of prediction heads, and what is wrong with evaluation data and cached image features."""
        if (task := self.config.model.head.task) is not None:
            name = self.config.trainer.objective
            yield f"model.head.task={task}: trainer.objective={name} trains no head; leave one of them out"
        yield from unused_head_problems(self.config)
        yield from unused_preference_problems(self.config)
        yield from cache_problems(self.config)
        yield from evaluation_problems(self.config)
        try:
            check_metrics(self.config.trainer.eval_metrics, EVAL_METRICS, "trainer.eval_metrics=")
        except ValueError as error:
            yield str(error)

    def metric_names(self) -> frozenset[str]:
        """Return those of losses, and `trainer.eval_metrics`."""
        names = self.config.trainer.eval_metrics
        return frozenset({*EVALUATION_LOSSES, *names, *(["retrieval_chance"] if "retrieval" in names else [])})

    def make_encoder(self, model_config: PreTrainedConfig, processor: Processor) -> SampleEncoder:
        """Return what encodes whole conversations, their replies supervised."""
        from vlm.data.encoding.loss_weights import LossWeights
        from vlm.data.encoding.sample_encoder import SampleEncoder
        from vlm.train.data import max_sample_length

        longest = max_sample_length(self.config.dataset, model_config)
        data = self.config.dataset
        return SampleEncoder(
            processor,
            longest,
            truncate=data.over_length == "truncate",
            supervise=data.supervise,
            thinking=data.thinking,
            factors=LossWeights.make(1.0, data.loss_patterns),
        )

    def load_data(self, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments) -> RunData:
        """Return the training records, and those of `dataset.eval_path` or `dataset.eval_split`."""
        from vlm.assembly.language_models import check_writes
        from vlm.data.counted_later import when_counted
        from vlm.train.data import load_data, needs_counts, set_thinking
        from vlm.train.feature_cache.images import refuse_native_resolution

        check_writes(model_config)
        if self.config.dataset.cache_features:
            refuse_native_resolution(model_config)
        encoder, waits = self.make_encoder(model_config, processor), needs_counts(self.config, args.world_size)
        groups = self.config.trainer.train_sampling_strategy == GROUP_BY_MODALITY_LENGTH
        train, evaluation = load_data(self.config.dataset, encoder, args, waits=waits, groups=groups)
        when_counted(train, lambda: set_thinking(processor, self.config.inference, train))
        if evaluation is not None:
            self.loss_metrics = _prepare_loss_metrics(self.config.trainer, evaluation)
        records = {"train": train} if evaluation is None else {"train": train, "eval": evaluation}
        return RunData(train, evaluation, records)

    def make_collator(self, processor: Processor, data: RunData, args: TrainingArguments) -> Collator:
        """Return what pads conversations, or lays features out in place of images."""
        from vlm.train.data import make_collator

        return make_collator(processor, data.records.values(), args.world_size)

    def before_training(self, run: PreparedRun) -> None:
        """Compute the features of images where they are cached; choose the records that metrics of answers are of."""
        from vlm.assembly.model_kinds import is_composed_model
        from vlm.train.feature_cache.families import replace_family_images
        from vlm.train.feature_cache.images import replace_images_with_features
        from vlm.train.sample_generation import make_answer_metrics

        config, data, evaluation = self.config, run.data, cast("SampleDataset | None", run.data.evaluation)
        names = [name for name in config.trainer.eval_metrics if name not in LOSS_METRICS]
        if names and evaluation is not None:
            self.answer_metrics = make_answer_metrics(names, config, evaluation, run.processor, run.args)
        if not config.dataset.cache_features:
            return
        datasets = cast("list[SampleDataset | None]", [data.train, data.evaluation])
        collate = cast("Collator", run.collate)
        if is_composed_model(run.model):
            processor = cast("VLMProcessor", run.processor)
            train, data.evaluation = replace_images_with_features(
                run.model, processor, datasets, collate, config.dataset, run.args
            )
        else:
            self.uncached = cast("SampleDataset", data.train)
            train, data.evaluation = replace_family_images(
                run.model,
                run.processor,
                datasets,
                collate,
                config.dataset,
                run.args,
                connector_trains="connector" in training_keys(config.trainer),
            )
        data.train = self.cached = cast("SampleDataset", train)

    def callbacks(self, run: PreparedRun, trainer: ObjectiveTrainer) -> list[TrainerCallback]:
        """Return what answers a few samples into `samples.md` at each evaluation and at the end, and what measures the
        model before the run.
        """
        from vlm.train.data import first_samples
        from vlm.train.monitor.callbacks import SampleGenerationCallback
        from vlm.train.sample_generation import make_sample_generator

        callbacks: list[TrainerCallback] = []
        if self.config.trainer.before_after:
            from vlm.train.before_after import BeforeAfter

            self.before_after = BeforeAfter(self.config, run, trainer, lambda: self._reply_scores(trainer))
            callbacks.append(self.before_after)
        if not self.config.trainer.num_samples:
            return callbacks
        records = run.data.records.get("eval", run.data.records["train"])
        samples = first_samples(records, self.config.trainer.num_samples)
        generate = make_sample_generator(self.config.inference, trainer, run.processor, samples, run.folder)
        return [*callbacks, SampleGenerationCallback(generate, run.folder / "samples.md")]

    def on_train_begin(self, trainer: ObjectiveTrainer) -> None:
        """Prove that the model is causal and reads padded batches; find out whether its loss is computed in chunks.

        Where a family's features are cached, prove too that they change no loss.
        """
        from vlm.assembly.logit_proofs import check_causal, check_padding, model_label, prove_scores

        label = model_label(self.config)
        check_causal(trainer.model, trainer.processor, label)
        check_padding(trainer.model, trainer.processor, label)
        prove_scores(self._get_scores(trainer), trainer.processor, label)
        if self.uncached is not None:
            from vlm.train.feature_cache.families import prove_cached_losses

            prove_cached_losses(trainer, self._get_scores(trainer), self.cached, self.uncached, label)

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each supervised token, `(S,)` in float32: its cross-entropy.

        Called with chunks of the supervised tokens of a batch, in training alone.

        Args:
            logits: `(S, vocabulary)`, in the run's precision.
            targets: `(S,)`, the ids of the tokens.
        """
        from vlm.models.text_loss import token_losses

        return token_losses(logits, targets)

    def _get_scores(self, trainer: ObjectiveTrainer) -> SupervisedScores:
        """Return what computes `token_losses` of the run's model."""
        from vlm.models.text_loss import SupervisedScores

        if self._scores is None:
            self._scores = SupervisedScores(trainer.model, self.token_losses)
        return self._scores

    def supervised_losses(self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs) -> tuple[Tensor, ModelOutput]:
        """Return the loss at each supervised position of a batch, `(S,)` in float32, and the model's outputs."""
        losses, _, outputs = self._get_scores(trainer)(inputs, model)
        return losses, outputs

    def compute_loss(
        self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, ModelOutput]:
        """Return the loss of the supervised positions; vocabulary logits are computed there alone, in chunks.

        With weights `w` of the positions it is `sum w loss / sum w`, over the step or over a micro-batch. Mixtures of
        experts add their balance loss.
        """
        from vlm.data.dataset import LOSS_WEIGHTS
        from vlm.models.text_loss import add_balance_loss, mean_loss
        from vlm.train.step.step_packing import supervised_weights

        losses, outputs = self.supervised_losses(trainer, model, inputs)
        if self.watch_losses is not None:
            self.watch_losses(losses, inputs)
        number: Tensor | int = losses.numel()
        if LOSS_WEIGHTS in inputs:
            weights = supervised_weights(inputs)
            losses, number = losses * weights, weights.sum()
            if num_items_in_batch is None:  # the mean of a micro-batch is a weighted one
                num_items_in_batch = number.where(number > 0, 1)
        loss = mean_loss(losses, num_items_in_batch)
        if (balance_loss := outputs.get("aux_loss")) is not None:
            self._balance_losses += (balance_loss.detach(),)
            text_config = trainer.model.config.get_text_config()
            loss = add_balance_loss(loss, outputs, text_config, number, num_items_in_batch)
        return loss, outputs

    def training_metrics(self, trainer: ObjectiveTrainer) -> dict[str, float]:
        """Return the mean balance loss of a mixture of experts, before its coefficient; nothing for other models."""
        from torch import stack

        if not self._balance_losses:
            return {}
        mean = stack(self._balance_losses).float().mean()
        self._balance_losses = ()
        return {"balance_loss": float(trainer.accelerator.gather(mean.reshape(1)).mean())}

    def evaluate(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> dict[str, float]:
        """Return the loss, exact to the token, and that on blank images, with intervals; `trainer.eval_metrics`."""
        from vlm.evaluation.bootstrap import flatten_scores
        from vlm.evaluation.loss_metrics import compute_loss
        from vlm.train.evaluation_losses import TrainerLosses
        from vlm.train.step.compile import force_eager

        samples, losses = cast("SampleDataset", dataset), TrainerLosses(trainer, self._reply_scores(trainer))
        with trainer.compute_loss_context_manager():
            result = compute_loss(samples, losses)
            scores, self.record_sums = result.scores, result.sums
            with force_eager():
                for metric in self.loss_metrics:
                    scores |= metric.compute(samples, losses).scores
                answers = {}
                if self.answer_metrics is not None:
                    answers = self.answer_metrics(trainer.model, trainer.mark_progress)
        return flatten_scores(scores) | answers

    def after_saving(self, final: Path) -> None:
        """Compare the trained model with the one that the run began with, where `trainer.before_after` asks for it."""
        if self.before_after is not None:
            self.before_after.finish(final)

    def _reply_scores(self, trainer: ObjectiveTrainer) -> SupervisedScores:
        """Return what computes the cross-entropy of the run's model, whatever loss it trains with."""
        from vlm.models.text_loss import token_losses

        return self._get_scores(trainer).with_score(token_losses)

    def next_command(self, final: Path, example: ExampleQuestion) -> str:
        """Return a question about an image."""
        words = ["--image", example.image, "--prompt", example.prompt or "What is in this image?"]
        return shlex.join(["vlm", "generate", str(final), *words])

    def next_commands(self, final: Path, example: ExampleQuestion) -> dict[str, str]:
        """Return a question about an image, a measurement on the evaluation records if they are a file, and more.

        With the template `plain` no prompt was trained on: the answers of the run itself take the question's place.
        """
        commands, data = super().next_commands(final, example), self.config.dataset
        first = {"ask it": commands.pop("ask it")}
        if data.template == PLAIN_TEMPLATE:
            has_answers = self.config.trainer.num_samples > 0
            first = {"see its answers": shlex.quote(str(final.parent / SAMPLES_FILE))} if has_answers else {}
        if not data.eval_path:
            return {**first, **commands}
        words = ["vlm", "eval", str(final), "--data", data.eval_path]
        words += ["--image-folder", data.image_folder] if data.image_folder else []
        words += ["--format", data.format] if data.format != DatasetConfig.format else []
        return {**first, "measure it": shlex.join(words), **commands}


def _prepare_loss_metrics(options: TrainerOptions, dataset: SampleDataset) -> list[LossMetric]:
    """Return the metrics of losses among `trainer.eval_metrics`, prepared for the evaluation records.

    Raises:
        ValueError: a metric cannot be computed on them.
    """
    names = [name for name in options.eval_metrics if name in LOSS_METRICS]
    if not names:
        return []

    from vlm.evaluation import loss_metrics

    candidates = options.eval_retrieval_candidates
    advice = f"leave it out of trainer.eval_metrics, or lower trainer.eval_retrieval_candidates (now {candidates})"
    settings = loss_metrics.LossMetricSettings(candidates, options.eval_metrics_samples, advice)
    return [loss_metrics.LOSS_METRICS[name](dataset, settings) for name in names]
