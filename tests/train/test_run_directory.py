"""What a run directory records of the code that makes it."""

import subprocess
from pathlib import Path

from vlm.train.run_directory import has_changed_code


def test_only_files_of_the_code_count_as_its_changes(tmp_path: Path):
    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    file = package / "code.py"
    file.write_text("a = 1\n", encoding="utf-8")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert not has_changed_code(package)
    (tmp_path / "records.json").write_text("[]", encoding="utf-8")
    assert not has_changed_code(package)
    added = package / "more.py"
    added.write_text("", encoding="utf-8")
    assert has_changed_code(package)
    added.unlink()
    file.write_text("a = 2\n", encoding="utf-8")
    assert has_changed_code(package)
