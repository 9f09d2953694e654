"""What runs with prediction heads measured."""

from collections.abc import Iterator
from typing import Any

import pytest

from vlm.train.heads import report as head_report


@pytest.fixture(scope="module")
def told() -> Iterator[list[dict[str, Any]]]:
    """What each run's report was made of, the newest last."""
    kept: list[dict[str, Any]] = []
    original = head_report.report

    def keep(*given: Any, **named: Any) -> None:
        targets, sets = given[2:4]
        kept.append({"trained": targets, "evaluation": next(iter(sets.values())), "test": sets.get("test")})
        original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_report, "report", keep)
        yield kept
