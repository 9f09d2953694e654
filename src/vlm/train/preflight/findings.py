"""What a preflight found out about a run, as plain values: `report.py` shows them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vlm.train.preflight.memory import MemoryPrediction
from vlm.train.preflight.sharded import ShardedMemory
from vlm.train.preflight.step_time import DRIFT


@dataclass(frozen=True)
class Problem:
    """What would go wrong, or is likely not meant.

    Attributes:
        text: what is wrong.
        remedy: the override that mends it.
        is_fatal: whether the run would be refused, or would not end.
    """

    text: str
    remedy: str
    is_fatal: bool = False


@dataclass(frozen=True)
class DataFindings:
    """What the training records are.

    Attributes:
        table: what each source gives.
        forms: a sentence for each source: how its records are read, and what they look like.
        lengths: tokens of each sample; empty where they are not known.
        longest: the most tokens that a sample may have.
        skipped: reasons of records that are left out, with their numbers.
    """

    table: str = ""
    forms: Sequence[str] = ()
    lengths: Sequence[int] = ()
    longest: int = 0
    skipped: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class ShardedRow:
    """The memory that a way of sharding needs on each device.

    Attributes:
        name: of the way.
        override: what chooses it.
        device: bytes of a device, by the number of devices.
        host: bytes of the machine's memory for each device, by the number of devices.
    """

    name: str
    override: str
    device: dict[int, int]
    host: dict[int, int]


@dataclass(frozen=True)
class MemoryFindings:
    """The memory of a step.

    Attributes:
        predicted: of the probe's second step, without sharding; None: it cannot be counted, and `note` says why.
        measured: of the same step on this rank, as the run shards it; 0: it was not.
        highest: the most that any rank measured.
        worst: predicted where the longest samples come together, without sharding; None: not known.
        rows: of ways of sharding, for that step; where it is not known, for the probe's.
        available: bytes of a device, or a rank's share of the machine.
        method: how `measured` was measured.
        note: why nothing is predicted.
        way: the run's way of sharding.
        ranks: number of ranks.
        expected: the memory predicted of the probe's step on each rank, as the run shards it; None: not predicted.
        expected_bytes: its bytes on the device; where the device is the CPU, with those of the host.
        needed: the same of the worst step; where nothing is predicted, what was measured.
        held: bytes that this rank held behind a step: parameters, gradients, states of the optimiser.
    """

    predicted: MemoryPrediction | None
    measured: int
    highest: int
    worst: MemoryPrediction | None
    rows: Sequence[ShardedRow]
    available: int
    method: str
    note: str = ""
    way: str = "none"
    ranks: int = 1
    expected: ShardedMemory | None = None
    expected_bytes: int = 0
    needed: int = 0
    held: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TimeFindings:
    """The time of a run, from the probe; seconds.

    Attributes:
        steps: number of steps.
        step: of a step on average.
        margin: half the width of the interval around `step`; None: not known.
        timed: number of steps that were timed.
        basis: what a step's time is taken to grow with.
        computing: share of the timed steps in which this process computed on the CPU, several threads counted as more;
            None: the steps are not computed on the CPU.
        loading: from the start to the first step.
        evaluation: of all evaluations.
        evaluations: number of evaluations.
        answering: of all answers to samples, as long as the model writes them before it is trained.
        answers: number of these answers.
        saving: of all checkpoints.
        checkpoints: number of checkpoints.
        drawing: of plots, at each evaluation and checkpoint and at the end.
    """

    steps: int
    step: float
    margin: float | None
    timed: int
    basis: str
    computing: float | None
    loading: float
    evaluation: float
    evaluations: int
    answering: float
    answers: int
    saving: float
    checkpoints: int
    drawing: float

    @property
    def training(self) -> float:
        """Seconds of all steps."""
        return self.step * self.steps

    @property
    def total_margin(self) -> float | None:
        """Half the width of the interval around `total`; None: not known. What is no step may drift as a step does."""
        others = self.evaluation + self.answering + self.saving + self.drawing
        return None if self.margin is None else self.margin * self.steps + DRIFT * others

    @property
    def total(self) -> float:
        """Seconds of everything."""
        return self.loading + self.training + self.evaluation + self.answering + self.saving + self.drawing


@dataclass(frozen=True)
class DiskFindings:
    """The disk of a run's checkpoints: bytes of a checkpoint, of `final`, of all that is kept at once, and free."""

    checkpoint: int
    final: int
    needed: int
    free: int


@dataclass
class Findings:
    """Everything that a preflight found out.

    Attributes:
        name: of the run.
        start: what the run starts from.
        parts: the table of parts.
        data: of the training records.
        memory: None: no step was made.
        duration: None: no step was timed.
        disk: None: not known.
        rates: learning rate of each part by step: name -> points.
        first_batch: HTML of the first batch, with its images in it.
        problems: what would go wrong.
    """

    name: str
    start: str
    parts: str = ""
    data: DataFindings = field(default_factory=DataFindings)
    memory: MemoryFindings | None = None
    duration: TimeFindings | None = None
    disk: DiskFindings | None = None
    rates: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    first_batch: str = ""
    first_sample: str = ""
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether the run would not come to its end as it is."""
        return any(problem.is_fatal for problem in self.problems)
