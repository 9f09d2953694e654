"""Opens the run directory of a run: locks it, decides how the run starts, and records this."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.data.stream import SampleStream
from vlm.train.checkpoints.world import World
from vlm.train.distributed import on_rank0
from vlm.train.resume.changes import Change
from vlm.train.resume.lock import RunLock
from vlm.train.resume.record import RunRecord, make_record, with_data
from vlm.train.resume.start import ANEW_WORDS, Start, check_data, decide_start, describe_start, set_aside
from vlm.train.run_directory import (
    DATA_FILE,
    add_changes,
    add_command,
    list_skipped,
    write_data_summary,
    write_run_files,
)

log = logging.getLogger(__name__)


class RunStart:
    """The start of a run in its directory.

    Attributes:
        folder: the run directory.
        record: the record of the run; its data are known from `begin` on.
        changed_keys: the keys that differ from the checkpoint that the run resumes from.
    """

    def __init__(self, config: RunConfig, folder: Path, record: RunRecord, start: Start):
        self.config, self.folder, self.record = config, folder, record
        self._start = start
        self.changed_keys = frozenset(change.key for change in start.changes)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self._start.is_done

    @property
    def is_first(self) -> bool:
        """Whether this is the first start in the directory, or no earlier start saved anything."""
        checkpoint = self._start.checkpoint
        return checkpoint is None or checkpoint.parent.resolve() != self.folder.resolve()

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the run resumes from, or None if it starts anew."""
        return None if self._start.checkpoint is None else str(self._start.checkpoint)

    def begin(self, records: Mapping[str, SampleDataset | SampleStream]) -> None:
        """Compare the data with those of the checkpoint, and record the start; every rank calls this.

        Raises:
            ValueError: the data differ, and `trainer.resume_changes` does not accept it.
        """
        self.record = with_data(self.record, records)
        changes = on_rank0(lambda: self._record(records))
        self.changed_keys = frozenset(change.key for change in changes)

    def _record(self, records: Mapping[str, SampleDataset | SampleStream]) -> list[Change]:
        start, folder = self._start, self.folder
        changes = [*start.changes, *check_data(self.config, start, self.record)]
        if self.is_first or not (folder / DATA_FILE).exists():  # an earlier start may have ended while it counted
            write_data_summary(folder, records)
        if not self.is_first:
            add_command(folder)
        if start.checkpoint is not None:
            step = start.progress.step if start.progress is not None else 0
            add_changes(folder, step, {change.key: change.values() for change in changes})
        list_skipped(folder, records)
        return changes


@contextmanager
def open_run_directory(config: RunConfig, folder: Path, world: World) -> Iterator[RunStart]:
    """Lock a run directory for as long as the run lives, and decide how the run starts; every rank calls this.

    Raises:
        ValueError: another run trains in it, or it holds a run that this one cannot continue with.
    """
    with ExitStack() as held:

        def lock() -> None:
            """Lock the run directory; if the run starts over, first set the earlier run aside."""
            if config.trainer.resume_from_checkpoint.lower() in ANEW_WORDS:
                set_aside(folder)
            held.enter_context(RunLock(folder))

        on_rank0(lock)
        record = make_record(config, world.ranks)
        start = decide_start(config, folder, record, world)
        log.info("%s", describe_start(start, folder))
        run_start = RunStart(config, folder, record, start)
        if not start.is_done and run_start.is_first:
            on_rank0(lambda: write_run_files(folder, config))
        yield run_start
