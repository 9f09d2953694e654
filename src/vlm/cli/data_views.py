"""`vlm data show` and `vlm data stats`: records as a run would train on them. Imports Hydra."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.checks.compose import with_config
from vlm.checks.fields import ConfigError
from vlm.checks.offline import check_offline
from vlm.cli.progress_note import tell
from vlm.config.schema import RunConfig
from vlm.config.shown import PresentableParser, printable
from vlm.train.objectives.table import make_objective

if TYPE_CHECKING:
    from vlm.data.encoding.sample_encoder import SampleEncoder

SHOW_EXAMPLES = (
    "vlm data show -cn finetune-smol dataset.path=train.json dataset.image_folder=images",
    "vlm data show -cn finetune-smol dataset.path=train.json --records 3,17 --output records.html",
    "vlm data show -cn finetune-smol dataset.path=train.json --html gallery.html --number 500",
)
STATS_EXAMPLES = (
    "vlm data stats -cn finetune-smol dataset.path=train.json dataset.image_folder=images",
    "vlm data stats -cn finetune-smol dataset.path=train.json dataset.eval_path=val.json trainer.eval_strategy=epoch",
)
GALLERY_RECORDS = 500
"""Records of each source on a gallery, unless `--number` says otherwise."""
OPENING = "Opening the model's tokenizer and processor, and the records"


def show(words: Sequence[str]) -> None:
    """`vlm data show -cn RUN …`: records as the run would train on them."""
    purpose = "Show records as a run would train on them, with supervised tokens marked."
    parser = _make_run_parser("show", purpose, SHOW_EXAMPLES)
    amount = f"records of each source (default: 4, in a gallery {GALLERY_RECORDS})"
    parser.add_argument("--number", type=int, metavar="N", help=amount)
    numbers = "show the records with these numbers"
    parser.add_argument("--records", type=_parse_numbers, default=[], metavar="N,N", help=numbers)
    parser.add_argument("--seed", type=int, help="choose records at random with this seed (default: the first records)")
    parser.add_argument(
        "--output", type=Path, default=Path("records.html"), help="page to write (default: %(default)s)"
    )
    gallery = "write a gallery page instead, with hundreds of records to search, filter and sort"
    parser.add_argument("--html", type=Path, metavar="PAGE", help=gallery)
    args, rest = parser.parse_known_args(words)

    def action(config: RunConfig, name: str, overrides: list[str]) -> None:
        """Print records with their labels, and write them to a page; or write a gallery."""
        check_offline(config)
        from vlm.assembly.processor_options import describe_processor
        from vlm.data.tools.show import as_text, load_shown_records, write_page

        tell(OPENING)
        encoder = _make_sample_encoder(config, overrides)
        described = describe_processor(encoder.processor)
        print(printable(described))
        if args.html is not None:
            _write_gallery(config, encoder, described, args)
            return
        number = 4 if args.number is None else args.number
        records = load_shown_records(config.dataset, encoder, number=number, records=args.records, seed=args.seed)
        shown = []
        for record in records:
            print(as_text(record, colours=sys.stdout.isatty()))
            shown.append(record)
        if shown and all(record.problem for record in shown):
            sys.exit("vlm data show: none of these records can be used")
        write_page(shown, args.output, described)
        print(f"{'With images' if any(record.images for record in shown) else 'As a page'}: {args.output}")

    with_config(rest, action, make_objective)


def _write_gallery(config: RunConfig, encoder: "SampleEncoder", processor: str, args: argparse.Namespace) -> None:
    """Write the gallery that `vlm data show --html` asks for, and print what is on it."""
    from tqdm import tqdm

    from vlm.data.tools.gallery import write_gallery
    from vlm.data.tools.show import load_shown_records

    number = GALLERY_RECORDS if args.number is None else args.number
    options = {"number": number, "records": args.records, "seed": args.seed}
    records = load_shown_records(config.dataset, encoder, **options, with_views=False)
    gallery = write_gallery(tqdm(records, "records", unit="record", disable=None), args.html, processor)
    print(f"{gallery}\nOpen {args.html} in a browser.")


def stats(words: Sequence[str]) -> None:
    """`vlm data stats -cn RUN …`: counts, lengths and sizes of a run's records."""
    purpose = "Count a run's records, tokens and images, say what would be left out, and look for copies."
    parser = _make_run_parser("stats", purpose, STATS_EXAMPLES)
    parser.add_argument("--output", type=Path, default=Path("stats.png"), help="plot to write (default: %(default)s)")
    copies = (
        "look for copies among N records of each source, and of evaluation records (default: %(default)s; 0: do not)"
    )
    parser.add_argument("--compare", type=int, default=2000, metavar="N", help=copies)
    args, rest = parser.parse_known_args(words)

    def action(config: RunConfig, name: str, overrides: list[str]) -> None:
        """Print the statistics of a run's records, and draw them."""
        check_offline(config)
        from vlm.data.tools.copies import describe_copies
        from vlm.data.tools.stats import as_text, compute_stats, draw

        if config.dataset.streaming:
            raise ConfigError(
                "dataset.streaming=true: a stream has no length, so it cannot be counted; set dataset.streaming=false"
            )
        tell(OPENING)
        encoder = _make_sample_encoder(config, overrides)
        statistics = compute_stats(config.dataset, encoder)
        print(printable(as_text(statistics)))
        if not any(stats.usable_mask.any() for stats in statistics):
            sys.exit("vlm data stats: none of the records can be used")
        if args.compare > 0:
            print(printable(describe_copies(config.dataset, encoder, args.compare)))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(statistics, args.output)
        print(f"Plot: {args.output}")

    with_config(rest, action, make_objective)


def _make_run_parser(tool: str, purpose: str, examples: Sequence[str]) -> PresentableParser:
    usage = f"vlm data {tool} [options] -cn RUN dataset.path=… [key=value …]"
    return PresentableParser(f"vlm data {tool}", usage, purpose, examples=examples, allow_abbrev=False)


def _make_sample_encoder(config: RunConfig, overrides: list[str]) -> "SampleEncoder":
    from vlm.assembly.resolve import resolve_model

    return make_objective(config).make_encoder(*resolve_model(config, overrides))


def _parse_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
