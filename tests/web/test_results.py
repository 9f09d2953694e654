"""Results of evaluations as the page reads and shows them, whatever their files hold."""

import json
from pathlib import Path

from tests.tiny_parts import picture
from vlm.web.result_html import results_html, worst_html
from vlm.web.results import find_results, read_results, worst_answers

HOSTILE = "<script>x</script>"


def write_results(folder: Path, *rows: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    metrics = {"exact_match": {"value": 0.5, "low": 0.25, "high": 0.75}, "bleu": {"value": 12.5}}
    results = {"checkpoint": "run/final", "data": HOSTILE, "records": 4, "metrics": metrics, "left_out": [HOSTILE]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"torn": ')
    return folder


def row(answer: str, *references: str, error: str = "", image: str = "") -> dict[str, object]:
    return {"source": "7", "image_path": image, "prompt": "what?", "answer": answer, "references": list(references),
            "error": error}  # fmt: skip


def test_metrics_stand_with_their_intervals(tmp_path: Path):
    write_results(tmp_path / "run" / "eval" / "val")
    assert find_results(tmp_path) == ["run/eval/val"]
    evaluation = read_results(tmp_path, "run/eval/val")
    assert evaluation is not None
    shown = results_html(evaluation)
    assert "0.25 to 0.75" in shown
    assert "12.5" in shown
    assert "(4 records)" in shown
    assert "<script>" not in shown


def test_no_folder_is_read_that_was_not_listed(tmp_path: Path):
    write_results(tmp_path / "secret" / "eval" / "val")
    (tmp_path / "outputs" / "eval").mkdir(parents=True)
    (tmp_path / "outputs" / "eval" / "link").symlink_to(tmp_path / "secret" / "eval" / "val")
    for name in ("../secret/eval/val", "eval/link", "nothing", None):
        assert read_results(tmp_path / "outputs", name) is None


def test_the_worst_answers_come_first(tmp_path: Path):
    picture(1).save(tmp_path / "image.png")
    folder = write_results(
        tmp_path / "eval",
        row("A red circle.", "a red circle"),
        row("a red square", "a red circle", image=str(tmp_path / "image.png")),
        row("nothing alike", HOSTILE, image="/nowhere.png"),
        row("unmeasured"),
        row("", "x", error="its image is torn"),
    )
    answers = worst_answers(folder)
    assert [answer.answer for answer in answers] == ["nothing alike", "a red square", ""]
    shown = worst_html(answers)
    assert shown.count("data:image/jpeg") == 1
    assert "its image is torn" in shown
    assert "<script>" not in shown
    assert worst_html([]) == ""
    assert worst_answers(tmp_path) == []
