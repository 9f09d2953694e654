"""The keys of `trainer.distillation`: what a model learns from a teacher. Imports its siblings only."""

from dataclasses import dataclass, field

from vlm.config.choices import DIVERGENCES
from vlm.config.rules import above, at_least, choices, share


@dataclass
class DistillationConfig:
    """How a model is distilled (`trainer.objective=distillation`), see docs/distillation.md."""

    teacher: str | None = None
    """The teacher: a run's `final` folder, a model of a family, or a name on the Hub; its tokens have the same ids."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the Hub; null: the default branch."""
    divergence: str = field(default="forward", metadata=choices(DIVERGENCES))
    """How far the student is from the teacher at a supervised token: `forward`, KL(teacher | student), `reverse`,
    KL(student | teacher), or `jensen_shannon`, the mean of both to their mean."""
    label_weight: float = field(default=0.5, metadata=share())
    """Weight w of the loss of labels: `w loss + (1 - w) temperature^2 divergence`."""
    temperature: float = field(default=1.0, metadata=above(0))
    """What the logits of both are divided by before the divergence."""
    top_k: int = field(default=0, metadata=at_least(0))
    """Number of the teacher's most likely tokens that are computed once for each supervised token and kept on disk,
    with the mass of all others as one class; 0: the teacher runs in every step, and the whole vocabulary counts."""
    hidden_states_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the difference between the last hidden states of both at supervised tokens; 0: it is not computed."""
    image_features_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the difference between what the language models of both read of an image; 0: it is not computed."""
