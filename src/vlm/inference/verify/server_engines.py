"""Engines that serve over HTTP: asked where an address is given or the engine is installed, else checked on paper."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm.inference.verify.cases import Case
from vlm.inference.verify.endpoint import Endpoint
from vlm.inference.verify.engines import Observation, Request, State
from vlm.inference.verify.paper import read_composed_config
from vlm.inference.verify.served_forms import differences_from_fresh, exported_form
from vlm.inference.verify.server_process import started_server
from vlm.models import VLMConfig


@dataclass(frozen=True)
class ServerEngine:
    """An engine with a server of OpenAI's interface.

    Attributes:
        name: its name for people.
        package: the package that starts it.
        format_name: the export that it loads.
        paper_version: the version whose source the check on paper is from.
        check_on_paper: what does not fit, for an export and the checkpoint's configuration.
        make_command: the module of the server and its options, for an export and a precision.
        paper_notes: what a reader of a check on paper has to know.
    """

    name: str
    package: str
    format_name: str
    paper_version: str
    check_on_paper: Callable[[Path, VLMConfig | None], Iterator[str]]
    make_command: Callable[[Path, str], Sequence[str]]
    paper_notes: Sequence[str] = ()

    def observe(self, request: Request) -> Observation:
        """Return what the server gives: numbers of prompt tokens and answers; else what is wrong on paper."""
        if request.url is not None:
            return self._ask(request, request.url, f"{self.name}, asked over HTTP")
        export, notes = exported_form(request, self.format_name)
        problems = [
            *self.check_on_paper(export, read_composed_config(request.checkpoint)),
            *differences_from_fresh(request, self.format_name),
        ]
        if importlib.util.find_spec(self.package) is None:
            return Observation(
                f"{self.name} {self.paper_version}", is_run=False, problems=problems, notes=[*notes, *self.paper_notes]
            )
        version = importlib.metadata.version(self.package)
        with started_server(self.make_command(export, request.dtype), request.scratch / "server.log") as url:
            observation = self._ask(request, url, f"{self.name} {version}")
        return replace(observation, problems=problems, notes=[*notes, *observation.notes])

    def _ask(self, request: Request, url: str, version: str) -> Observation:
        """Ask a server the questions; cases that are not among them are not asked."""
        outputs, answers = Endpoint(url).observe(request.questions, request.max_new_tokens)
        note = "a server tells prompt tokens and answers alone: pixels, ids, logits and layers were not compared"
        return Observation(version, outputs, answers, notes=[note])

    def trace(self, request: Request, case: Case) -> State:
        """Return nothing: a server shows no layers."""
        return {}
