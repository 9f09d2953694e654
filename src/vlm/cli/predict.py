"""The subcommand `vlm predict`: one prompt, or a file of records.

What imports torch is imported when the command has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vlm.cli.model_options import add_base_option
from vlm.cli.record_options import add_record_options, check_record_options, source_config


def make_parser() -> argparse.ArgumentParser:
    """What `vlm predict` takes."""
    purpose = "Ask a model with prediction heads: about one prompt, or about every record of a file."
    found = argparse.ArgumentParser("vlm predict", description=purpose)
    found.add_argument("checkpoint", help="a head run's folder `final`, or a name on the Hub")
    one = found.add_argument_group("one prompt")
    one.add_argument("--prompt", help="the question, as it was asked in training; <image> says where a picture stands")
    one.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    one.add_argument("--video", action="append", default=[], metavar="FILE", help="a video; may be repeated")
    add_record_options(found, "preds.csv or preds.jsonl")
    found.add_argument("--device", default=None, help="cuda, cpu …; a GPU where there is one")
    found.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add_base_option(found)
    found.add_argument("--trust-remote-code", action="store_true", help="let code out of the checkpoint run")
    return found


def main(argv: Sequence[str]) -> None:
    """`vlm predict CHECKPOINT --image F --prompt T`, or `--input RECORDS --output TABLE`."""
    args = make_parser().parse_args(argv)
    try:
        check_record_options(args)
        _predict_file(args) if args.input else _predict_one(args)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm predict: {error}")
    except KeyboardInterrupt:
        sys.exit("\nvlm predict: stopped; the same command goes on with it")


def _load_predictor(args: argparse.Namespace) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from vlm.inference.predict import Predictor

    disable_progress_bar()
    return Predictor.load(
        args.checkpoint, device=args.device, dtype=args.dtype, base=args.base, trust_remote_code=args.trust_remote_code
    )


def _predict_one(args: argparse.Namespace) -> None:
    """Print what each head says of a prompt, with a bar for each label."""
    from vlm.inference.generate import check_videos, load_images, user_turn

    images = load_images(args.image)
    check_videos(args.video, args.max_frames)
    user_turn(args.prompt, len(images), [()] * len(args.video))
    predictor = _load_predictor(args)
    found = predictor.predict(
        args.prompt, images, args.video, max_frames=args.max_frames, system_prompt=args.system_prompt
    )
    for name, said in (found if isinstance(found, dict) else {predictor.heads[0].name: found}).items():
        print(f"{name}: {said.prediction}" + (f"  (score {said.score:.4f})" if said.probabilities else ""))
        for label, chance in sorted(said.probabilities.items(), key=lambda one: -one[1])[:20]:
            print(f"  {chance:7.2%}  {'█' * round(30 * chance):<30}  {label}")


def _predict_file(args: argparse.Namespace) -> None:
    """Write a table, and print measures where the records have labels."""
    from vlm.assembly.adapter_base import fingerprint
    from vlm.assembly.adapter_folder import local_folder
    from vlm.data.cache import resolve_cache_folder
    from vlm.evaluation.predict_file import predict_file

    config = source_config(args)
    predictor = _load_predictor(args)
    found = predict_file(
        predictor, config, args.output, cache=resolve_cache_folder(None),
        fingerprint=fingerprint(local_folder(args.checkpoint)), batch_size=args.batch_size,
        num_workers=args.num_workers, max_frames=args.max_frames, overwrite=args.overwrite,
    )  # fmt: skip
    if found.metrics_text:
        print(found.metrics_text)
    bad = f"; {found.bad} could not be read, column error says why" if found.bad else ""
    print(f"{found.records:,} records: {args.output}{bad}")
