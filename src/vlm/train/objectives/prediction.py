"""Heads learn to tell labels or numbers from the hidden states at a prompt. Its top imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vlm.checks.feature_cache import UNUSED_LIMIT
from vlm.checks.heads import head_problems
from vlm.checks.preference import unused_preference_problems
from vlm.config.choices import HEAD_METRICS
from vlm.config.derived import caches_features
from vlm.train.objectives.base import Inputs, Objective, ObjectiveTrainer, PreparedRun, RunData

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Dataset, Sampler
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
    from transformers.utils import ModelOutput

    from vlm.data.encoding.prompts import PromptEncoder
    from vlm.data.feature_cache.heads import HeadFeatureDataset
    from vlm.data.heads.dataset import HeadCollator, HeadDataset
    from vlm.data.processor import Processor
    from vlm.models import VLMForPrediction
    from vlm.train.example_question import ExampleQuestion


class Prediction(Objective):
    """Prediction heads, and whatever else of their model trains. Losses are means over samples of each micro-batch.

    Attributes:
        data: the records and their labels, from `load_data` on.
        model_config: the configuration of the model with its heads, from `load_data` on.
        collate: makes batches of prompts, from `make_collator` on.
        read: makes a trainer's data set of samples, from `before_training` on.
        out_of_fold: head -> its outputs for all records, where there are folds, from `before_training` on.
    """

    loss_label = "loss of the prediction heads"
    row_key = "groups"
    memory_note = "it has prediction heads, whose memory is measured alone"
    flops_note = "operations are counted only for a loss on replies, and this run trains prediction heads"

    def refusals(self) -> Iterator[str]:
        """Yield what is wrong with the heads and their data, and keys that are for runs that learn to write."""
        config = self.config
        if config.model.head.task is None:
            yield "trainer.objective=prediction: there is no head; choose one, such as model/head=binary"
            return
        yield from head_problems(config)
        yield from unused_preference_problems(config)
        if config.trainer.packing:
            yield "trainer.packing=true: prediction heads read one prompt per row; leave it out"
        if (limit := config.dataset.cache_limit_gb) is not None:
            yield f"dataset.cache_limit_gb={limit}: {UNUSED_LIMIT}"
        if (supervise := config.dataset.supervise) != "replies":
            yield f"dataset.supervise={supervise}: with prediction heads, only replies can be supervised; leave it out"
        if names := config.trainer.eval_metrics:
            yield f"trainer.eval_metrics={names}: prediction heads have their own metrics; leave it out"

    def metric_names(self) -> frozenset[str] | None:
        """Return the loss and the metrics of each head; None if a checkpoint has further heads."""
        if self.config.trainer.from_pretrained is not None:
            return None
        heads = self.config.model.head.by_name
        return frozenset(
            f"{'' if len(heads) == 1 else f'{head}_'}{name}"
            for head, settings in heads.items()
            for name in ("loss", *HEAD_METRICS.get(settings.task or "", ()))
        )

    def training_keys(self) -> dict[str, str]:
        """Return the head, which always trains."""
        return {"head": f"model.head.task={self.config.model.head.task}"}

    def make_encoder(self, model_config: PreTrainedConfig, processor: Processor) -> PromptEncoder:
        """Return what encodes prompts that wait for a reply."""
        from vlm.train.heads.data import make_prompt_encoder

        return make_prompt_encoder(self.config, model_config, processor)

    def load_data(self, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments) -> RunData:
        """Return the records, divided; labels and heads are known to fit before a weight is loaded."""
        from vlm.assembly.heads import resolve_heads
        from vlm.assembly.language_models import check_writes
        from vlm.train.heads.data import load_head_data, targets_by_head

        if self.config.model.head.generation_weight > 0:
            check_writes(model_config)
        self.data = data = load_head_data(self.config, self.make_encoder(model_config, processor), args.seed)
        targets = targets_by_head(data.train)
        self.model_config = resolve_heads(self.config.model, model_config, processor, data.heads, targets)
        if data.evaluation is None:
            if (metric := self.config.trainer.keep_best) is not None:
                raise ValueError(f"trainer.keep_best={metric}: there are no evaluation records; leave it out")
            args.eval_strategy = "no"
        return RunData(data.train, data.evaluation, data.datasets_by_role(), data.summary())

    def wrap_model(self, model: PreTrainedModel, args: TrainingArguments) -> VLMForPrediction:
        """Return the model with heads on it."""
        from vlm.train.heads.model import attach_heads

        return attach_heads(model, self.model_config, args.seed)

    def make_collator(self, processor: Processor, data: RunData, args: TrainingArguments) -> HeadCollator:
        """Return what makes batches of prompts with the targets of their heads."""
        from vlm.data.heads.dataset import HeadCollator
        from vlm.train.data import make_collator

        prompts = make_collator(processor, data.records.values(), args.world_size, with_stats=False)
        self.collate = HeadCollator(prompts, self.data.heads)
        return self.collate

    def before_training(self, run: PreparedRun) -> None:
        """Compute the hidden states of a frozen body once; train and measure heads on folds, if there are any."""
        from vlm.data.feature_cache.heads import collate_features
        from vlm.train.feature_cache.heads import disable_workers, make_feature_reader
        from vlm.train.heads.folds import predict_out_of_fold

        self.read = lambda dataset: dataset
        if caches_features(self.config):
            self.read = make_feature_reader(run, self.config.dataset, self.data.all_datasets, self.collate)
            run.args, run.collate = disable_workers(run.args), collate_features
        if self.data.folds:
            self.out_of_fold = predict_out_of_fold(self, run, self.data.folds, self.read)
        run.data.train = self.read(self.data.train)
        run.data.evaluation = None if self.data.evaluation is None else self.read(self.data.evaluation)

    @property
    def loss_average(self) -> str:
        """Return that losses are means of means: a batch has no supervised tokens to weigh it by."""
        return "micro_batch"

    def write_first_batch(self, run: PreparedRun, batch: Inputs) -> None:
        """Write the first prompts as the model sees them; a batch of cached features has none."""
        from vlm.train.heads.data import write_first_prompts

        write_first_prompts(self.data.train, self.collate, run.processor, run.folder, run.args.train_batch_size)

    def on_train_begin(self, trainer: ObjectiveTrainer) -> None:
        """Prove that the body reads padded batches and, where it learns to write, that it is causal.

        Where its hidden states are cached, the body takes no part in training, and nothing is proved.
        """
        from vlm.assembly.logit_proofs import check_causal, check_padding, model_label, prove_scores
        from vlm.assembly.model_kinds import get_body

        if caches_features(self.config):
            return
        body, label = get_body(trainer.model), model_label(self.config)
        check_padding(body, trainer.processor, label)
        if self.model_config.generation_weight:
            check_causal(body, trainer.processor, label)
            prove_scores(cast("VLMForPrediction", trainer.model).reply_losses, trainer.processor, label)

    def make_train_sampler(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> Sampler[int] | None:
        """Return an order in which samples that a ranking compares stand together, so that batches have pairs."""
        from vlm.data.batching.samplers import GroupSampler
        from vlm.train.arguments import sampler_seed

        has_ranking_head = any(head.task == "pairwise" for head in self.data.heads)
        groups = cast("HeadDataset | HeadFeatureDataset", dataset).group_indices
        if not has_ranking_head or (groups < 0).all():
            return None
        return GroupSampler(groups.tolist(), sampler_seed(trainer.args))

    def compute_loss(
        self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, ModelOutput]:
        """Return the weighted sum of the heads' losses, and of that of the replies where they are learned.

        A batch without any reply has a loss of replies too, so that every rank's backward pass runs through the same
        modules.
        """
        if self.model_config.generation_weight and "text_labels" not in inputs:
            from vlm.data.encoding.labels import IGNORE_INDEX

            no_reply = inputs["input_ids"].new_full(inputs["input_ids"].shape, IGNORE_INDEX)
            inputs = {**inputs, "text_labels": no_reply, "prompt_mask": inputs["attention_mask"]}
        outputs = model(**inputs)
        return outputs.loss, outputs

    def evaluate(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> dict[str, float]:
        """Return loss and metrics of each head, the loss alone with an interval; `<head>_<metric>` of several."""
        from vlm.train.heads.outputs import collect_outputs, head_metrics, record_losses

        heads, outputs = self.model_config.settings, collect_outputs(trainer, dataset)
        self.record_sums = record_losses(heads, outputs)
        return head_metrics(heads, outputs)

    def after_training(self, run: PreparedRun, trainer: ObjectiveTrainer) -> None:
        """Choose temperatures and thresholds, and measure: on test records too, and on blank images."""
        from vlm.data.cache import json_digest
        from vlm.data.heads.dataset import BlankHeadDataset
        from vlm.data.record_identity import identify_records
        from vlm.train.heads.data import targets_by_head
        from vlm.train.heads.model import calibrate_heads
        from vlm.train.heads.outputs import collect_outputs
        from vlm.train.heads.report import report

        data, model = self.data, cast("VLMForPrediction", run.model)
        outputs = self.out_of_fold if data.folds else collect_outputs(trainer, run.data.evaluation)
        calibrate_heads(model, outputs, self.config.model.head)
        sets = {"folds" if data.folds else "evaluation": outputs}
        if data.test is not None:
            sets["test"] = collect_outputs(trainer, self.read(data.test))
        measured = data.test or data.evaluation
        blank = None
        if measured is not None and measured.num_images.any():
            blank = collect_outputs(trainer, self.read(BlankHeadDataset(measured.dataset, data.heads)))
        if run.args.process_index == 0:
            datasets = {"folds": [fold for _, fold in data.folds], "evaluation": [data.evaluation], "test": [data.test]}
            identities = {
                name: json_digest(*(identify_records(one.dataset) for one in datasets[name] if one is not None))
                for name in sets
            }
            report(run.folder, model.config.settings, targets_by_head(data.train), sets, blank, identities)

    def next_command(self, final: Path, example: ExampleQuestion) -> str:
        """Return a prediction for an image and a prompt."""
        words = ["--image", example.image, "--prompt", example.prompt or "PROMPT"]
        return shlex.join(["vlm", "predict", str(final), *words])
