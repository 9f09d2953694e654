"""What is wrong with `dataset.cache_features` of a run without prediction heads, in words; imports the schema only."""

from collections.abc import Iterator

from vlm.config.derived import training_keys
from vlm.config.schema import RunConfig


def cache_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with keeping features of pictures."""
    data = config.dataset
    limit = f"dataset.cache_limit_gb={data.cache_limit_gb}"
    if data.cache_limit_gb is not None and (config.model.head.task is not None or not data.cache_features):
        yield f"{limit}: nothing comes of it without dataset.cache_features=true, in a run without prediction heads"
    elif data.cache_limit_gb is not None and data.cache_limit_gb <= 0:
        yield f"{limit}: a number above 0 is needed, or null for half of the free disk"
    if config.model.head.task is not None or not data.cache_features:
        return
    key = "dataset.cache_features=true: features of pictures are computed once, but"
    if (trains := training_keys(config.trainer).get("visual_encoder")) is not None:
        yield f"{key} {trains} changes them with every step; choose one of the two"
    if data.streaming:
        yield f"{key} dataset.streaming=true does not know its pictures beforehand; choose one of the two"
    if config.model.hf_name is not None:
        yield f"{key} model.hf_name={config.model.hf_name} is a whole model, which reads pictures itself; leave it out"
