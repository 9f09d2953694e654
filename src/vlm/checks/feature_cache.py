"""What is wrong with `dataset.cache_features` of a run without prediction heads; imports the schema only."""

from collections.abc import Iterator

from vlm.config.derived import training_keys
from vlm.config.schema import RunConfig

UNUSED_LIMIT = "it has no effect without dataset.cache_features=true, in a run without prediction heads"


def cache_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with a cache of the features of images."""
    data = config.dataset
    if data.cache_limit_gb is not None and not data.cache_features:
        yield f"dataset.cache_limit_gb={data.cache_limit_gb}: {UNUSED_LIMIT}"
    if not data.cache_features:
        return
    key = "dataset.cache_features=true: features of images are computed once, but"
    if (trains := training_keys(config.trainer).get("visual_encoder")) is not None:
        yield f"{key} {trains} changes them with every step; choose one of the two"
    if data.streaming:
        yield f"{key} the images of a stream are not known in advance (dataset.streaming=true); choose one of the two"
    if config.model.hf_name is not None and config.trainer.sharding is not None:
        yield f"{key} not for a whole model with trainer.sharding={config.trainer.sharding}; choose one of the two"
