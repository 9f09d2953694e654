"""Jobs of `plain_reader`: files that go in, the process that reads a checkpoint, and files that come out."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vlm.hub.readback import find_memory_shortage
from vlm.inference.verify import plain_reader
from vlm.inference.verify.cases import Case, Message
from vlm.inference.verify.engines import NUM_LOGITS, Observation, Request, State

HIDDEN_PACKAGES = ["vlm"]
"""What readers of a published checkpoint do not have."""


@dataclass(frozen=True)
class ReadingJob:
    """How a checkpoint is read by transformers.

    Attributes:
        model: its folder.
        trust_remote_code: whether it brings code of its own, which runs.
        python: the interpreter.
        processor_options: options of `AutoProcessor.from_pretrained`.
    """

    model: Path
    trust_remote_code: bool
    python: Path
    processor_options: Mapping[str, object] = field(default_factory=dict)

    def observe(self, request: Request) -> Observation:
        """Return what the checkpoint gives for all cases and questions.

        Raises:
            ValueError: it does not load there, or the process fails otherwise.
        """
        if request.device == "cpu" and (shortage := find_memory_shortage(self.model)):
            raise ValueError(f"{self.model} cannot be read beside the loaded checkpoint: {shortage}")
        out, results = self._run(request, request.cases, request.questions, traced=())
        outputs = {case.name: load_file(out / f"{case.name}.safetensors") for case in request.cases}
        return Observation(
            f"transformers {results['versions']['transformers']}",
            outputs,
            results["answers"],
            ends=results["ends"],
            failures=results["failures"],
        )

    def trace(self, request: Request, case: Case) -> State:
        """Return what the parts give for a case, see `Engine.trace`."""
        out, _ = self._run(request, [case], (), traced=[case.name])
        return load_file(out / f"{case.name}.safetensors")

    def _run(
        self, request: Request, cases: Sequence[Case], questions: Sequence[Case], traced: Sequence[str]
    ) -> tuple[Path, dict[str, Any]]:
        """Run a job; return the folder of what it wrote, and its `RESULTS`."""
        out = request.scratch / "-".join(["read", *traced])
        out.mkdir()
        job = {
            "model": str(self.model),
            "out": str(out),
            "device": request.device,
            "dtype": request.dtype,
            "trust_remote_code": self.trust_remote_code,
            "processor_options": dict(self.processor_options),
            "cases": write_cases(cases, out),
            "questions": write_cases(questions, out),
            "traced": list(traced),
            "max_new_tokens": request.max_new_tokens,
            "num_logits": NUM_LOGITS,
            "hidden_packages": HIDDEN_PACKAGES,
        }
        (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._start(out / "job.json")
        return out, json.loads((out / plain_reader.RESULTS).read_text(encoding="utf-8"))

    def _start(self, job: Path) -> None:
        """Run `plain_reader` in a process without this package, without the network, and without this user's caches."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(job.parent / "modules"),  # where code of checkpoints is copied to
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [str(self.python), "-I", str(Path(plain_reader.__file__)), str(job)]
        done = subprocess.run(command, env=environment, cwd=job.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["it says nothing"]
            raise ValueError(f"transformers ({self.python}) cannot load {self.model}: {lines[-1][:400]}")


def write_cases(cases: Sequence[Case], folder: Path) -> list[dict[str, object]]:
    """Write the images of cases into a folder; return the cases as `plain_reader` takes them."""
    return [{"name": case.name, "messages": messages_with_paths(case, folder)} for case in cases]


def messages_with_paths(case: Case, folder: Path) -> list[Message]:
    """Return a case's messages, their images as paths of files that are written into a folder."""
    messages = case.messages
    items = [item for message in messages for item in message["content"] if item["type"] == "image"]
    for number, (item, content) in enumerate(zip(items, case.images, strict=True)):
        file = folder / f"{case.name}-{number}.image"
        file.write_bytes(content)
        item["path"] = str(file)
    return messages
