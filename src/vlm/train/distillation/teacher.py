"""The teacher of a run: a checkpoint that is opened beside the model, frozen, and never part of what trains.

It is no submodule of the model: no optimiser, checkpoint, DDP or DeepSpeed knows of it. Each rank that runs it holds
all of it.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import cached_file

from vlm.assembly.checkpoint import Checkpoint, CheckpointKind, open_checkpoint
from vlm.assembly.heads import get_num_embeddings
from vlm.assembly.language_models import check_writes, max_positions
from vlm.assembly.loading import read_weight_headers
from vlm.assembly.logit_proofs import check_causal, check_padding, prove_scores
from vlm.assembly.packed_attention import use_packed_attention
from vlm.assembly.packed_rows import check_packing
from vlm.checks.distillation import KEY
from vlm.config.distillation_schema import DistillationConfig
from vlm.config.schema import RunConfig
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.cache import content_hash, json_digest
from vlm.data.encoding.sample_encoder import processor_digest
from vlm.data.processor import Processor
from vlm.families.meta_model import without_zero3
from vlm.models.text_loss import Head, SupervisedScores
from vlm.train.distillation.processors import check_same_vocabulary, have_same_inputs
from vlm.train.distillation.targets import TeacherStates, capture_image_inputs, image_places
from vlm.train.feature_cache.fingerprints import weights_digests
from vlm.train.model import compute_dtype
from vlm.train.objectives.base import Inputs

log = logging.getLogger(__name__)


class Teacher:
    """A checkpoint whose weights are loaded when they are first needed: not where its logits are kept already.

    Args:
        options: names it.
        args: the run's: its device and precision.

    Attributes:
        checkpoint: what it is.
        processor: its own.
        label: the key and its value, for messages.

    Raises:
        ValueError: it does not open, or writes no text.
    """

    def __init__(self, options: DistillationConfig, args: TrainingArguments):
        key = f"{KEY}.teacher"
        self.args, self.label = args, f"{key}={options.teacher}"
        self.checkpoint: Checkpoint = open_checkpoint(str(options.teacher), key=key, revision=options.teacher_revision)
        self.checkpoint.check_heads(expected=False)
        check_writes(self.config)
        self.processor: Processor = self.checkpoint.load_processor()

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model."""
        return self.checkpoint.config

    @property
    def longest(self) -> int:
        """The most tokens of a sample that it reads."""
        return max_positions(self.config)

    def shares_inputs_with(self, processor: Processor) -> bool:
        """Return whether ids and pixels of another processor are those that this model's own would make."""
        return have_same_inputs(processor, self.processor)

    def shared_vocabulary(self, processor: Processor, model_config: PreTrainedConfig) -> int:
        """Return how many ids, from 0 on, both models have logits of: embeddings may be padded.

        Raises:
            ValueError: an id is another token for the student.
        """
        check_same_vocabulary(processor, self.processor, self.label)
        return min(config.get_text_config().vocab_size for config in (model_config, self.config))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, frozen and whole, on this rank's device, in the run's precision."""
        with without_zero3():
            model = self.checkpoint.load_model(compute_dtype(self.args))
        model.requires_grad_(False).eval()
        model.to(self.args.device)  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        log.info("The teacher %s takes %.3g GB on each rank", self.checkpoint.name, num_bytes / 1e9)
        assert get_num_embeddings(model) >= self.config.get_text_config().vocab_size
        return model

    @cached_property
    def scores(self) -> SupervisedScores:
        """What reads its states at supervised positions, once it is proved that it may teach.

        Raises:
            ValueError: its tokens see later ones, or padding changes its logits.
        """
        with self.autocast():
            check_causal(self.model, self.processor, self.label)
            check_padding(self.model, self.processor, self.label)
            prove_scores(scores := SupervisedScores(self.model), self.processor, self.label)
        return scores

    def prove(self, *, packing: bool, reads_states: bool) -> None:
        """Prove that it may teach, also of packed rows, and that its last hidden states can be read; see `scores`.

        Raises:
            ValueError: it may not, or they cannot.
        """
        scores = self.scores
        if packing:
            with self.autocast():
                check_packing(self.model, self.processor)
        if not scores.in_head:
            if reads_states:
                raise ValueError(
                    f"{self.label} changes its logits after its vocabulary head, so hidden states do not determine "
                    f"them; set {KEY}.hidden_states_weight=0"
                )
            log.info("%s: the logits at all supervised positions of a batch are in memory at once", self.label)

    def unload(self) -> None:
        """Let go of the weights."""
        for name in ("scores", "model"):
            self.__dict__.pop(name, None)

    def check_batches(self, config: RunConfig, model_config: PreTrainedConfig, *, shares_inputs: bool) -> None:
        """Check that it can read the batches of a run, where it runs beside the model.

        Raises:
            ValueError: rows are packed for another model, or a stream has no inputs for it.
        """
        if config.trainer.distillation.top_k:
            return
        keep = f"cache its logits ({KEY}.top_k=64)"
        if config.dataset.streaming and not shares_inputs:
            raise ValueError(
                f"{self.label} with dataset.streaming=true: its ids or pixels differ from those of the model that "
                "trains; choose a teacher with the same processor and template, or dataset.streaming=false"
            )
        if not config.trainer.packing:
            return
        if not shares_inputs or self.config.model_type != model_config.model_type:
            raise ValueError(
                f"{self.label} with trainer.packing=true: its ids, pixels or positions differ from those of the model "
                f"that trains, so it needs other rows; {keep}, or choose trainer.packing=false"
            )

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision in which the run computes; DeepSpeed's models are in it as a whole."""
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        mixed = (self.args.bf16 or self.args.fp16) and self.args.deepspeed is None
        return torch.autocast(self.args.device.type, half, enabled=mixed)

    @torch.no_grad()
    def read(self, inputs: Inputs, vocabulary: int, *, reads_images: bool = False) -> TeacherStates:
        """Return what its logits at the supervised positions of a batch are made of; no logit is computed.

        Args:
            inputs: a batch on its device, padded or packed; empty where no sample is left.
            vocabulary: number of logits of no state.
            reads_images: whether to return what it reads of images, too.
        """
        if not inputs:
            return TeacherStates(torch.zeros((0, 1)), lambda states: states.new_zeros(len(states), vocabulary))
        scores, features = self.scores, list[Tensor]()
        with ExitStack() as stack:
            if SEQUENCE_STARTS in inputs:
                stack.enter_context(use_packed_attention(self.model.config.get_text_config()))
            if reads_images:
                places = image_places(inputs, self.processor)
                stack.enter_context(capture_image_inputs(self.model, inputs["input_ids"], places, features.append))
            stack.enter_context(self.autocast())
            states, head = scores.read_states(inputs)
        return TeacherStates(states, self._frozen(head), features[0] if features else None)

    def _frozen(self, head: Head) -> Head:
        """Return a head that keeps no graph, also where it is called within the student's forward pass."""

        def compute(states: Tensor) -> Tensor:
            """Compute the logits of some positions: `(S, D) -> (S, V)`."""
            with torch.no_grad(), self.autocast():
                return head(states)

        return compute

    def make_collator(self) -> Collator:
        """Return what makes batches of samples that its processor encoded."""
        return Collator.of(self.processor, deduplicate=self.processor.deduplicated_inputs)

    def to_device(self, batch: Mapping[str, object]) -> Inputs:
        """Return a batch of its own as it reads it, with pixels normalised, on its device."""
        inputs = {name: value.to(self.args.device) for name, value in batch.items() if isinstance(value, Tensor)}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.processor.normalise(inputs["pixel_values"])
        return inputs

    def fingerprint(self, cache: Path) -> str:
        """Return a fingerprint of all that its logits depend on besides records; no weights are loaded for most.

        That of files is kept in the cache, by their paths, sizes and times.
        """
        config = {name: value for name, value in self.config.to_diff_dict().items() if name != "recipe"}
        args, digest = self.args, processor_digest(self.processor)
        precision = str(compute_dtype(args)), args.bf16, args.fp16, args.deepspeed is None
        files = self._weight_files()
        weights = [content_hash(file, cache) for file in files] if files else weights_digests(self.model)
        return json_digest(weights, config, digest, precision)

    def _weight_files(self) -> list[Path]:
        """Return the files of its weights; none of an adapter, whose base is elsewhere, or of another format."""
        checkpoint = self.checkpoint
        if (
            checkpoint.kind is CheckpointKind.ADAPTER
            or read_weight_headers(checkpoint.name, checkpoint.revision) is None
        ):
            return []
        config_file = cached_file(checkpoint.name, "config.json", revision=checkpoint.revision)
        return sorted(Path(str(config_file)).parent.glob("*.safetensors"))
