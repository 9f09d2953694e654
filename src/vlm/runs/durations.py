"""How long a run took, over all its starts, as its `status.json` says. Imports no torch."""

from collections.abc import Mapping

from vlm.runs.files import number_at


def seconds_of_starts(status: Mapping[str, object], now: float | None = None) -> float:
    """Return how long all starts of a run took, in seconds: those before the last one, and that one.

    Args:
        status: the content of `status.json`.
        now: the time until which the last start lasts; None: until its last sign of life.
    """
    started, earlier = number_at(status, "started_at"), number_at(status, "earlier_seconds") or 0.0
    ended = number_at(status, "updated_at") if now is None else now
    return earlier if started is None or ended is None else earlier + max(0.0, ended - started)
