"""`vlm data TOOL …`: the tools for records. Imports no Hydra before a tool is called: TAB completes their names."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

EXAMPLES = """\
examples:
  vlm data show -cn finetune-smol dataset.path=train.json dataset.image_folder=images
  vlm data clean train.json clean.jsonl --image-folder images
"""


def main(words: Sequence[str]) -> None:
    """`vlm data TOOL …`."""
    if not words or words[0] not in TOOLS:
        listing = "\n".join(f"  {name:<10}{purpose}" for name, (purpose, _) in TOOLS.items())
        print(f"usage: vlm data TOOL …\n\n{listing}\n\n{EXAMPLES}\nRun vlm data TOOL --help for options and examples.")
        if list(words) in ([], ["--help"], ["-h"]):
            sys.exit(0)
        from vlm.config.suggestions import nearest_names

        near = nearest_names(words[0], list(TOOLS))
        hint = f". Did you mean {' or '.join(near)}?" if near else ""
        sys.exit(f"vlm data {words[0]}: no such tool{hint}")
    _, (module, name) = TOOLS[words[0]]
    run: Callable[[Sequence[str]], None] = getattr(import_module(module), name)
    run(words[1:])


def _tool(name: str) -> tuple[str, str]:
    return f"vlm.data.tools.{name}", "main"


TOOLS = {
    "download": ("download the images of a table of URLs and captions", _tool("download")),
    "convert": ("convert annotations and records from one format to another", _tool("convert")),
    "pope": ("write yes/no questions about objects that are or are not in an image (POPE)", _tool("pope")),
    "chair": ("write caption requests for images with labelled objects (CHAIR)", _tool("chair")),
    "clean": ("remove broken images, duplicates and records without a reply", _tool("clean")),
    "stats": ("count records, tokens and images, and find copies and overlap", ("vlm.cli.data_views", "stats")),
    "show": ("show records as a run trains on them, or write a gallery page", ("vlm.cli.data_views", "show")),
}
"""Name of a tool -> what it is for; the module and the function that run it."""
