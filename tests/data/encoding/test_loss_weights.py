"""Weights of losses by pattern and by source: which tokens have them."""

import json
from pathlib import Path

import pytest

from tests.fixtures import compose_config
from tests.tiny_parts import Parts
from vlm.checks.fields import ConfigError
from vlm.checks.run import check
from vlm.config.dataset_schema import DatasetConfig, MixtureSourceConfig
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.loss_weights import LossWeights
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.sample import Sample, Turn
from vlm.data.sources import make_sources
from vlm.train.objectives.table import make_objective

SAMPLE = Sample(
    "x",
    (
        Turn("user", ("is <a>1</a> it?",)), Turn("assistant", ("thus <a>7</a>.",)),
        Turn("user", ("sure?",)), Turn("assistant", ("<a>8</a>",), weight=3.0),
    ),
)  # fmt: skip


def weights_by_text(encoder: SampleEncoder, sample: Sample) -> list[tuple[str, float]]:
    """Neighbouring supervised tokens of the same weight as texts."""
    encoded = encoder.encode(sample)
    weights = encoded.weights or [1.0] * len(encoded.labels)
    assert all(weight == 1 for label, weight in zip(encoded.labels, weights, strict=True) if label == IGNORE_INDEX)
    runs: list[tuple[list[int], float]] = []
    last = -2
    for place, (label, weight) in enumerate(zip(encoded.labels, weights, strict=True)):
        if label == IGNORE_INDEX:
            continue
        if place == last + 1 and runs[-1][1] == weight:
            runs[-1][0].append(label)
        else:
            runs.append(([label], weight))
        last = place
    decode = encoder.processor.tokenizer.decode
    return [(str(decode(ids, skip_special_tokens=True)), weight) for ids, weight in runs]


def test_tokens_of_a_match_have_its_factor_and_those_of_prompts_none(parts: Parts):
    factors = LossWeights(0.5, (("<a>.*?</a>", 4.0), ("[78]", 10.0)))
    encoder = SampleEncoder(parts.processor(), NO_LIMIT, truncate=False, factors=factors)
    found = [(text.strip(), weight) for text, weight in weights_by_text(encoder, SAMPLE)]
    assert [pair for pair in found if pair[0]] == [
        ("thus", 0.5), ("<a>", 2.0), ("7", 5.0), ("</a>", 2.0), (".", 0.5),
        ("<a>", 6.0), ("8", 15.0), ("</a>", 6.0),
    ]  # fmt: skip
    plain = SampleEncoder(parts.processor(), NO_LIMIT, truncate=False)
    assert plain.encode(Sample("x", SAMPLE.turns[:2])).weights is None


def test_each_source_has_its_own_factor(parts: Parts, tmp_path: Path):
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": name, "conversations": turns}]))
    sources = {name: MixtureSourceConfig(path=str(tmp_path / f"{name}.json")) for name in ("one", "two")}
    sources["two"].loss_weight = 0.25
    config = DatasetConfig(sources=sources, cache_dir=str(tmp_path / "cache"), loss_patterns={"b": 8.0})
    factors = LossWeights.make(1.0, config.loss_patterns)
    made = make_sources(config, SampleEncoder(parts.processor(), NO_LIMIT, truncate=False, factors=factors))
    weights = [weights_by_text(source.encoder, source.sample(0))[0][1] for source in made]
    assert weights == [8.0, 2.0]


@pytest.mark.parametrize(
    ("run", "patterns", "message"),
    [
        ("finetune-smol", {"a": 0}, r"loss_patterns\.a=0: a number above 0 is needed"),
        ("finetune-smol", {"(": 2}, r"\( is not a regular expression"),
        ("embed-smol", {"a": 2}, "does not weight losses"),
    ],
)
def test_what_weighs_nothing_is_refused(common: list[str], run: str, patterns: dict[str, float], message: str):
    config = compose_config(run, common)
    config.dataset.loss_patterns = patterns
    with pytest.raises(ConfigError, match=message):
        check(config, make_objective(config))
