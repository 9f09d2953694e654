"""`vlm data stats`: statistics of a run's records, as a table and a plot. Counts are cached, see `token_counts`."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import draw_records
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.sample import BadSample, group_reasons
from vlm.data.sources import Source, make_sources
from vlm.data.token_counts import Counts, count
from vlm.data.tools.show import count_unlearned_replies, describe_features


@dataclass(frozen=True)
class SourceStats:
    """The counts of a source's records, the most tokens that a sample may have, and whether longer ones are cut.

    `reading` counts what the records hold that is not learned.
    """

    name: str
    counts: Counts
    longest: int
    truncate: bool
    reading: "ReadingStats"

    @property
    def usable_mask(self) -> np.ndarray:
        """`(records,)`: whether each record can be used; one that is too long counts as usable."""
        return self.counts.length > 0

    def summary(self) -> dict[str, int | list[int] | dict[str, int]]:
        """Compute the figures."""
        counts, good = self.counts, self.usable_mask
        length = counts.length[good]
        over, fixed = length > self.longest, counts.needed[good] > self.longest
        quantiles = np.quantile(length, (0.5, 0.9, 0.99)).tolist() if good.any() else [0, 0, 0]
        labels = Counter(label for label in counts.labels.to_pylist() if label is not None)
        reasons = group_reasons(counts.problems.values())[:10]
        too_long = {
            f"longer than {self.longest} tokens": int(over.sum()),
            "of them left out": int(fixed.sum()) if self.truncate else int(over.sum()),
        }
        return {
            "records": len(good),
            "usable": int(good.sum()),
            "with images": int((counts.images[good] > 0).sum()),
            "images": int(counts.images[good].sum()),
            "single-colour images, of those decoded": int(counts.uniform[good].sum()),
            "replies": int(counts.replies[good].sum()),
            "tokens": int(length.sum()),
            "supervised tokens": int(counts.supervised[good].sum()),
            "tokens per record (median, 90%, 99%, max)": [*map(round, quantiles), int(length.max(initial=0))],
            **(too_long if self.longest < NO_LIMIT else {}),
            "most common labels of a head": dict(labels.most_common(20)),
            "cannot be used, by reason": dict(reasons),
            **self.reading.summary(len(good)),
        }


@dataclass(frozen=True)
class ReadingStats:
    """What records hold in addition to replies that are trained on.

    Attributes:
        records: the number of records that were looked at.
        keys: keys that are not read -> number of records.
        replies: number of replies that are not learned.
        features: what `describe_features` names -> number of records.
    """

    records: int
    keys: Counter[str]
    replies: int
    features: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, source: Source, records: np.ndarray) -> Self:
        """Look at records of a source, evenly spread over it where there are many."""
        places = np.unique(np.linspace(0, len(records) - 1, min(len(records), READ_RECORDS)).astype(int))
        keys: Counter[str] = Counter()
        replies, features = 0, Counter[str]()
        for number in records[places].tolist():
            try:
                record = source.records[number]
                keys.update(source.unread_keys(record))
                sample = source.parse(record)
                replies += count_unlearned_replies(sample)
                features.update(describe_features(sample))
            except BadSample:  # counted already, with its reason
                continue
        return cls(len(places), keys, replies, features)

    def summary(self, total: int) -> dict[str, int | list[int] | dict[str, int]]:
        """Return the figures of `SourceStats.summary`, of `total` records."""
        of = f", of {self.records:,} records" if self.records < total else ""
        return {
            f"replies that are not trained on (blank, weight 0, loss false){of}": self.replies,
            f"records with{of}": dict(self.features.most_common()),
            f"keys that are not read{of}": dict(self.keys.most_common(20)),
        }


READ_RECORDS = 10_000
"""The largest number of records whose keys are looked at."""


def compute_stats(config: DatasetConfig, encoder: SampleEncoder, seed: int = 0) -> list[SourceStats]:
    """Compute the statistics of each source of a run; records that cannot be used are counted, not refused."""
    sources = []
    for source in make_sources(config, encoder):
        records = draw_records(len(source), source.config.max_samples, seed)
        counts = count(source, records, config.check_samples, config.num_workers)
        reading = ReadingStats.of(source, records)
        sources.append(SourceStats(source.name, counts, encoder.longest, encoder.truncate, reading))
    return sources


def as_text(sources: list[SourceStats]) -> str:
    """Format the figures for a terminal."""
    lines = []
    for stats in sources:
        figures: list[tuple[str, str]] = []
        counters = []
        shown = stats.summary()
        if not stats.usable_mask.any():  # what is counted of usable records would be a column of zeros
            shown = {
                name: value
                for name, value in shown.items()
                if name in ("records", "usable") or (value and isinstance(value, dict))
            }
        for name, value in shown.items():
            if not isinstance(value, dict):
                numbers = [value] if isinstance(value, int) else value
                figures.append((name, ", ".join(f"{number:,}" for number in numbers)))
            elif value:
                rows = [(f"{number:,}", reason) for reason, number in value.items()]
                counters += [f"  {name}:", _plain_table(rows, ("right", "left"))]
        lines += [f"── {stats.name}", _plain_table(figures, ("left", "right")), *counters]
    return "\n".join(lines)


def _plain_table(rows: list[tuple[str, str]], alignment: tuple[str, str]) -> str:
    return indent(tabulate(rows, tablefmt="plain", colalign=alignment, disable_numparse=True), "  ")


def draw(sources: list[SourceStats], path: Path) -> None:
    """Plot token lengths with the limit, replies, supervised tokens and image sizes to a PNG."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (lengths, replies), (supervised, sizes) = figure.subplots(2, 2)
    names = [stats.name for stats in sources]
    for axes, title, column in (
        (lengths, "tokens per record, image tokens included", "length"),
        (supervised, "supervised tokens per record", "supervised"),
    ):
        values, top = _usable_values(sources, column)
        axes.hist(values, bins=np.linspace(0, top + 1, min(top + 2, 60)), stacked=True, label=names)
        axes.set(xlabel=title, ylabel="records")
    longest = max(stats.longest for stats in sources)
    if longest <= 1.5 * lengths.get_xlim()[1]:
        lengths.axvline(longest, color="black", linestyle="--", label=f"dataset.max_length: {longest}")
    lengths.legend()
    turns, max_turns = _usable_values(sources, "replies")
    bins = np.arange(max_turns + 1) + 0.5 if max_turns < 60 else 60
    replies.hist(turns, bins=bins, stacked=True, label=names, rwidth=0.8)
    replies.set(xlabel="replies per record", ylabel="records")
    replies.xaxis.set_major_locator(MaxNLocator(integer=True))
    replies.set_xlim(left=0)
    _plot_image_sizes(sources, sizes)
    figure.savefig(path, dpi=110)


def _usable_values(sources: list[SourceStats], field: str) -> tuple[list[np.ndarray], int]:
    """Return a count of all records of each source that can be used, and the largest, at least 1."""
    values = [getattr(stats.counts, field)[stats.usable_mask] for stats in sources]
    return values, max((int(numbers.max(initial=1)) for numbers in values), default=1)


def _plot_image_sizes(sources: list[SourceStats], axes: Axes) -> None:
    """Plot width and height of first images; of many, a random selection."""
    generator = np.random.default_rng(0)
    for stats in sources:
        places = np.flatnonzero(stats.counts.width > 0)
        if len(places) > 5000:
            places = generator.choice(places, 5000, replace=False)
        axes.scatter(stats.counts.width[places], stats.counts.height[places], s=8, alpha=0.3, label=stats.name)
    axes.margins(0.1)
    axes.set(xlabel="width of the first image, pixels", ylabel="height, pixels", xlim=(0, None), ylim=(0, None))
