"""What an engine has to give, and the table of engines.

To add an engine, write a module of this package with `ENGINE`, an object as `Engine` describes, and add its name to
`ENGINE_MODULES`. A module of a library that only some users have is imported within the functions that need it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from vlm.inference.verify.cases import Case

State = dict[str, Tensor]
"""Tensors by what they are."""

PIXELS, NUM_IDS, IDS, LOGITS = "pixels", "number of prompt tokens", "ids", "logits"
IMAGE_FEATURES, CONNECTOR = "image features", "connector"

NUM_LOGITS = 16
"""The number of last positions of a prompt whose logits are compared; all of a shorter prompt."""

ENGINE_MODULES = {
    "transformers": "installed_transformers",
    "transformers-4": "transformers4",
    "vllm": "vllm_engine",
    "sglang": "sglang_engine",
    "gguf": "gguf_engine",
    "onnx": "onnx_engine",
}
"""Name of an engine, as `--with` takes it -> its module in this package."""


@dataclass(frozen=True)
class Request:
    """What is to be compared.

    Attributes:
        checkpoint: the folder of the checkpoint.
        cases: the questions of which pixels, ids and logits are compared.
        questions: the questions that are answered; they may be the same as `cases`.
        inputs: for each case, by its name, what training's path gives the model: `input_ids` and `attention_mask`
            `(1, tokens)`, and the inputs of its images, normalised.
        scratch: an empty folder for files of the engine, which is removed at the end.
        max_new_tokens: the largest number of tokens of an answer.
        export: the folder or file that the engine loads, where the user named it; None: the engine makes it in
            `scratch`.
        url: the address of a running server, where the user named it.
        device: `cpu`, `cuda` …
        dtype: `float32`, `bfloat16` or `float16`, in which training's path computes.
        trust_remote_code: whether code that comes with the checkpoint or the export may run.
    """

    checkpoint: Path
    cases: Sequence[Case]
    questions: Sequence[Case]
    inputs: Mapping[str, State]
    scratch: Path
    max_new_tokens: int
    export: Path | None = None
    url: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Observation:
    """What an engine gave.

    Attributes:
        version: the engine with its version, such as `transformers 5.23.0`.
        outputs: name of a case -> what the engine gave, as far as it can tell. `pixels` as `pixel_values` of
            `Request.inputs`; `ids` `(tokens,)`; `number of prompt tokens` `(1,)`, where ids are not known;
            `logits` `(positions, vocabulary)` of the last `NUM_LOGITS` positions.
        answers: name of a question -> the greedy answer, without special tokens and blanks at its ends.
        is_run: whether the engine ran; False for a check on paper, which has neither outputs nor answers.
        problems: what cannot be served rightly, as sentences; on paper, what does not fit.
        notes: what a reader has to know, as sentences.
        ends: the ids that end an answer there; None where that is not known.
        failures: name of a case -> why the engine gave no logits of it, as a sentence.
    """

    version: str
    outputs: Mapping[str, State] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    is_run: bool = True
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    ends: Sequence[int] | None = None
    failures: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """A program that serves what was trained."""

    def observe(self, request: Request) -> Observation:
        """Ask the engine all cases and questions, or check on paper where it is not there.

        Raises:
            ValueError: the engine cannot load the checkpoint, or the request lacks what it needs.
        """
        ...

    def trace(self, request: Request, case: Case) -> State:
        """Return what the parts of the model give for one case, in the order in which they run; empty if unknown.

        It is called where logits or answers differ, to find the first part that does. Names are `visual encoder layer
        1` … `(images, tokens, width)`, `image features` (what the connector reads), `connector` (what it gives),
        `language model layer 1` … `(tokens, width)`.
        """
        ...


def load_engine(name: str) -> Engine:
    """Return an engine by its name in `ENGINE_MODULES`."""
    module = import_module(f"{__package__}.{ENGINE_MODULES[name]}")
    return cast(Engine, module.ENGINE)
