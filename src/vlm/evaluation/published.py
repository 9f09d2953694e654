"""Published results of LLaVA-1.5 7B, to compare scores of lmms-eval's tasks with. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """Results of LLaVA-1.5 7B on a task.

    Attributes:
        task: lmms-eval's name of the task.
        metric: lmms-eval's name of the metric.
        reproduced: the result with this framework's recipe.
        original: the result with the published weights.
    """

    task: str
    metric: str
    reproduced: float
    original: float


PUBLISHED_RESULTS = (
    PublishedResult("gqa", "exact_match", 0.6201, 0.6192),
    PublishedResult("mme", "mme_perception_score", 1505.5, 1509.1),
    PublishedResult("mme", "mme_cognition_score", 321.4, 355.7),
    PublishedResult("mmbench_en_dev", "gpt_eval_score", 66.07, 64.09),
    PublishedResult("mmbench_cn_dev", "gpt_eval_score", 54.90, 55.67),
    PublishedResult("scienceqa", "exact_match", 0.6977, 0.6572),
    PublishedResult("seedbench", "seed_image", 0.6593, 0.6616),
    PublishedResult("textvqa_val", "exact_match", 0.4902, 0.4600),
    PublishedResult("mmmu_val", "mmmu_acc", 0.3789, 0.3611),
    PublishedResult("ai2d", "exact_match", 0.5379, 0.5518),
)


def published(task: str, metric: str) -> PublishedResult | None:
    """Return the published results of a metric of a task, if there are any."""
    return next((row for row in PUBLISHED_RESULTS if (row.task, row.metric) == (task, metric)), None)
