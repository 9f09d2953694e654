"""The benchmarks' pieces on a model of almost no size: they do the same work, and count what they say they count."""

import json
import re
import statistics
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaModel

from benchmarks import (
    counting,
    features,
    finetune,
    generation,
    gpu,
    growth,
    memory,
    overhead,
    peers,
    preference,
    pretrain,
    serving,
    start,
    survival,
)
from benchmarks.guards import guards_in_turns
from benchmarks.lengths import PUBLISHED_FIGURES, SOURCES, draw_records, summarize_lengths, write_records
from benchmarks.packed_steps import StepSize
from benchmarks.shapes import SHAPES, compose_model, make_llava, write_parts
from benchmarks.variants import (
    SEED,
    PaddingCollator,
    Steps,
    compose_config,
    count_padded_positions,
    group_by_length,
    read_micro_batches,
    run_ours,
    split_packed_batch,
)
from vlm.demo.scenes import write_scenes
from vlm.train.data import needs_counts
from vlm.train.guards.step_guard import StepGuard
from vlm.train.monitor.peak_flops import Peak

TINY = SHAPES["tiny"]
ANSWERS = generation.Size("tiny", scale=12.0, records=4, repeats=1, tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts, and thirty records of the mixture."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_parts(root / "parts", TINY)
    write_records(root / "data", draw_records(30), TINY.side)
    return root


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """One thread: what is computed here is smaller than what threads cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_mixture_has_the_known_figures():
    found = summarize_lengths(draw_records(30_000))
    for name, near in (("mean", 0.05), ("median", 0.05), ("90th percentile", 0.05), ("99th percentile", 0.07)):
        assert found[name] == pytest.approx(PUBLISHED_FIGURES[name], rel=near), name
    assert 1900 < found["longest"] <= PUBLISHED_FIGURES["longest"]
    assert sum(source.thousands for source in SOURCES) == pytest.approx(665, rel=0.01)


def test_a_seed_gives_the_same_records_and_another_one_others():
    assert draw_records(50) == draw_records(50)
    assert draw_records(50) != draw_records(50, seed=1)


def test_records_on_disk_are_as_long_as_they_were_drawn(folder: Path):
    _, processor = compose_model(folder / "parts", SEED)
    samples = memory.encoded_samples(folder, processor)
    expected = counting.make_blank_samples(draw_records(30), TINY)
    for sample, blank in zip(samples, expected, strict=True):
        assert len(sample["input_ids"]) == len(blank["input_ids"])
        assert sum(label != -100 for label in sample["labels"]) == sum(label != -100 for label in blank["labels"])
        assert ("pixel_values" in sample) == ("pixel_values" in blank)
    assert counting.sample_stats(samples) == counting.sample_stats(expected)


def test_pairs_are_written_with_their_chosen_replies_alone(tmp_path: Path):
    path = preference.write_pairs(tmp_path / "pairs", 3, TINY)
    pairs, chosen = (json.loads((path.parent / name).read_text()) for name in ("pairs.json", "chosen.json"))
    assert len(pairs) == len(chosen) == len(list((path.parent / "images").iterdir())) == 3
    for pair, record in zip(pairs, chosen, strict=True):
        assert [turn["value"] for turn in record["conversations"]] == [f"<image>\n{pair['question']}", pair["chosen"]]
        assert pair["chosen"] != pair["rejected"]


def test_preference_steps_are_compared_with_what_counting_predicts():
    steps = {"shared": (2.0, 10.0), "TRL": (4.0, 0.0), "cached": (1.1, 8.0), "finetune": (0.5, 4.0)}
    measured = {
        name: preference.Measured([time] * 2, [flops] * 2 if flops else [], [0.7, 0.6], 1.0)
        for name, (time, flops) in steps.items()
    }
    rows = preference.make_rows(measured, preference.Size())
    assert [round(row.ratio, 6) for row in rows] == [2.0, 1.1]
    assert all(row.holds for row in rows)
    measured["TRL"].norm = 1.01
    with pytest.raises(SystemExit, match="do not compute the same"):
        preference.check_agreement(measured, ["shared", "TRL"])


def test_both_programs_have_the_same_weights_and_kernels(folder: Path):
    ours, processor = compose_model(folder / "parts", SEED)
    theirs = make_llava(ours, folder / "parts")
    batch = PaddingCollator(processor.tokenizer)([memory.encoded_samples(folder, processor)[:4]])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).loss, theirs(**batch).loss)
    assert len(theirs.model.vision_tower.encoder.layers) == TINY.vision[2]
    for model in (ours.language_model, theirs.model.language_model, theirs.model.vision_tower):
        assert model.config._attn_implementation == "sdpa"
    assert theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight


def test_a_steps_samples_come_back_out_of_its_packs(folder: Path):
    words = ("trainer.max_tokens_per_batch=2048", "trainer.gradient_accumulation_steps=2")
    run = run_ours(folder / "parts", folder / "data" / "records.json", folder / "run", *words, keeps=True)
    processor = run.trainer.processor
    found = [sample for step in run.batches for batch in step for sample in split_packed_batch(batch, processor)]
    expected = {tuple(sample["input_ids"]): sample for sample in memory.encoded_samples(folder, processor)}
    assert len(found) == len(expected)
    for sample in found:
        one = expected[tuple(sample["input_ids"])]
        assert sample["labels"] == one["labels"]
        assert ("pixel_values" in sample) == ("pixel_values" in one)
        if "pixel_values" in sample:
            torch.testing.assert_close(sample["pixel_values"], one["pixel_values"])
    assert len(run.seconds) == len(run.losses) == len(run.batches)
    assert 0 < run.seconds[0] < run.seconds_to_first_step


def test_micro_batches_are_those_without_packing_or_sorted_by_length(folder: Path):
    words = (
        "trainer.packing_strategy=step",
        "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=3",
        "trainer.max_tokens_per_batch=2048",
    )
    run = run_ours(folder / "parts", folder / "data" / "records.json", folder / "steps", *words, keeps=True)
    steps = read_micro_batches(run)
    assert [[len(batch) for batch in step] for step in steps] == [[4, 4, 4], [4, 4, 4], [4, 2]]
    for step, rows in zip(steps, run.batches, strict=True):
        found = [sample for row in rows for sample in split_packed_batch(row, run.trainer.processor)]
        lengths = sorted(len(sample["input_ids"]) for batch in step for sample in batch)
        assert sorted(len(sample["input_ids"]) for sample in found) == lengths
        assert [len(sample["input_ids"]) for batch in group_by_length(step) for sample in batch] == lengths
        images = [
            sum(len(sample.get("pixel_values", ())) for sample in samples)
            for samples in (found, [sample for batch in step for sample in batch])
        ]
        assert images[0] == images[1]
    padded = [sum(map(count_padded_positions, step)) for step in steps]
    assert sum(padded) > sum(sum(map(count_padded_positions, group_by_length(step))) for step in steps)


def test_a_padded_steps_operations_are_those_that_pytorch_counts(folder: Path):
    ours, processor = compose_model(folder / "parts", SEED)
    ours.visual_encoder.requires_grad_(False)
    flops, encoder = counting.count_operations(ours, TINY)
    theirs = make_llava(ours, folder / "parts")
    theirs.set_attn_implementation("eager")
    theirs.model.vision_tower.requires_grad_(False)
    samples = memory.encoded_samples(folder, processor)[:5]
    batch = PaddingCollator(processor.tokenizer)([samples])
    with FlopCounterMode(display=False) as counter:
        theirs(**batch).loss.backward()
    assert counting.padded(flops, encoder, [samples]) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_counting_predicts_more_for_larger_padded_batches(folder: Path):
    ours, _ = compose_model(folder / "parts", SEED)
    flops, encoder = counting.count_operations(ours, TINY)
    samples = counting.make_blank_samples(draw_records(200), TINY)
    few, many = (counting.predict_ratio(flops, encoder, samples, number) for number in (4, 10))
    assert 1 < few < many
    assert counting.predict_ratio(flops, encoder, samples, 10, micro_batches=4) < many
    assert sum(counting.operation_shares(flops, samples).values()) == pytest.approx(1)


def test_all_variants_of_a_finetune_step_have_the_same_losses(tmp_path: Path):
    size = finetune.Size("tiny", samples=5, accumulation=2, checkpointing=True)
    found = finetune.compare_variants(size, tmp_path)
    differences = finetune.check_agreement(found.variants, finetune.TOLERANCES["float32"])
    assert max(differences.values()) < 1e-4
    found.variants["grouped"].norm *= 1.01
    with pytest.raises(SystemExit, match="do not compute the same"):
        finetune.check_agreement(found.variants, finetune.TOLERANCES["float32"])
    far = finetune.check_agreement(found.variants, finetune.Tolerances(0.02, 0.02))
    assert far["norms of the first gradients are apart by"] == pytest.approx(0.01, abs=1e-3)
    assert {**far, "norms of the first gradients are apart by": 0} == {
        **differences,
        "norms of the first gradients are apart by": 0,
    }
    for variant in found.variants.values():
        assert len(variant.losses) == size.steps == len(variant.speeds) + 1 == len(variant.flops) + 1
    assert found.variants["padded"].flops > found.variants["ours"].flops
    rows = finetune.make_rows(found, size)
    assert [row.target for row in rows] == [2.0, 0.9, 1.25, 0.9]
    padded = found.variants["padded"]
    assert rows[0].ratio == pytest.approx(found.variants["ours"].rates[0] / padded.rates[0])
    assert rows[1].ratio == pytest.approx(rows[0].ratio * sum(found.variants["ours"].flops) / sum(padded.flops))
    steps = finetune.make_notes(found, size)["padded, step by step, measured and counted"]
    assert [counted > 1 for _, counted in steps] == [True] * (size.steps - 1)
    finetune.draw_losses(found.variants, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_the_first_records_that_fill_the_packs():
    records = counting.select_records(draw_records(400), SHAPES["smol"], 4096, 4)
    tokens = counting.sample_stats(counting.make_blank_samples(records, SHAPES["smol"])).tokens
    assert 0.9 * 4 * 4096 < tokens <= 4 * 4096


def test_a_bare_loop_takes_the_runs_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = StepSize("tiny", steps=2, repeats=1)
    optimisers: list[Any] = []

    def watched(run: Steps, **settings: Any) -> overhead.BareLoop:
        optimisers.append(weakref.ref(run.trainer.optimizer.optimizer))
        loop = loop_of(run, **settings)
        assert optimisers[0]() is None  # or there would be two sets of states
        return loop

    loop_of = overhead._make_bare_loop
    monkeypatch.setattr(overhead, "_make_bare_loop", watched)
    whole, bare, share = overhead.measure(size, tmp_path)
    assert len(optimisers) == 1
    assert len(whole) == len(bare) == 1
    assert min(*whole, *bare) > 0
    assert 0.1 < share < 1


@pytest.mark.parametrize(
    ("operator", "multiplies"),
    [
        ("aten::mm", True),
        ("aten::addmm", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", True),
        ("aten::mkldnn_convolution", True),
        ("aten::mul", False),
        ("aten::_log_softmax", False),
        ("aten::add_", False),
        ("Optimizer.step#AdamW.step", False),
    ],
)
def test_what_counts_as_a_matrix_product(operator: str, multiplies: bool):
    assert overhead._is_matrix_operator(operator) == multiplies


def test_memory_is_measured_of_both_variants(tmp_path: Path):
    write_parts(tmp_path / "parts", TINY)
    write_records(tmp_path / "data", [one for one in draw_records(12) if one.tokens < 300], TINY.side)
    for variant in memory.MEASURES.values():
        variant(memory.Size("tiny"), tmp_path)
    assert 0.1 < memory.peak_gigabytes() < 100
    records, positions = memory.draw_average_records(memory.Size("smol", tokens=4096))
    samples = counting.make_blank_samples(records, SHAPES["smol"])
    assert positions == count_padded_positions(samples) > counting.sample_stats(samples).tokens


def test_steps_grow(folder: Path):
    size = growth.Size("tiny", tokens=(1024, 2048), steps=3)
    found = growth.measure_steps(size, 2048, folder)
    assert len(found["seconds"]) == 2
    assert found["peak"] > 0
    assert max(record.tokens for record in growth.short_records(size, 2048)) <= 1024


def test_memory_that_will_be_needed_lies_on_a_line():
    assert growth.expected_peak({1: 3.0}, 8) == 0
    assert growth.expected_peak({1: 3.0, 2: 4.0, 4: 5.0}, 8) == pytest.approx(7)


def test_the_start_is_measured_twice(tmp_path: Path):
    found = growth.grow_start(growth.Size(records=(60,)), tmp_path)
    assert list(found) == [60]
    assert all(first > 0 and second > 0 for first, second in found.values())
    cost, again = growth.start_rows({100: (1.0, 0.5), 200: (2.0, 0.5), 400: (6.0, 0.9)})
    assert cost.ratio == pytest.approx(2)
    assert again.ratio == pytest.approx(0.1)
    growth.draw_lines(growth.GrowthMeasurements({1: [1.0], 2: [1.5]}, {1: 2.0, 2: 3.0}), found, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 0


def test_both_stages_of_the_gpu_benchmark_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """Utilisation is operations over time over the peak: here, steps take two seconds from the third on."""
    runs: list[Steps] = []

    def timed(*args: Any, **kwargs: Any) -> Steps:
        run = run_ours(*args, **kwargs)
        assert len(run.seconds) == gpu.TINY.steps
        run.seconds = [1000.0, 1000.0] + [2.0] * (gpu.TINY.steps - 2)
        runs.append(run)
        return run

    monkeypatch.setattr(gpu, "run_ours", timed)
    monkeypatch.setattr(gpu, "get_peak_tflops", lambda *_: Peak(0.01, "the test"))
    rows, notes = gpu.measure(gpu.TINY, list(gpu.STAGES), ())
    attained: Any = notes["a large matrix product attains, TFLOP/s"]
    assert [row.target for row in rows] == [0.55, 0.45]
    assert notes["peak from"] == "the test"
    weights = sum(one.numel() for one in LlamaModel(TINY.text_config()).layers.parameters() if one.ndim > 1)
    for row, run, stage in zip(rows, runs, gpu.STAGES, strict=True):
        tokens = [step[0]["input_ids"].numel() for step in run.batches[2:]]
        assert notes[f"{stage}: real tokens/s"] == pytest.approx(max(tokens) / 2, rel=0.05)
        assert row.ratio == pytest.approx(row.medians["model"] / 0.01)
        each = row.medians["model"] * 1e12 * 2 / statistics.median(tokens)
        least = (4 if stage == "pretrain" else 6) * weights  # of a token that is neither supervised nor an image's
        assert least < each < 4 * least
        assert notes[f"{stage}: share of what a large matrix product attains"] == pytest.approx(
            row.spread["model"][1] / attained
        )


def test_pretraining_is_measured_with_features_kept_and_without(monkeypatch: pytest.MonkeyPatch):
    size = pretrain.Size(6, 3)
    row, expected = pretrain.measure("tiny", size, 3)
    assert expected > 1
    assert row.target == pytest.approx(0.9 * expected)
    assert row.ratio == pytest.approx(row.medians["kept features"] / row.medians["images seen anew"])

    def elsewhere(*words: Any, **settings: Any) -> Steps:
        return run_ours(*words, *(["trainer.seed=7"] if "dataset.cache_features=true" in words else []), **settings)

    monkeypatch.setattr(pretrain, "run_ours", elsewhere)
    with pytest.raises(AssertionError, match="not close"):
        pretrain.measure("tiny", size, 2)


def test_the_first_epoch_is_not_measured():
    assert pretrain.epoch_rates(Steps("any", seconds=[9, 9, 2, 2, 1, 1]), 3, 8) == [2, 4]


@pytest.mark.slow
def test_a_head_trains_on_features_that_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parts(tmp_path / "parts", TINY)
    write_scenes(tmp_path / "data", num_train=30, num_val=1, num_heldout=1, num_labelled=30)
    monkeypatch.setitem(features.EPOCHS, "cached", 2)
    faster, rest = features.measure(tmp_path, "last", 1)
    assert set(faster.medians) == set(features.EPOCHS)
    assert min(*faster.medians.values(), rest.ratio) > 0


SPOILT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, bool]] = {
    "attention_mask": (torch.ones_like, "not those one by one", True),
    "pixel_values": (lambda pixels: pixels.roll(1, 0), "not those one by one", True),
    "blind": (torch.zeros_like, "another image gave the same answer", False),
}
"""What is done to the inputs, of batches only or of all, and what the check says then."""


@pytest.mark.parametrize("spoilt", SPOILT)
def test_answers_in_batches_are_held_against_those_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
):
    change, message, batches = SPOILT[spoilt]
    name = "pixel_values" if spoilt == "blind" else spoilt
    exact = generation.FixedLengthModel.answers

    def answers(model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> list[str]:
        if not batches or len(inputs["input_ids"]) > 1:
            inputs = {**inputs, name: change(inputs[name])}
        return exact(model, inputs, *args)

    monkeypatch.setattr(generation.FixedLengthModel, "answers", answers)
    with pytest.raises(SystemExit, match=message):
        generation.measure(ANSWERS, tmp_path)


def test_answers_are_ids_that_follow_question_and_image(tmp_path: Path):
    rows, notes = generation.measure(ANSWERS, tmp_path)
    assert [row.target for row in rows] == [3.0, 1.2]
    assert set(notes.values()) == {ANSWERS.records}
    _, answers = generation.time_answers(tmp_path, ANSWERS, "many", 2, ANSWERS.tokens)
    assert all(len([int(word) for word in answer.split()]) == ANSWERS.tokens for answer in answers)


def test_a_model_that_says_the_same_to_everything_is_no_measure(tmp_path: Path):
    with pytest.raises(SystemExit, match="different questions have the same answer"):
        generation.measure(replace(ANSWERS, scale=1.0), tmp_path)


def test_answers_of_several_clients_are_those_one_by_one(tmp_path: Path):
    size = serving.Size("tiny", scale=12.0, clients=3, requests=5, repeats=1, tokens=(3, 9))
    (row,), notes = serving.measure(size, tmp_path)
    assert row.target == 3.0
    assert set(row.medians) == {"together", "one by one"}
    assert set(notes.values()) == {size.requests}
    with pytest.raises(SystemExit, match=r"not those one by one: requests \[1\]"):
        serving.check_answers([[1], [2]], [[1], [3]])
    with pytest.raises(SystemExit, match="have the same answer"):
        serving.check_answers([[1], [1]], [[1], [1]])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_gpu_benchmark_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "--gpu"])
    with pytest.raises(SystemExit, match="--gpu: PyTorch sees none here"):
        gpu.main()


def test_every_program_gets_the_same_job(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Peers read the same records in their own forms; each command has the sizes of the job; losses are read of it."""
    peers.write_checkpoint(tmp_path / "model", TINY)
    records = peers.write_all_forms(tmp_path / "data", 4, TINY)
    written = [json.loads((records.parent / name).read_text()) for name in ("records.json", "factory.json")]
    messages = [json.loads(line) for line in (records.parent / "messages.jsonl").read_text().splitlines()]
    for llava, factory, record in zip(*written, messages, strict=True):
        assert factory["conversations"] == llava["conversations"]
        assert [turn["content"] for turn in record["messages"]] == [turn["value"] for turn in llava["conversations"]]
        assert record["images"] == factory["images"]
        assert len(record["images"]) == ("image" in llava)
    job = peers.Job(tmp_path / "model", records, tmp_path / "out", samples=3, accumulation=5, steps=2)
    assert job.num_records == 30
    for name, program in peers.PROGRAMS.items():
        command = " ".join(program.command(job, Path("bin/python")))
        command += (tmp_path / "out" / "options.yaml").read_text() if name == "LLaMA-Factory" else ""
        sizes = re.findall(r"(per_device_train_batch_size|gradient_accumulation_steps)\D+(\d+)", command)
        assert sizes == [("per_device_train_batch_size", "3"), ("gradient_accumulation_steps", "5")], name
    said = "{'loss': '2.5', 'epoch': '0.5'}\n{'loss': 1.5}\n{'train_runtime': '7.25', 'train_loss': '2'}"
    monkeypatch.setitem(
        peers.PROGRAMS, "ours", peers.Program(None, lambda *_: [sys.executable, "-c", f"print({said!r})"])
    )
    measured = peers.run_program("ours", job, Path(sys.executable))
    assert (measured.losses, measured.training) == ([2.5, 1.5], 7.25)
    with pytest.raises(RuntimeError, match="ours failed after 2 of 3 steps"):
        peers.run_program("ours", replace(job, steps=3), Path(sys.executable))


def test_guards_and_manifests_are_measured_apart_and_together(tmp_path: Path):
    costs = survival.measure(StepSize("tiny", steps=6, repeats=2), tmp_path)
    assert len(costs.guarded) == len(costs.unguarded) == 2
    for seconds in (costs.whole, costs.plain, costs.bare, costs.checks, costs.weight_checks):
        assert len(seconds) == 2
        assert min(seconds) > 0
    assert 0 < costs.guards < min(costs.guarded)
    assert costs.num_bytes > 10_000
    steps = statistics.median(costs.unguarded)
    row = costs.manifest_row(500)
    assert row.target == 1.0
    cost = [(whole - plain) / 500 for whole, plain in zip(costs.whole, costs.plain, strict=True)]
    assert row.ratio == pytest.approx(statistics.median(cost) / steps / 0.02)
    assert costs.shortest_step(500) == pytest.approx(statistics.median(cost) / 0.02)
    check = statistics.median(costs.weight_checks) / 500
    assert costs.guards_row(500).ratio == pytest.approx((costs.guards + check) / steps / 0.02)


def test_what_a_step_costs_under_both_is_compared_batch_by_batch():
    costs = survival.Costs([2.0, 5.0, 1.0], [1.0, 4.0, 1.0], 0.0, [], [3.0], [2.0], [1.0], [], 0)
    row = costs.row_of_both(10)
    assert (row.ratio, row.target, row.better) == (pytest.approx(5.3 / 4.1), 1.02, "lower")
    assert row.medians == pytest.approx({"with both": 2.3, "with neither": 1.1})


def test_each_batch_is_trained_on_under_guards_and_without(folder: Path):
    with guards_in_turns() as are_on, patch.object(StepGuard, "_leave_out", side_effect=AssertionError):
        words = ("trainer.max_tokens_per_batch=2048",)
        run = run_ours(folder / "parts", folder / "data" / "records.json", folder / "turns", *words, keeps=True)
    assert are_on == [True, False, False, True, True, False, False, True][: len(run.seconds)]
    assert len(run.seconds) > 3
    for first, second in zip(run.batches[::2], run.batches[1::2], strict=False):
        for row, again in zip(first, second, strict=True):
            assert torch.equal(row["input_ids"], again["input_ids"])


def test_a_start_is_measured_as_a_command_of_its_own(folder: Path):
    words = start.run_words(
        folder / "parts", folder / "data" / "records.json", folder / "run", "dataset.over_length=error"
    )
    config = compose_config(words[1], words[2:])
    assert not needs_counts(config, 1), "records are counted while it trains"
    assert config.trainer.max_steps == 1
    seconds, output = start.run_python(["-c", "print(sum(range(10**6)))"])
    assert output == "499999500000\n"
    assert seconds > 0
    with pytest.raises(RuntimeError, match="ended with 3"):
        start.run_python(["-c", "import sys; sys.exit(3)"])
