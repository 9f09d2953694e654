"""What is done between wrapping a model and its first step: its forward is unwrapped, and it is checked."""

from typing import Protocol

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.assembly.packed_rows import check_packing
from vlm.data.processor import Processor
from vlm.train.objectives.base import Objective, ObjectiveTrainer
from vlm.train.sharding import gather_shared
from vlm.train.step.compile import force_eager


class StartingTrainer(ObjectiveTrainer, Protocol):
    """What is asked of the run's `VLMTrainer`."""

    packing: bool
    processor: Processor
    objective: Objective
    is_deepspeed_enabled: bool


class BeforeFirstStep(TrainerCallback):
    """Lets the objective do what needs the model as it is trained, such as proofs, and checks packed rows."""

    def __init__(self, trainer: StartingTrainer, model: PreTrainedModel):
        self.trainer = trainer
        self.own_forward = vars(model).get("forward")  # such as Liger's, before accelerate wraps it

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Take accelerate's wrapper off the forward pass, which would widen all logits to float32 at once; check it."""
        trainer = self.trainer
        if not trainer.is_deepspeed_enabled:  # DeepSpeed wraps the model, and not its forward
            vars(trainer.model).pop("forward", None)
            if self.own_forward is not None:
                trainer.model.forward = self.own_forward
        gather_shared(trainer.model)
        with trainer.compute_loss_context_manager(), force_eager():
            trainer.objective.on_train_begin(trainer)
            if trainer.packing:
                check_packing(trainer.model, trainer.processor)
