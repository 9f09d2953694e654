"""What is wrong with prediction heads (`model.head`) and with the data that they train and are evaluated on.

Imports the schema and the other checks' helpers only.
"""

from collections.abc import Iterator, Mapping, Sequence

from vlm.checks.fields import format_value
from vlm.config import choices
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.derived import caches_features, embedding_row_keys, find_body_changes, head_key, training_keys
from vlm.config.model_schema import HeadConfig, HeadsConfig
from vlm.config.schema import RunConfig

VECTOR_TASK = "embedding"
"""The task whose outputs are a vector; it has an objective of its own."""


def head_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the heads of a run."""
    head = config.model.head
    if head.name in head.extra_heads:
        yield f"model.head.extra_heads.{head.name}: the first head has that name (model.head.name)"
    for name, settings in head.by_name.items():
        key = head_key(head, name)
        if not name.isidentifier():
            yield f"{key}: {name!r} is not a head's name; use letters, digits and _"
        yield from single_head_problems(key, settings)
        if settings.task == VECTOR_TASK:
            yield f"{key}.task={VECTOR_TASK}: it trains alone, with trainer.objective=embedding; leave it out"
    if head.weight != 1 and not head.extra_heads and not head.generation_weight:
        yield f"model.head.weight={head.weight}: there is no other loss; leave it out"
    for key in ("profile", "peak_tflops"):
        if value := getattr(config.trainer, key):
            setting = f"trainer.{key}={format_value(value)}"
            yield f"{setting}: runs that train heads are neither profiled nor counted; leave it out"
    yield from before_after_problems(config)
    yield from _generation_problems(config)
    yield from _data_problems(config)


def before_after_problems(config: RunConfig) -> Iterator[str]:
    """Yield `trainer.before_after`, which compares answers, if a run trains heads."""
    if config.trainer.before_after:
        yield "trainer.before_after=true: it compares answers, and this run trains a head; leave it out"


def _generation_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of a run that trains on replies together with its heads."""
    head = config.model.head
    if not head.generation_weight:
        return
    key = f"model.head.generation_weight={head.generation_weight}"
    if any(settings.pooling == "query" for settings in head.by_name.values()):
        behind = "pooling=query puts a token after the prompt, where the reply would begin"
        yield f"{key}: {behind}; choose another pooling"
    if not training_keys(config.trainer) and not embedding_row_keys(config):
        yield (
            f"{key}: no part that generates replies trains; unfreeze one (trainer.unfreeze), or train an adapter "
            "(trainer.lora)"
        )


def unused_head_problems(config: RunConfig) -> Iterator[str]:
    """Yield the keys of heads that a run without heads sets."""
    for key in ("test_path", "test_image_folder", "test_split", "folds"):
        if (value := getattr(config.dataset, key)) != getattr(DatasetConfig, key):
            yield f"dataset.{key}={format_value(value)}: it needs a prediction head, such as model/head=binary"
    for key, default in vars(HeadsConfig()).items():
        if (value := getattr(config.model.head, key)) != default:
            text = ", ".join(value) if key == "extra_heads" else format_value(value)
            yield f"model.head.{key}={text}: there is no head; choose one, such as model/head=binary"


def single_head_problems(key: str, head: HeadConfig) -> Iterator[str]:
    """Yield what is wrong with one head."""
    task = head.task
    if task is None:
        yield f"{key}.task=null: allowed are {', '.join(choices.LOSSES)}"
        return
    if (head.pooling == "token") != (head.token is not None):
        yield f"{key}.pooling={head.pooling}, {key}.token={head.token}: each needs the other"
    if task != VECTOR_TASK and head.type == "identity":
        yield (
            f"{key}.type=identity: hidden states are not scores; choose linear or mlp (identity is for "
            f"task={VECTOR_TASK})"
        )
    if task != VECTOR_TASK and (head.dim is not None or head.prompts):
        yield f"{key}.dim={head.dim}, {key}.prompts={head.prompts}: these are for task={VECTOR_TASK}; leave them out"
    losses = choices.LOSSES[task]
    if head.loss is not None and head.loss not in losses:
        yield f"{key}.loss={head.loss}: for task={task} allowed are {', '.join(losses)}"
    if head.type in choices.HEAD_TYPES:
        yield from _unknown_options(f"{key}.options", head.options, choices.HEAD_TYPES[head.type], head.type)
    loss = head.loss or losses[0]
    yield from _unknown_options(f"{key}.loss_options", head.loss_options, choices.LOSS_OPTIONS.get(loss, ()), loss)
    if task not in choices.TASKS_WITH_THRESHOLD and head.threshold_by != HeadConfig.threshold_by:
        yield f"{key}.threshold_by={head.threshold_by}: task={task} has no threshold; leave it out"
    yield from _label_problems(key, task, head)


