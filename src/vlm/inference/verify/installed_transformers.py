"""The installed transformers, in a process that cannot import this package."""

import sys
from pathlib import Path

from vlm.inference.verify.cases import Case
from vlm.inference.verify.engines import Observation, Request, State
from vlm.inference.verify.reading_job import ReadingJob
from vlm.inference.verify.served_forms import published_form


class InstalledTransformers:
    """Reads what users of the Hub load: code of the checkpoint, or an export without any."""

    def __init__(self):
        self._jobs: dict[Path, ReadingJob] = {}

    def observe(self, request: Request) -> Observation:
        """Return what the checkpoint gives there, see `Engine.observe`."""
        return self._job(request).observe(request)

    def trace(self, request: Request, case: Case) -> State:
        """Return what the parts give for a case, see `Engine.trace`."""
        return self._job(request).trace(request, case)

    def _job(self, request: Request) -> ReadingJob:
        if request.scratch not in self._jobs:
            folder, has_code = published_form(request)
            self._jobs[request.scratch] = ReadingJob(folder, has_code, Path(sys.executable))
        return self._jobs[request.scratch]


ENGINE = InstalledTransformers()
