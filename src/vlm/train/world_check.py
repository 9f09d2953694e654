"""What every rank of a run must have in common: configuration, code, versions and data."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.data.stream import SampleStream
from vlm.train.distributed import all_gather_objects
from vlm.train.resume.record import digest_stream, package_digest, user_modules
from vlm.train.run_directory import package_versions

OWN_KEYS = ("dataset.cache_dir",)
"""Keys that may differ, such as for caches on each machine's own disk."""

MAX_DIFFERENCES = 5

DIGITS = 12
"""Number of hexadecimal digits of a digest that messages have."""


def check_same_setup(config: RunConfig) -> None:
    """Refuse a run whose ranks do not have the same configuration, code and versions; every rank calls it.

    Raises:
        ValueError: a rank differs from rank 0, and in what.
    """
    keys = {key: value for key, value in flatten(asdict(config)).items() if key not in OWN_KEYS}
    versions = {f"version of {name}": version for name, version in package_versions().items()}
    versions["version of python"] = platform.python_version()
    modules = {"vlm": package_digest(), **dict(user_modules(asdict(config)))}
    code = {f"code of {name} (SHA-256)": digest[:DIGITS] for name, digest in modules.items()}
    check_equal({**keys, **versions, **code}, "Start every rank with the same command, environment and code")


def check_same_data(records: Mapping[str, SampleDataset | SampleStream | None]) -> None:
    """Refuse a run whose ranks have not read the same data; every rank calls it.

    Raises:
        ValueError: a rank differs from rank 0, and in what.
    """
    facts = {}
    for role, dataset in records.items():
        if isinstance(dataset, SampleDataset):
            for source in dataset.contributions:
                values = asdict(source).items()
                facts |= {f"{role} data, {source.source}: {key}": value for key, value in values if key != "path"}
            facts[f"{role} data: samples"] = len(dataset)
        elif dataset is not None:  # of a stream the names and sizes of its files are known
            for source in dataset.sources:
                facts[f"{role} data, {source.name}: files"] = digest_stream(source.path)[:DIGITS]
    check_equal(facts, "Give every machine the same files, on a shared disk or as copies")


def check_equal(facts: Mapping[str, object], advice: str) -> None:
    """Refuse facts that are not the same on all ranks.

    Raises:
        ValueError: they are not; the same error on every rank.
    """
    difference = describe_difference(all_gather_objects(dict(facts)))
    if difference:
        raise ValueError(f"ranks do not agree: {difference}. {advice}.")


def describe_difference(facts: Sequence[Mapping[str, object]]) -> str:
    """Return which ranks differ from rank 0 and in what; empty where none does."""
    texts = []
    for key in dict.fromkeys(key for of_rank in facts for key in of_rank):
        values = [repr(of_rank.get(key)) for of_rank in facts]
        for value in dict.fromkeys(value for value in values if value != values[0]):
            ranks = [str(rank) for rank, other in enumerate(values) if other == value]
            texts.append(f"{key} is {value} on rank {', '.join(ranks)} and {values[0]} on rank 0")
    left = len(texts) - MAX_DIFFERENCES
    return "; ".join(texts[:MAX_DIFFERENCES]) + (f"; and {left} more" if left > 0 else "")


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested mappings by their dotted keys."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return flat