def _label_problems(key: str, task: str, head: HeadConfig) -> Iterator[str]:
    """Yield what is wrong with a head's labels and their weights."""
    labels, weights = head.labels, head.class_weights
    if isinstance(labels, list) and len(labels) < (1 if task == "multilabel" else 2):
        yield f"{key}.labels={labels}: at least two are needed, or null for those of the training records"
    if task == "binary" and labels is not None and len(labels) != 2:
        yield f"{key}.labels={labels}: task=binary needs two, the negative and the positive one"
    if task not in choices.CLASSIFICATION_TASKS:
        smoothing = head.label_smoothing or None
        for name, value in (("labels", labels), ("class_weights", weights), ("label_smoothing", smoothing)):
            if value is not None:
                yield f"{key}.{name}={value}: task={task} has no labels to choose among"
    elif not (weights in (None, "balanced") or _is_list_of_positive_numbers(weights)):
        yield f"{key}.class_weights={weights}: balanced, a list of numbers above 0, or null is needed"
    elif isinstance(weights, list) and labels is not None and len(weights) != len(labels):
        yield f"{key}.class_weights={weights}: one for each of {len(labels)} labels is needed"


def _unknown_options(key: str, options: Mapping[str, object], allowed: Sequence[str], owner: str) -> Iterator[str]:
    """Yield the options that their owner, a head or a loss, does not have."""
    for name, value in options.items():
        if value is not None and name not in allowed:
            yield f"{key}.{name}={value}: {owner} does not take it; allowed are {', '.join(allowed) or 'none'}"


def _is_list_of_positive_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) in (int, float) and number > 0 for number in value)


def _data_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with holding out and caching a head's records."""
    data = config.dataset
    if data.streaming:
        yield "dataset.streaming=true: records are counted and split before a head trains; leave it out"
    if data.over_length in ("truncate", "split"):
        problem = "a head reads the end of a prompt, so prompts are never cut; choose skip or error"
        yield f"dataset.over_length={data.over_length}: {problem}"
    if data.test_path is not None and data.test_split:
        yield "dataset.test_path and dataset.test_split: choose one"
    if data.test_image_folder is not None and data.test_path is None:
        yield f"dataset.test_image_folder={data.test_image_folder}: it has no effect without dataset.test_path"
    if data.eval_split == 0 and data.eval_path is None and data.folds is None:
        yield (
            f"dataset.eval_split={data.eval_split}: temperature and threshold are chosen on evaluation records; set it "
            "above 0, or give dataset.eval_path or dataset.folds"
        )
    if data.folds is not None:
        for key in ("eval_path", "eval_split", "max_eval_samples"):
            if value := getattr(data, key):
                yield f"dataset.folds={data.folds} and dataset.{key}={value}: choose one"
    strategy = config.trainer.train_sampling_strategy
    if caches_features(config) and strategy in choices.GROUPED_STRATEGIES:
        yield (
            f"trainer.train_sampling_strategy={strategy}: hidden states are computed once in this run, so there is "
            "nothing to group; choose random, or dataset.cache_features=false"
        )
    if (data.cache_features or data.folds is not None) and not caches_features(config):
        reason = "dataset.cache_features=true" if data.folds is None else f"dataset.folds={data.folds}"
        sharding = "trainer.deepspeed=zero3" if config.trainer.sharding is None else "trainer.sharding=fsdp2"
        obstacle = "dataset.cache_features=false" if data.cache_features is False else sharding
        obstacle = next(find_body_changes(config), obstacle)
        yield f"{reason}: hidden states are computed once, but {obstacle} does not allow that"
