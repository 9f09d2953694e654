"""Comparing runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.runs.directories import logged, write_records, write_run, write_samples
from tests.runs.test_report import EVIL, check_page
from vlm.cli import compare as cli
from vlm.evaluation.bootstrap import scores_to_json
from vlm.evaluation.paired import paired_difference
from vlm.evaluation.record_sums import RecordSums
from vlm.runs.comparison import RunComparison, short_paths, sparkline
from vlm.runs.comparison_views import describe_comparison, make_comparison_page
from vlm.runs.evaluated_records import RECORD_SUMS_FILE, EvaluatedRecords
from vlm.runs.outcome import describe_verdict, group_by_setting
from vlm.runs.read import RunDirectory


def write_answers(run: Path, right: Sequence[int], *, first: int = 0) -> None:
    """Answers to records, 1 where one is right, as `vlm eval` writes them."""
    folder = run / "eval" / "val"
    folder.mkdir(parents=True)
    rows = [{"source": f"r{first + at}", "prompt": "what?", "image_path": f"{at}.png", "references": ["yes"],
             "answer": "yes" if good else EVIL, "error": ""} for at, good in enumerate(right)]  # fmt: skip
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    score = {"value": sum(right) / len(right), "low": 0.1, "high": 0.9}
    (folder / "results.json").write_text(
        json.dumps({"metrics": {"exact_match": score, "mine:f": score, "bleu": score}})
    )


@pytest.fixture
def pair(tmp_path: Path) -> list[RunDirectory]:
    """Two runs with answers to the same records, of which the second has more right."""
    one = write_run(tmp_path / "one", logged([3.0, 2.0]), settings={"trainer.seed": 1, "dataset.template": EVIL})
    two = write_run(tmp_path / "two", logged([3.0, 1.0]), settings={"trainer.seed": 2})
    write_answers(one, [0, 1] * 15)
    write_answers(two, [1, 1, 1, 0] * 7 + [1, 1])
    for run in (one, two):
        write_samples(run, 20, [EVIL, f"answer of {run.name}"])
    return [RunDirectory(one), RunDirectory(two)]


def test_settings_that_differ_are_shown_alone(pair: list[RunDirectory]):
    assert RunComparison(pair).settings == {"trainer.seed": [1, 2], "dataset.template": [EVIL, None]}


def test_the_same_records_are_paired(pair: list[RunDirectory]):
    (row,) = [row for row in RunComparison(pair).metrics if row.metric == "exact_match"]
    before, after = np.array([0.0, 1.0] * 15), np.array([1.0, 1.0, 1.0, 0.0] * 7 + [1.0, 1.0])
    assert row.is_paired(0)
    assert row.differences == [paired_difference(before, after, np.arange(30))]
    unpaired = {row.metric: row.is_paired(0) for row in RunComparison(pair).metrics}
    assert not unpaired["mine:f"]
    assert not unpaired["bleu"]


def test_other_records_are_not_paired(tmp_path: Path, pair: list[RunDirectory]):
    other = write_run(tmp_path / "three", logged([1.0]))
    write_answers(other, [1] * 30, first=7)
    (row,) = [row for row in RunComparison([pair[0], RunDirectory(other)]).metrics if row.metric == "exact_match"]
    assert not row.is_paired(0)
    (difference,) = row.differences
    assert difference is not None
    assert difference.low is not None
    assert difference.low < difference.value == 0.5


def test_answers_are_paired_for_each_pair_of_runs(tmp_path: Path, pair: list[RunDirectory]):
    """A third run without an evaluation, or with one of other records, changes nothing for the others."""
    (alone,) = [row for row in RunComparison(pair).metrics if row.metric == "exact_match"]
    bare, other = write_run(tmp_path / "bare"), write_run(tmp_path / "other")
    write_answers(other, [1] * 30, first=7)
    runs = [*pair, RunDirectory(bare), RunDirectory(other)]
    (row,) = [row for row in RunComparison(runs).metrics if row.metric == "exact_match"]
    assert row.differences[0] == alone.differences[0]
    assert [row.is_paired(number) for number in range(3)] == [True, False, False]


def test_losses_of_the_same_records_are_paired(tmp_path: Path):
    """Of more than two runs, those that were evaluated on the records of the first."""
    hardness, runs = np.linspace(1, 9, 40), []
    for name, shift, records in (("a", 0.0, "val"), ("b", 0.1, "val"), ("c", 0.1, "others")):
        line = {"step": 7, "eval_loss": 5 + shift, "eval_loss_ci95": 0.8, "eval_runtime": 1.0}
        runs.append(RunDirectory(write_run(tmp_path / name, [line])))
        noise = np.tile([-0.01, 0.01], 20) if shift else 0
        write_records(runs[-1].path, 7, {"loss": (hardness + shift + noise, np.ones(40))}, records=records)
    (row,) = RunComparison(runs).metrics
    assert [row.is_paired(number) for number in (0, 1)] == [True, False]
    assert [row.verdict(number) for number in (0, 1)] == ["worse", "within noise"]
    assert "+0.1 [0.0968" in describe_comparison(RunComparison(runs))


def test_losses_of_vlm_eval_are_paired_where_they_are_of_the_same_records(tmp_path: Path):
    hardness, runs = np.linspace(1, 9, 40), []
    for name, shift, records in (("a", 0.0, "val"), ("b", 0.1, "val"), ("c", 0.1, "others")):
        sums = RecordSums(hardness + shift + (np.tile([-0.01, 0.01], 20) if shift else 0), np.ones(40))
        folder = write_run(tmp_path / name) / "eval" / "val"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"metrics": scores_to_json({"loss": sums.score})}))
        (folder / RECORD_SUMS_FILE).write_text(EvaluatedRecords(records, {"loss": sums}).to_json())
        runs.append(RunDirectory(tmp_path / name))
    (row,) = RunComparison(runs).metrics
    assert [row.is_paired(number) for number in (0, 1)] == [True, False]
    assert [row.verdict(number) for number in (0, 1)] == ["worse", "within noise"]
    assert "+0.1 [0.0968" in describe_comparison(RunComparison(runs))


def test_the_loss_of_a_head_is_not_compared_with_that_of_text(tmp_path: Path):
    line = {"step": 1, "loss": 2.0, "eval_loss": 2.0, "eval_loss_ci95": 0.1}
    text = write_run(tmp_path / "text", [line])
    settings = {"model.head.task": "multiclass", "trainer.objective": "prediction"}
    better = {"eval_loss": 0.5, "loss": 0.5}
    head = write_run(tmp_path / "head", [line | better], settings=settings)
    distilled = write_run(tmp_path / "kd", [line | better], settings={"trainer.objective": "distillation"})
    comparison = RunComparison(list(map(RunDirectory, (text, head, distilled))))
    rows = {row.metric: row for row in comparison.metrics}
    assert [rows["eval_loss"].verdict(number) for number in (0, 1)] == ["not comparable", "better"]
    assert [rows["loss"].verdict(number) for number in (0, 1)] == ["not comparable", "not comparable"]
    assert rows["eval_loss"].differences[0] is None
    assert "different objectives or heads" in describe_comparison(comparison)
    verdict = describe_verdict(group_by_setting(comparison.runs, "eval_loss"), "eval_loss", -1)
    assert verdict.startswith("eval_loss is not comparable")


def test_metrics_on_other_evaluation_data_are_not_compared(tmp_path: Path):
    """A source that both runs were evaluated on still is."""
    names, runs = ("eval_loss", "eval_exact_match", "eval_loss/photos"), []
    for name, files in (("a", ["photos"]), ("b", ["photos", "charts"]), ("c", ["photos"])):
        line = {"step": 1} | dict.fromkeys(names, 1.0) | {f"{metric}_ci95": 0.1 for metric in names}
        folder = write_run(tmp_path / name, [line])
        sources = [{"source": file, "fingerprint": f"digest of {file}"} for file in files]
        (folder / "data.json").write_text(json.dumps({"eval": {"samples": 9, "sources": sources}}))
        runs.append(RunDirectory(folder))
    rows = {row.metric: [row.verdict(number) for number in (0, 1)] for row in RunComparison(runs).metrics}
    assert rows == {
        "eval_loss": ["not comparable", "within noise"], "eval_exact_match": ["not comparable", "within noise"],
        "eval_loss/photos": ["within noise", "within noise"],
    }  # fmt: skip


def test_losses_and_gains_have_the_direction_that_is_better(tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, value in zip(folders, (1.0, 0.5), strict=True):
        names = (
            "eval_loss",
            "eval_exact_match",
            "eval_blank_loss",
            "eval_loss/my_photos",
            "eval_image_gain",
            "eval_kl",
        )
        line = {"step": 1} | dict.fromkeys(names, value) | {f"{name}_ci95": 0.1 for name in names}
        write_run(folder, [line])
    rows = RunComparison(list(map(RunDirectory, folders))).metrics
    assert {row.metric: row.verdict(0) for row in rows} == {
        "eval_loss": "better", "eval_exact_match": "worse", "eval_loss/my_photos": "better",
        "eval_blank_loss": "", "eval_image_gain": "", "eval_kl": "",
    }  # fmt: skip


def test_answers_stand_side_by_side(pair: list[RunDirectory]):
    samples = RunComparison(pair).samples
    assert [answer.answer for answer in samples[1][1] if answer is not None] == ["answer of one", "answer of two"]


def test_the_terminal_and_the_page_show_it(pair: list[RunDirectory]):
    comparison = RunComparison(pair)
    shown = describe_comparison(comparison)
    for words in ("trainer.seed", "val: exact_match", "(paired)", "█", "answer of two", "eval_loss, steps"):
        assert words in shown
    page = make_comparison_page(comparison)
    check_page(page)
    assert "answer of two" in page


def test_many_long_names_become_letters(tmp_path: Path):
    runs = [RunDirectory(write_run(tmp_path / f"a-run-with-a-long-name-{n}", logged([2.0]))) for n in range(3)]
    shown = describe_comparison(RunComparison(runs))
    assert re.search(r"^A  a-run-with-a-long-name-0 ", shown, re.MULTILINE)
    assert re.search(r"^metric .* A +B +C +B − A +C − A", shown, re.MULTILINE)
    check_page(make_comparison_page(RunComparison(runs)))


def test_runs_with_nothing_can_be_compared(tmp_path: Path):
    runs = [RunDirectory(write_run(tmp_path / name, is_done=False)) for name in "ab"]
    assert "not finished" in describe_comparison(RunComparison(runs))
    check_page(make_comparison_page(RunComparison(runs)))


def test_the_command_refuses_one_run_and_writes_a_page(
    pair: list[RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one, two = (str(run.path) for run in pair)
    with pytest.raises(ValueError, match="needs two runs or more"):
        cli.main([one, f"{one}/final"])
    with pytest.raises(ValueError, match="there is no folder"):
        cli.main([one, two, "--html", str(tmp_path / "nowhere" / "a.html")])
    cli.main([one, two, "--html", str(tmp_path / "a.html")])
    check_page((tmp_path / "a.html").read_text())
    assert capsys.readouterr().out.rstrip().endswith("a.html")


def test_names_are_as_short_as_they_can_be():
    assert short_paths(["/x/a/run", "/x/b/run"]) == ["a/run", "b/run"]
    assert short_paths(["/x/one", "/x/two"]) == ["one", "two"]


def test_a_sparkline_shares_its_axes():
    line = sparkline([(0, 0.0), (10, 1.0)], (0, 20, 0.0, 1.0))
    assert line[0] == "▁"
    assert line.rstrip()[-1] == "█"
    assert len(line) == 40
    assert line.endswith(" ")
