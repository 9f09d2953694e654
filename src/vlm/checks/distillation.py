"""Checks `trainer.distillation` and the settings that do not work with it; imports the schema only."""

from collections.abc import Iterator

from vlm.checks.checkpoint import checkpoint_problem
from vlm.config.schema import RunConfig

KEY = "trainer.distillation"

STATE_WEIGHTS = ("hidden_states_weight", "image_features_weight")
"""The keys of targets besides logits."""


def distillation_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of a distillation run."""
    options, data = config.trainer.distillation, config.dataset
    if not options.teacher:
        yield f"{KEY}.teacher=null: name the checkpoint to distil, such as outputs/…/final"
        return
    if problem := checkpoint_problem(options.teacher, f"{KEY}.teacher"):
        yield problem
    weights = [name for name in STATE_WEIGHTS if getattr(options, name)]
    if options.label_weight == 1 and not weights:
        yield (
            f"{KEY}.label_weight=1: the teacher would have no effect; lower it, or choose trainer.objective=generation"
        )
    if options.top_k:
        yield from _cache_problems(config, weights)
    elif data.cache_features:
        yield (
            f"dataset.cache_features=true with {KEY}.top_k=0: the teacher reads images in every step; cache its logits "
            f"with {KEY}.top_k=64, or leave dataset.cache_features out"
        )
    rate = config.trainer.learning_rate.connector_learning_rate
    if weights and (rate is None or rate <= 0):
        yield (
            f"{KEY}.{weights[0]}: a matrix that maps states of different widths trains at the connector's learning "
            "rate; set trainer.learning_rate.connector_learning_rate"
        )


def _cache_problems(config: RunConfig, weights: list[str]) -> Iterator[str]:
    """Yield what is wrong with the settings of a run that caches its teacher's logits."""
    key = f"{KEY}.top_k={config.trainer.distillation.top_k}"
    if weights:
        yield f"{key}: states of the teacher are not cached; set {KEY}.{weights[0]}=0, or {KEY}.top_k=0"
    if config.dataset.streaming:
        yield f"{key} with dataset.streaming=true: its records are not known in advance; set {KEY}.top_k=0"
