"""The records of a run that learns vectors: those that train, those it is evaluated on, and those only measured on."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from vlm.assembly.heads import suffix_ids
from vlm.config.model_schema import HeadConfig
from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.holdout import split_off_eval
from vlm.data.overlap import check_overlap
from vlm.data.pairs.dataset import PairDataset
from vlm.data.pairs.encoder import PairEncoder
from vlm.data.processor import Processor
from vlm.data.sample import BadSample
from vlm.train.data import load_other_file, max_sample_length

DEFAULT_EVAL_SHARE = 0.2
"""Share of the records that is held out where nothing says how much."""


@dataclass
class EmbeddingData:
    """The records of a run.

    Attributes:
        train: the records that train.
        evaluation: those that evaluations are made on.
        test: those that are only measured on at the end; None: there are none.
    """

    train: PairDataset
    evaluation: PairDataset
    test: PairDataset | None

    def datasets_by_role(self) -> dict[str, SampleDataset]:
        """Return role -> records, for `data.json`."""
        datasets = {"train": self.train, "eval": self.evaluation, "test": self.test}
        return {role: dataset.dataset for role, dataset in datasets.items() if dataset is not None}


def make_pair_encoder(config: RunConfig, model_config: PreTrainedConfig, processor: Processor) -> PairEncoder:
    """Return what encodes the members of records."""
    prompts = resolve_prompts(config.model.head)
    return PairEncoder(
        processor,
        max_sample_length(config.dataset, model_config),
        truncate=False,
        suffix=suffix_ids(config.model, processor.tokenizer),
        query_prompt=prompts.get("query", ""),
        document_prompt=prompts.get("document", ""),
    )


def resolve_prompts(head: HeadConfig) -> dict[str, str]:
    """Return the system turns of a head's sides, without those that are empty."""
    return {side: str(text) for side, text in head.prompts.items() if text}


def load_pairs(config: RunConfig, encoder: PairEncoder, seed: int) -> EmbeddingData:
    """Read, check, count and divide the records.

    Raises:
        ValueError: a record cannot be used, or there are too few to hold some out.
    """
    data = config.dataset
    loaded = {"train": load_dataset(data, encoder, seed=seed)}
    for role, path, folder, share, max_samples in (
        ("test", data.test_path, data.test_image_folder, data.test_split, None),
        ("eval", data.eval_path, data.eval_image_folder, data.eval_split, data.max_eval_samples),
    ):
        if path is not None:
            loaded[role] = load_other_file(data, encoder, path, folder, max_samples)
        elif share or role == "eval":
            loaded["train"], held_out = split_off_eval(loaded["train"], share or DEFAULT_EVAL_SHARE, seed)
            loaded[role] = held_out.subset(range(len(held_out))[:max_samples])
    for role in loaded.keys() - {"train"}:
        check_overlap(data, loaded["train"], loaded[role])
    pairs = {role: PairDataset(dataset) for role, dataset in loaded.items()}
    _check_two_documents(pairs["eval"])
    return EmbeddingData(pairs["train"], pairs["eval"], pairs.get("test"))


def _check_two_documents(dataset: PairDataset) -> None:
    """Raise ValueError where evaluation records are too few to rank anything."""
    if len(dataset) < 2:
        raise ValueError(
            f"embeddings are evaluated by the rank of each query's own document, which needs at least 2 evaluation "
            f"records, got {len(dataset)}; give more (dataset.eval_split or dataset.eval_path)"
        )
    try:
        dataset.members(0)
    except BadSample as error:
        raise ValueError(str(error)) from error
