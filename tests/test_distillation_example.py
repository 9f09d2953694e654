"""A student of a quarter of the size is closer to its teacher by its logits than by labels that are partly wrong."""

import json
from pathlib import Path

import pytest

from tests.forked import run_forked

EXAMPLE = Path(__file__).parent.parent / "examples" / "distil.py"


@pytest.mark.slow
def test_a_student_comes_closer_by_distillation_than_by_labels(tmp_path: Path):
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    (done,) = run_forked(["-c", run, str(EXAMPLE), str(tmp_path)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    teacher, labels, distilled = (summary[name] for name in ("teacher", "by_labels", "by_teacher"))
    assert 3.5 < teacher["parameters"] / distilled["parameters"] < 4.5
    assert teacher["accuracy"] > 0.95
    assert labels["parameters"] == distilled["parameters"]
    assert distilled["divergence"] < 0.5 * labels["divergence"]
    assert distilled["agreement"] > labels["agreement"] + 0.03
