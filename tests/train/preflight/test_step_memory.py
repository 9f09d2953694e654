"""The largest step of a run is that of its longest samples; how a run is sharded changes what it needs."""

from vlm.train.preflight.fake_step import BatchShape
from vlm.train.preflight.findings import Findings
from vlm.train.preflight.step_memory import worst_batch


def test_of_data_that_is_no_set_of_samples_no_worst_batch_is_known():
    assert worst_batch(object(), [BatchShape(1, 10, 1, 5)]) is None


def test_what_a_run_needs_is_its_worst_step(findings: Findings):
    memory = findings.memory
    assert memory is not None
    assert memory.worst is not None
    assert memory.predicted is not None
    assert (memory.way, memory.ranks, memory.expected_bytes) == ("none", 1, memory.predicted.peak)
    assert memory.needed == max(memory.worst.peak, memory.measured)
    assert memory.held["optimiser states"] == memory.predicted.states
