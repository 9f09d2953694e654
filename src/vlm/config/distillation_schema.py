"""The keys of `trainer.distillation`: how a model is trained on a teacher's predictions. Imports its siblings only."""

from dataclasses import dataclass, field

from vlm.config.choices import DIVERGENCES
from vlm.config.rules import above, at_least, choices, share


@dataclass
class DistillationConfig:
    """How a model is distilled (`trainer.objective=distillation`), see docs/distillation.md."""

    teacher: str | None = None
    """The teacher: a run's folder `final`, a model of a family, or a name on the Hub. Its tokens must have the same
    ids."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the Hub; null: the default branch."""
    divergence: str = field(default="forward", metadata=choices(DIVERGENCES))
    """Divergence between teacher and student at a supervised token: `forward`, KL(teacher | student); `reverse`,
    KL(student | teacher); or `jensen_shannon`, the mean of both relative to their mixture."""
    label_weight: float = field(default=0.5, metadata=share())
    """Weight w of the loss on labels: `w loss + (1 - w) temperature^2 divergence`."""
    temperature: float = field(default=1.0, metadata=above(0))
    """The logits of both models are divided by this before the divergence."""
    top_k: int = field(default=0, metadata=at_least(0))
    """Number of the teacher's most likely tokens to store for each supervised token, computed once, with the
    probability of all others as one class; 0: the teacher runs in every step, and the divergence covers the whole
    vocabulary."""
    hidden_states_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the difference between the last hidden states of both models at supervised tokens; 0: not computed."""
    image_features_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the difference between the image features that both language models read; 0: not computed."""
