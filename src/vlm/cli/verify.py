"""`vlm verify CHECKPOINT --with ENGINE`: is what is served what was trained?

Modules that import torch are imported when the command has been understood.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vlm.checks.checkpoint import check_checkpoint
from vlm.cli.model_options import add_loading_options
from vlm.cli.record_options import add_reading_options, check_reading_options, source_config
from vlm.config.shown import PresentableParser

if TYPE_CHECKING:
    from vlm.hub.certificates import Certificate
    from vlm.inference.generate import VisionLanguageModel
    from vlm.inference.verify.cases import Case
    from vlm.models import VLMProcessor

ENGINES = {
    "transformers": "the installed version, on what vlm push-to-hub publishes or on --export",
    "transformers-4": "version 4 in an environment of its own, on a llava export",
    "vllm": "a server at --url, or the installed package; otherwise only the exported files are checked",
    "sglang": "likewise, on a llava-original export",
    "gguf": "llama.cpp through the package xllamacpp; otherwise the files are read back and no question is asked",
    "onnx": "onnxruntime, on an onnx export",
}
"""Name of an engine -> what it is; named here too so that `--help` imports no torch."""

DIFFERENT_STATUS = 1
"""The exit status where the engine differs."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `vlm verify`."""
    purpose = (
        "Check that another engine serves what was trained: ask both the same questions, compare pixels, token ids, "
        "logits and greedy answers, and name the first layer that differs."
    )
    examples = (
        "vlm verify outputs/finetune/final --with transformers",
        "vlm verify outputs/finetune/final --with vllm --url http://127.0.0.1:8000",
    )
    parser = PresentableParser(
        "vlm verify", "vlm verify CHECKPOINT --with ENGINE [options]", purpose, examples=examples
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder `final`, or a model on the Hub")
    engines = "; ".join(f"{name}: {what}" for name, what in ENGINES.items())
    parser.add_argument("--with", dest="engine", required=True, metavar="ENGINE", choices=ENGINES, help=engines)
    export = "the export to load (default: a temporary one)"
    parser.add_argument("--export", type=Path, metavar="FOLDER", help=export)
    url = "address of a running vLLM, SGLang or llama.cpp server that serves this checkpoint"
    parser.add_argument("--url", metavar="ADDRESS", help=url)
    parser.add_argument("--answers", type=int, default=200, metavar="N", help="number of questions (%(default)s)")
    longest = "most tokens in an answer (%(default)s)"
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help=longest)
    output = "where to write the certificate (default: into the checkpoint's folder; none for a model on the Hub)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    records = parser.add_argument_group("your own questions, in addition to generated ones")
    records.add_argument("--data", dest="input", metavar="FILE", help="a file of records in any training format")
    add_reading_options(records, writes=False)
    add_loading_options(parser, quantized=False, on_base=False)
    return parser


