"""What was proved of each type of model: read from `proved.json`, which `vlm models --check all --json` writes.

Imports the standard library only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

FILE = "proved.json"
PROVED = "proved"
"""What the verdict of a proof begins with that was made and holds; the reason, or what it found, follows `: `."""
UNKNOWN = "-"


@dataclass(frozen=True)
class Proved:
    """The verdicts of a table of proofs.

    Attributes:
        transformers: the version of transformers that it was made with; empty where there is no table.
        date: the day, as `2026-01-31`.
        types: model type -> proof -> verdict.
    """

    transformers: str = ""
    date: str = ""
    types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def summarise(self, model_type: str) -> str:
        """Return what was proved of a type: `all`, all but some proofs by name, `none`, or `-` where none was tried."""
        verdicts = self.types.get(model_type)
        if not verdicts:
            return UNKNOWN
        lacking = [proof for proof, verdict in verdicts.items() if verdict.partition(": ")[0] != PROVED]
        if len(lacking) == len(verdicts):
            return "none"
        return f"all but {', '.join(lacking)}" if lacking else "all"


def read_proved() -> Proved:
    """Return the packaged table; an empty one where the package has none."""
    file = resources.files("vlm.families").joinpath(FILE)
    if not file.is_file():
        return Proved()
    content = json.loads(file.read_text(encoding="utf-8"))
    return Proved(content["transformers"], content["date"], content["types"])
