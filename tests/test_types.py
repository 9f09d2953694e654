"""How much of the code is typed: the checker passes over whatever is `Any`."""

import io
import tokenize
from collections import Counter
from pathlib import Path

import vlm

SOURCE = Path(vlm.__file__).parent
MOST = 227
"""`Any` stands where a library declares nothing better; `object`, a Protocol or a TypedDict says more elsewhere."""


def count_any(code: str) -> int:
    """Return on how many lines of a module `Any` is used; imports, comments and texts do not count."""
    lines = set()
    for word in tokenize.generate_tokens(io.StringIO(code).readline):
        is_import = word.line.lstrip().startswith(("from ", "import "))
        if word.type == tokenize.NAME and word.string == "Any" and not is_import:
            lines.add(word.start[0])
    return len(lines)


def test_uses_of_any_are_counted() -> None:
    code = 'from typing import Any\n"""Any text."""\nx: Any = 1  # Any\ny: dict[Any, Any] = {}\n'
    assert count_any(code) == 2


def test_any_is_rare() -> None:
    counts = Counter({path.relative_to(SOURCE): count_any(path.read_text("utf-8")) for path in SOURCE.rglob("*.py")})
    assert counts.total() <= MOST, f"{counts.total()} lines with Any, most in {counts.most_common(5)}"