def main(argv: Sequence[str]) -> None:
    """Compare, print what was found, write the certificate, and exit with 1 if the engine differs."""
    args = make_parser().parse_args(argv)
    _check_options(args)
    check_checkpoint(args.checkpoint, heads=False)
    from vlm.hub.certificates import CERTIFICATE_FILE, add_certificate
    from vlm.hub.folders import resolve_folder
    from vlm.inference.verify.engines import load_engine
    from vlm.inference.verify.verify import Settings, verify

    checkpoint = resolve_folder(args.checkpoint)
    model = _load(args, checkpoint)
    questions = _questions(args, model)
    settings = Settings(args.max_new_tokens, args.export, args.url, args.trust_remote_code)
    certificate = verify(checkpoint, model, load_engine(args.engine), questions, settings)
    print(describe(certificate))
    file = args.output or (checkpoint / CERTIFICATE_FILE if Path(args.checkpoint).is_dir() else None)
    if file is not None:
        add_certificate(file, args.engine, certificate)
    print("No certificate was written: --output names a file" if file is None else f"Certificate: {file}")
    if certificate.difference:
        sys.exit(DIFFERENT_STATUS)


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError, before anything is loaded, for options that contradict each other or are out of bounds."""
    check_reading_options(args, "--data")
    for name in ("answers", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if args.url is not None and args.engine not in ("vllm", "sglang", "gguf"):
        raise ValueError(f"--url {args.url}: only vllm, sglang and gguf are asked over HTTP, not {args.engine}")
    if args.url is not None and args.export is not None:
        raise ValueError("--url and --export: a running server has already loaded its export; give one of them")
    if args.export is not None and not args.export.exists():
        raise ValueError(f"--export {args.export}: no such folder (seen from {Path.cwd()})")
    if not args.input and any((args.format, args.option, args.image_folder, args.follow_links, args.system_prompt)):
        raise ValueError("--format, --option, --image-folder, --follow-links and --system-prompt need --data")


def _load(args: argparse.Namespace, checkpoint: Path) -> "VisionLanguageModel":
    """Load the checkpoint as training has it, without a cache of features; refuse adapters and heads."""
    from vlm.assembly.adapter_folder import is_adapter_checkpoint
    from vlm.assembly.checkpoint import open_checkpoint
    from vlm.inference.generate import VisionLanguageModel

    opened = open_checkpoint(checkpoint, trust_remote_code=args.trust_remote_code)
    if is_adapter_checkpoint(checkpoint):
        raise ValueError(
            f"{args.checkpoint} is an adapter on a base, which engines load merged: vlm merge-lora {args.checkpoint} "
            "MERGED, then verify MERGED"
        )
    opened.check_heads(expected=False)
    return VisionLanguageModel(*opened.load_for_inference(device=args.device, dtype=args.dtype))


def _questions(args: argparse.Namespace, model: "VisionLanguageModel") -> list["Case"]:
    """Return the questions: those of the user first, then made ones up to the number that is asked for."""
    from vlm.assembly.encoders import image_size
    from vlm.assembly.model_kinds import is_composed_model
    from vlm.data.cache import resolve_cache_folder
    from vlm.inference.batch import prompt_source
    from vlm.inference.verify.cases import SIZES, make_cases, read_cases

    own: list[Case] = []
    if args.input:
        source = prompt_source(
            model.model,
            model.processor,
            source_config(args),
            cache=resolve_cache_folder(None),
            max_frames=1,
            answer_tokens=args.max_new_tokens,  # records with videos are left out
        )
        own, left_out = read_cases(source, args.answers)
        if left_out:
            print(f"{len(left_out)} records were left out; the first: {left_out[0]}")
    sizes = SIZES
    if args.engine == "gguf" and is_composed_model(model.model):  # llama.cpp resizes other images in its own way
        height, width = image_size(cast("VLMProcessor", model.processor).image_processor)
        sizes = ((width, height),)
    return [*own, *make_cases(max(args.answers - len(own), min(args.answers, 20)), sizes)]


def describe(certificate: "Certificate") -> str:
    """Return what was found, as lines."""
    from tabulate import tabulate

    rows = [
        (stage.stage, f"{stage.cases} questions", f"{stage.largest:.2g}", f"{stage.allowed:g}")
        for stage in certificate.stages
    ]
    tied = f", {certificate.tied_answers} more where two tokens are tied" if certificate.tied_answers else ""
    table = [tabulate(rows, ("stage", "compared", "largest difference", "allowed"))] if rows else []
    answers = f"{certificate.equal_answers} of {certificate.answers} greedy answers are equal{tied}"
    how = "" if certificate.is_run else ", checked on paper: not run"
    same = "serves what was trained" if certificate.is_run else "reads what was written"
    verdict = f"differs: {certificate.difference}" if certificate.difference else same
    notes = [f"Note: {note}" for note in certificate.notes]
    counted = [answers] if certificate.answers else []
    return "\n".join([*table, *counted, *notes, f"{certificate.engine}{how} {verdict}"])
