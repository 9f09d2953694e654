"""`vlm check -cn RUN …`: what a run will do, before it is started; `--plan` on paper, without weights."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vlm.checks.compose import with_config
from vlm.checks.offline import check_offline
from vlm.cli.progress_note import tell
from vlm.clusters.world import take_world_from_scheduler
from vlm.config.schema import RunConfig
from vlm.config.shown import PresentableParser
from vlm.train.objectives.table import make_objective

if TYPE_CHECKING:
    from vlm.train.preflight.findings import Findings

DATA_KEYS = (
    "dataset.path=",
    "dataset.image_folder=",
    "dataset.eval_path=",
    "dataset.eval_image_folder=",
    "dataset.sources.",
)
"""How overrides begin that name records and images."""
EXAMPLES = (
    "vlm check -cn pretrain-smol dataset.path=captions.json dataset.image_folder=images",
    "vlm check --plan GPUS=8xH100 --samples 558128 -cn pretrain-llava",
)
REFUSED_STATUS = 1
"""The exit status where the run would not come to its end."""


def without_data(words: Sequence[str], folder: Path) -> list[str]:
    """Return the words of a run with a file of no records: a plan reads none, and the run's may be elsewhere."""
    records = folder / "records.json"
    records.write_text("[]", encoding="utf-8")
    kept = [word for word in words if not word.startswith(DATA_KEYS)]
    evaluates = any(word.startswith("dataset.eval_path=") for word in words)
    return [*kept, f"dataset.path={records}", *([f"dataset.eval_path={records}"] if evaluates else [])]


def make_parser() -> PresentableParser:
    """Return the parser of `vlm check`, which leaves the words of the run."""
    usage = "vlm check [options] -cn RUN dataset.path=… [key=value …]"
    purpose = "Show what a run will do, from a few steps that are thrown away: parts, data, memory, time, problems."
    parser = PresentableParser("vlm check", usage, purpose, examples=EXAMPLES, allow_abbrev=False)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page to write (default: outputs/preflight-RUN.html)"
    )
    parser.add_argument("--plan", metavar="GPUS=NxNAME", help="plan for these GPUs without loading weights")
    samples = "with --plan: number of training samples (default: those of the data set)"
    parser.add_argument("--samples", type=int, metavar="N", help=samples)
    tokens = "with --plan: mean number of tokens per sample, including image tokens"
    parser.add_argument("--tokens", type=int, metavar="N", help=tokens)
    share = "with --plan: assumed share of the GPUs' peak (default: %(default)s)"
    parser.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help=share)
    return parser


def main(words: Sequence[str]) -> None:
    """`vlm check [--output FILE] [--plan GPUS=NxNAME] -cn RUN …`."""
    args, rest = make_parser().parse_known_args(words)
    refused = False

    def action(config: RunConfig, name: str, overrides: list[str]) -> None:
        """Inspect the run on every rank; the first one prints the page, and writes it as HTML."""
        nonlocal refused
        check_offline(config)
        if args.plan is not None:
            from vlm.train.preflight.plan import make_plan

            options = {"samples": args.samples, "tokens": args.tokens, "mfu": args.mfu}
            print(make_plan(config, name, overrides, args.plan, **options))
            return
        from vlm.cli.train import without_deepspeed
        from vlm.train.distributed import close_process_group
        from vlm.train.preflight.inspect import inspect_run

        tell("Loading the model and the records, then a few steps that are thrown away")
        with nullcontext() if config.trainer.deepspeed else without_deepspeed():
            findings = inspect_run(config, name, overrides)
        if os.environ.get("RANK", "0") == "0":
            show(findings, args.output or Path("outputs", f"preflight-{name}.html"))
            refused = findings.is_refused
        close_process_group()

    take_world_from_scheduler()
    if args.plan is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(f"vlm check --plan {args.plan}: a plan needs one process; start it without a launcher")
    if args.plan is not None and args.samples and args.tokens:
        with TemporaryDirectory() as folder:
            with_config(without_data(rest, Path(folder)), action, make_objective)
    else:
        with_config(rest, action, make_objective, trains=args.plan is None)
    if refused:
        sys.exit(REFUSED_STATUS)


def show(findings: "Findings", file: Path) -> None:
    """Print the page of a preflight, and write it as HTML."""
    from vlm.train.preflight.report import as_html, as_text

    print(as_text(findings))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_html(findings), encoding="utf-8")
    print(f"\nWith images and plots: {file}")
