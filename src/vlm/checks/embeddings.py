"""What is wrong with a head that embeds (`model.head.task=embedding`) and with its data.

Imports the schema and the other checks' helpers only.
"""

from collections.abc import Iterator

from vlm.checks.feature_cache import UNUSED_LIMIT
from vlm.checks.fields import format_value
from vlm.checks.heads import VECTOR_TASK, before_after_problems, head_problems, single_head_problems
from vlm.config import choices
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.derived import embedding_row_keys, training_keys
from vlm.config.model_schema import HeadConfig
from vlm.config.schema import RunConfig


def problems_of_any_head(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the heads of a run, of either kind; a checkpoint's heads may be of the other kind."""
    yield from (embedding_problems if config.model.head.task == VECTOR_TASK else head_problems)(config)


def embedding_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of a run that trains embeddings."""
    head = config.model.head
    if head.task != VECTOR_TASK:
        yield (
            f"trainer.objective=embedding: model.head.task={head.task} does not make vectors; choose "
            "model/head=embedding"
        )
        return
    yield from single_head_problems("model.head", head)
    yield from _head_problems(head)
    for key in ("extra_heads", "generation_weight"):
        if value := getattr(head, key):
            text = ", ".join(value) if isinstance(value, dict) else value
            yield f"model.head.{key}={text}: an embedding head trains alone; leave it out"
    if head.weight != 1:
        yield f"model.head.weight={head.weight}: there is no other loss; leave it out"
    if not has_parameters(head) and not training_keys(config.trainer) and not embedding_row_keys(config):
        yield (
            f"model.head.type={head.type}: nothing trains in this head or in the model under it; train adapters "
            "(trainer.lora.language_model.r=16), a part (trainer.unfreeze), or choose model.head.type=linear"
        )
    yield from _loss_problems(head)
    yield from _data_problems(config.dataset)
    trainer = config.trainer
    if trainer.packing:
        yield "trainer.packing=true: embeddings cannot be packed; leave it out"
    if names := trainer.eval_metrics:
        yield f"trainer.eval_metrics={names}: embeddings have their own metrics; leave it out"
    yield from before_after_problems(config)
    for key in ("profile", "peak_tflops"):
        if value := getattr(trainer, key):
            setting = f"trainer.{key}={format_value(value)}"
            yield f"{setting}: runs that train heads are neither profiled nor counted; leave it out"


def has_parameters(head: HeadConfig) -> bool:
    """Return whether vectors depend on parameters of the head."""
    return head.type != "identity" or head.pooling == "attention"


def _head_problems(head: HeadConfig) -> Iterator[str]:
    """Yield what is wrong with the head that makes vectors."""
    if head.type == "identity" and head.dim is not None:
        yield (
            f"model.head.dim={head.dim}: model.head.type=identity keeps the width of hidden states; choose "
            "model.head.type=linear, or shorten vectors when you use them (model.head.loss_options.widths)"
        )
    for side, text in head.prompts.items():
        if side not in choices.PROMPTS:
            yield f"model.head.prompts.{side}={text}: allowed are {', '.join(choices.PROMPTS)}"
        elif text is not None and not isinstance(text, str):
            yield f"model.head.prompts.{side}={text}: a text is needed, or null"


def _loss_problems(head: HeadConfig) -> Iterator[str]:
    """Yield what is wrong with the values of the loss's options."""
    options, key = head.loss_options, "model.head.loss_options"
    temperature = options.get("temperature")
    if temperature is not None and not (_is_number(temperature) and temperature > 0):
        yield f"{key}.temperature={temperature}: a number above 0 is needed"
    for name in ("learned_temperature", "symmetric"):
        if (value := options.get(name)) is not None and not isinstance(value, bool):
            yield f"{key}.{name}={value}: true or false is needed"
    widths, weights = options.get("widths"), options.get("width_weights")
    if widths is not None:
        is_list = isinstance(widths, list) and widths and all(type(width) is int and width > 0 for width in widths)
        if not is_list or len(set(widths)) < len(widths):
            yield f"{key}.widths={widths}: a list of different whole numbers above 0 is needed, or null"
            return
        if head.dim is not None and max(widths) != head.dim:
            yield f"{key}.widths={widths}: the largest must be model.head.dim={head.dim}, the width of whole vectors"
    if weights is not None:
        fits = isinstance(weights, list) and all(map(_is_number, weights)) and len(weights) == len(widths or [0])
        if not fits or min(weights) <= 0:
            yield f"{key}.width_weights={weights}: a number above 0 for each of {key}.widths={widths} is needed"


def _data_problems(data: DatasetConfig) -> Iterator[str]:
    """Yield what is wrong with how records are read and held out."""
    if data.streaming:
        yield "dataset.streaming=true: records are counted and split before training; leave it out"
    if data.over_length in ("truncate", "split"):
        yield f"dataset.over_length={data.over_length}: records of embeddings are never cut; choose skip or error"
    if data.folds is not None:
        yield (
            f"dataset.folds={data.folds}: embeddings are evaluated on held-out records, not in folds; set "
            "dataset.eval_split"
        )
    if data.test_path is not None and data.test_split:
        yield "dataset.test_path and dataset.test_split: choose one"
    if data.test_image_folder is not None and data.test_path is None:
        yield f"dataset.test_image_folder={data.test_image_folder}: it has no effect without dataset.test_path"
    if data.cache_features:
        yield "dataset.cache_features=true: embeddings are computed in every step; leave it out"
    if data.cache_limit_gb is not None:
        yield f"dataset.cache_limit_gb={data.cache_limit_gb}: {UNUSED_LIMIT}"
    if data.supervise != "replies":
        yield f"dataset.supervise={data.supervise}: an embedding run supervises no tokens; leave it out"
    prompts = {"dataset": data.system_prompt}
    prompts |= {f"dataset.sources.{name}": source.system_prompt for name, source in data.sources.items()}
    for key, prompt in prompts.items():
        if prompt:
            yield (
                f"{key}.system_prompt={prompt:.40}: queries and documents have their own system prompts; set "
                "model.head.prompts.query or .document"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
