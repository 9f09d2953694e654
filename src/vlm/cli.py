"""The console script `vlm`: subcommands, the overview, and the training entry for everything else."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm.__main__ import with_config
from vlm.adapters.merge import main as merge_lora
from vlm.config.check import ConfigError
from vlm.config.overview import overview
from vlm.config.schema import RunConfig


def main(argv: Sequence[str] | None = None) -> None:
    """`vlm generate …` and what else `COMMANDS` names; any other command line goes to the Hydra entry."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"], ["help"]):
        print(overview())
        return
    if words == ["--version"]:
        print(version("small-vlm"))
        return
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    from vlm.__main__ import main as train

    train(words)


def data(words: Sequence[str]) -> None:
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
    parser = _of_a_run("show", "Records as a run would train on them, supervised tokens marked.")
    parser.add_argument("--number", type=int, default=4, help="records of each source (%(default)s)")
    parser.add_argument("--records", type=_numbers, default=[], metavar="N,N", help="the numbers of those wanted")
    parser.add_argument("--seed", type=int, default=None, help="draws them; without it, the first ones")
    parser.add_argument("--output", type=Path, default=Path("records.html"), help="the page (%(default)s)")
    args, rest = parser.parse_known_args(words)

    def act(config: RunConfig, name: str, overrides: list[str]) -> None:
        from vlm.data.tools.show import as_text, shown_records, write_page

        records = shown_records(
            config.dataset, _encoder(config, overrides), number=args.number, records=args.records, seed=args.seed
        )
        found = []
        for one in records:
            print(as_text(one, colours=sys.stdout.isatty()))
            found.append(one)
        write_page(found, args.output)
        print(f"With pictures: {args.output}")

    with_config(rest, act)


def stats(words: Sequence[str]) -> None:
    """`vlm data stats -cn RUN …`: what the run's records amount to."""
    parser = _of_a_run("stats", "What a run's records amount to: counts, lengths, sizes, what would be left out.")
    parser.add_argument("--output", type=Path, default=Path("stats.png"), help="the picture (%(default)s)")
    args, rest = parser.parse_known_args(words)

    def act(config: RunConfig, name: str, overrides: list[str]) -> None:
        from vlm.data.tools.stats import as_text, draw, gather

        if config.dataset.streaming:
            raise ConfigError("dataset.streaming=true: a stream is not counted")
        found = gather(config.dataset, _encoder(config, overrides))
        print(as_text(found))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(found, args.output)
        print(f"As a picture: {args.output}")

    with_config(rest, act)


def _of_a_run(tool: str, purpose: str) -> argparse.ArgumentParser:
    usage = f"vlm data {tool} [options] -cn RUN dataset.path=… [key=value …]"
    return argparse.ArgumentParser(f"vlm data {tool}", usage, purpose, allow_abbrev=False)


def _encoder(config: RunConfig, overrides: list[str]) -> Any:
    """What encodes the samples of a run."""
    from vlm.train.data import sample_encoder
    from vlm.train.head_data import prompt_encoder
    from vlm.train.model import settle_model

    model_config, processor = settle_model(config, overrides)
    encoder_of = sample_encoder if config.model.head.task is None else prompt_encoder
    return encoder_of(config, model_config, processor)


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def hub(name: str) -> Callable[[Sequence[str]], None]:
    """`vlm import …` and `vlm export …`."""
    return lambda words: getattr(import_module("vlm.hub.commands"), name)(words)


def models(words: Sequence[str]) -> None:
    """`vlm models`."""
    purpose = "Parts and families of models that can be trained, and what each of them takes."
    argparse.ArgumentParser("vlm models", description=purpose).parse_args(words)
    from vlm.families.listing import listing

    print(listing())


def generate(words: Sequence[str]) -> None:
    """`vlm generate …`."""
    import_module("vlm.inference.generate_command").main(words)


def chat(words: Sequence[str]) -> None:
    """`vlm chat …`."""
    import_module("vlm.inference.chat").main(words)


def predict(words: Sequence[str]) -> None:
    """`vlm predict …`."""
    import_module("vlm.inference.predict_command").main(words)


def serve(words: Sequence[str]) -> None:
    """`vlm serve …`."""
    import_module("vlm.inference.serve_command").main(words)


def push_to_hub(words: Sequence[str]) -> None:
    """`vlm push-to-hub …`."""
    import_module("vlm.hub.push_command").main(words)


def evaluate(words: Sequence[str]) -> None:
    """`vlm eval …`."""
    import_module("vlm.inference.eval_command").main(words)


def web(words: Sequence[str]) -> None:
    """`vlm web …`."""
    import_module("vlm.web.command").main(words)


COMMANDS = {
    "generate": generate,
    "chat": chat,
    "predict": predict,
    "eval": evaluate,
    "serve": serve,
    "web": web,
    "data": data,
    "models": models,
    "import": hub("import_"),
    "export": hub("export"),
    "merge-lora": merge_lora,
    "push-to-hub": push_to_hub,
}
TOOLS = {
    "download": ("fetch the pictures of a table of addresses and captions", "download"),
    "convert": ("between forms of records and kinds of files", "convert"),
    "clean": ("leave out pictures that do not open, duplicates, empty texts", "clean"),
    "stats": ("counts, token lengths and picture sizes of a run's data", stats),
    "show": ("records as a run trains on them, supervised tokens marked", show),
}
