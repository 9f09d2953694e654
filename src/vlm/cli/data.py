"""`vlm data TOOL …`: the tools for records, and the two that look at records as a run would train on them."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm.checks.compose import with_config
from vlm.checks.run import ConfigError
from vlm.config.schema import RunConfig


def main(words: Sequence[str]) -> None:
    """`vlm data TOOL …`."""
    if not words or words[0] not in TOOLS:
        listing = "\n".join(f"  {name:<10}{purpose}" for name, (purpose, _) in TOOLS.items())
        print(f"usage: vlm data TOOL …\n\n{listing}\n\nvlm data TOOL --help says more.")
        sys.exit(0 if list(words) in ([], ["--help"], ["-h"]) else f"vlm data {words[0]}: no such tool")
    tool = TOOLS[words[0]][1]
    if callable(tool):
        tool(words[1:])
    else:
        import_module(f"vlm.data.tools.{tool}").main(words[1:])


def show(words: Sequence[str]) -> None:
    """`vlm data show -cn RUN …`: records as the run would train on them."""
    parser = _make_run_parser("show", "Records as a run would train on them, supervised tokens marked.")
    parser.add_argument("--number", type=int, default=4, help="records of each source (%(default)s)")
    parser.add_argument("--records", type=_parse_numbers, default=[], metavar="N,N", help="the numbers of those wanted")
    parser.add_argument("--seed", type=int, default=None, help="draws them; without it, the first ones")
    parser.add_argument("--output", type=Path, default=Path("records.html"), help="the page (%(default)s)")
    args, rest = parser.parse_known_args(words)

    def action(config: RunConfig, name: str, overrides: list[str]) -> None:
        from vlm.data.tools.show import as_text, load_shown_records, write_page

        records = load_shown_records(
            config.dataset,
            _make_sample_encoder(config, overrides),
            number=args.number,
            records=args.records,
            seed=args.seed,
        )
        found = []
        for one in records:
            print(as_text(one, colours=sys.stdout.isatty()))
            found.append(one)
        write_page(found, args.output)
        print(f"With pictures: {args.output}")

    with_config(rest, action)


def stats(words: Sequence[str]) -> None:
    """`vlm data stats -cn RUN …`: what the run's records amount to."""
    parser = _make_run_parser(
        "stats", "What a run's records amount to: counts, lengths, sizes, what would be left out."
    )
    parser.add_argument("--output", type=Path, default=Path("stats.png"), help="the picture (%(default)s)")
    args, rest = parser.parse_known_args(words)

    def action(config: RunConfig, name: str, overrides: list[str]) -> None:
        from vlm.data.tools.stats import as_text, compute_stats, draw

        if config.dataset.streaming:
            raise ConfigError("dataset.streaming=true: a stream is not counted")
        found = compute_stats(config.dataset, _make_sample_encoder(config, overrides))
        print(as_text(found))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(found, args.output)
        print(f"As a picture: {args.output}")

    with_config(rest, action)


def _make_run_parser(tool: str, purpose: str) -> argparse.ArgumentParser:
    usage = f"vlm data {tool} [options] -cn RUN dataset.path=… [key=value …]"
    return argparse.ArgumentParser(f"vlm data {tool}", usage, purpose, allow_abbrev=False)


def _make_sample_encoder(config: RunConfig, overrides: list[str]) -> Any:
    """What encodes the samples of a run."""
    from vlm.assembly.settle import resolve_model
    from vlm.train.data import make_sample_encoder
    from vlm.train.heads.data import make_prompt_encoder

    model_config, processor = resolve_model(config, overrides)
    encoder_of = make_sample_encoder if config.model.head.task is None else make_prompt_encoder
    return encoder_of(config, model_config, processor)


def _parse_numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


TOOLS = {
    "download": ("fetch the pictures of a table of addresses and captions", "download"),
    "convert": ("between forms of records and kinds of files", "convert"),
    "clean": ("leave out pictures that do not open, duplicates, empty texts", "clean"),
    "stats": ("counts, token lengths and picture sizes of a run's data", stats),
    "show": ("records as a run trains on them, supervised tokens marked", show),
}
