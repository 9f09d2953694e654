"""The benchmarks' pieces on a model of almost no size: they do the same work, and count what they say they count."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counting, finetune, gpu, growth, memory, overhead
from benchmarks.lengths import KNOWN, SOURCES, draw_records, figures, write_records
from benchmarks.shapes import SHAPES, composed, llava_of, write_parts
from benchmarks.variants import SEED, PaddingCollator, in_micro_batches, padded_positions, run_ours, samples_of

TINY = SHAPES["tiny"]


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
    found = figures(draw_records(30_000))
    for name, near in (("mean", 0.05), ("median", 0.05), ("90th percentile", 0.05), ("99th percentile", 0.07)):
        assert found[name] == pytest.approx(KNOWN[name], rel=near), name
    assert 1900 < found["longest"] <= KNOWN["longest"]
    assert sum(source.thousands for source in SOURCES) == pytest.approx(665, rel=0.01)


def test_a_seed_gives_the_same_records_and_another_one_others():
    assert draw_records(50) == draw_records(50)
    assert draw_records(50) != draw_records(50, seed=1)


def test_records_on_disk_are_as_long_as_they_were_drawn(folder: Path):
    _, processor = composed(folder / "parts", SEED)
    samples = memory.encoded_samples(folder, processor)
    expected = counting.blank_samples(draw_records(30), TINY)
    for sample, blank in zip(samples, expected, strict=True):
        assert len(sample["input_ids"]) == len(blank["input_ids"])
        assert sum(label != -100 for label in sample["labels"]) == sum(label != -100 for label in blank["labels"])
        assert ("pixel_values" in sample) == ("pixel_values" in blank)
    assert counting.facts(samples) == counting.facts(expected)


def test_both_programs_have_the_same_weights_and_kernels(folder: Path):
    ours, processor = composed(folder / "parts", SEED)
    theirs = llava_of(ours, folder / "parts")
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
    found = [sample for step in run.batches for batch in step for sample in samples_of(batch, processor)]
    expected = {tuple(sample["input_ids"]): sample for sample in memory.encoded_samples(folder, processor)}
    assert len(found) == len(expected)
    for sample in found:
        one = expected[tuple(sample["input_ids"])]
        assert sample["labels"] == one["labels"]
        assert ("pixel_values" in sample) == ("pixel_values" in one)
        if "pixel_values" in sample:
            torch.testing.assert_close(sample["pixel_values"], one["pixel_values"])
    assert len(run.seconds) == len(run.losses) == len(run.batches)
    assert 0 < run.seconds[0] < run.until_first


def test_micro_batches_hold_a_steps_samples_as_drawn_or_by_length():
    samples = counting.blank_samples(draw_records(20), TINY)
    drawn, grouped = (in_micro_batches(samples, 3, grouped=one) for one in (False, True))
    lengths = sorted(len(sample["input_ids"]) for sample in samples)
    for laid in (drawn, grouped):
        assert [len(one) for one in laid] == [7, 6, 7]
        assert sorted(len(sample["input_ids"]) for one in laid for sample in one) == lengths
    assert [len(sample["input_ids"]) for one in grouped for sample in one] == lengths
    assert sum(map(padded_positions, grouped)) < sum(map(padded_positions, drawn))


def test_a_padded_steps_operations_are_those_that_pytorch_counts(folder: Path):
    ours, processor = composed(folder / "parts", SEED)
    ours.visual_encoder.requires_grad_(False)
    flops, encoder = counting.counted(ours, TINY)
    theirs = llava_of(ours, folder / "parts")
    theirs.set_attn_implementation("eager")
    theirs.model.vision_tower.requires_grad_(False)
    samples = memory.encoded_samples(folder, processor)[:5]
    batch = PaddingCollator(processor.tokenizer)([samples])
    with FlopCounterMode(display=False) as counter:
        theirs(**batch).loss.backward()
    assert counting.padded(flops, encoder, [samples]) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_counting_predicts_more_for_larger_padded_batches(folder: Path):
    ours, _ = composed(folder / "parts", SEED)
    flops, encoder = counting.counted(ours, TINY)
    samples = counting.blank_samples(draw_records(200), TINY)
    few, many = (counting.forecast(flops, encoder, samples, number) for number in (4, 10))
    assert 1 < few < many
    assert counting.forecast(flops, encoder, samples, 10, micro_batches=4) < many
    assert sum(counting.shares(flops, samples).values()) == pytest.approx(1)


def test_all_variants_of_a_finetune_step_have_the_same_losses(tmp_path: Path):
    size = finetune.Size("tiny", tokens=2048, accumulation=2, steps=2, samples=5)
    found = finetune.compare(size, tmp_path)
    assert finetune.check_agreement(found.variants, finetune.NEAR["float32"]) < 1e-4
    found.variants["grouped"].norm *= 1.01
    with pytest.raises(SystemExit, match="do not compute the same"):
        finetune.check_agreement(found.variants, finetune.NEAR["float32"])
    for one in found.variants.values():
        assert len(one.losses) == len(one.speeds) == len(one.flops) == size.steps
    assert found.variants["padded"].flops > found.variants["ours"].flops
    rows = finetune.rows_of(found)
    assert [row.target for row in rows] == [2.0, 0.9, 1.25, 0.9]
    padded = found.variants["padded"]
    assert rows[0].ratio == pytest.approx(found.variants["ours"].rates[0] / padded.rates[0])
    assert rows[1].ratio == pytest.approx(rows[0].ratio * sum(found.variants["ours"].flops) / sum(padded.flops))
    finetune.draw_losses(found.variants, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_the_first_records_that_fill_the_packs():
    records = finetune.fitting(draw_records(400), SHAPES["smol"], 4096, 4)
    tokens = counting.facts(counting.blank_samples(records, SHAPES["smol"])).tokens
    assert 0.9 * 4 * 4096 < tokens <= 4 * 4096


def test_a_bare_loop_takes_the_runs_batches(tmp_path: Path):
    size = overhead.Size("tiny", tokens=2048, steps=2, repeats=1)
    whole, bare, share = overhead.measure(size, tmp_path)
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
    assert overhead._multiplies(operator) == multiplies


def test_memory_is_measured_of_both_variants(tmp_path: Path):
    write_parts(tmp_path / "parts", TINY)
    write_records(tmp_path / "data", [one for one in draw_records(12) if one.tokens < 300], TINY.side)
    for variant in memory.MEASURES.values():
        variant(memory.Size("tiny"), tmp_path)
    assert 0.1 < memory.peak_gigabytes() < 100
    records, positions = memory.average_set(memory.Size("smol", tokens=4096))
    samples = counting.blank_samples(records, SHAPES["smol"])
    assert positions == padded_positions(samples) > counting.facts(samples).tokens


def test_steps_grow(folder: Path):
    size = growth.Size("tiny", tokens=(1024, 2048), steps=2)
    found = growth.measure_steps(size, 2048, folder)
    assert len(found["seconds"]) == 1
    assert found["peak"] > 0
    assert max(record.tokens for record in growth.short_records(size, 2048)) <= 1024


def test_memory_that_will_be_needed_lies_on_a_line():
    assert growth.expected_peak({1: 3.0}, 8) == 0
    assert growth.expected_peak({1: 3.0, 2: 4.0, 4: 5.0}, 8) == pytest.approx(7)


def test_the_start_is_measured_twice(tmp_path: Path):
    found = growth.grow_start(growth.Size(records=(60,)), tmp_path)
    assert list(found) == [60]
    assert all(first > 0 and second > 0 for first, second in found.values())
    cost, again = growth.start_rows({100: (1.0, 0.5), 200: (2.0, 0.5), 400: (6.0, 0.6)})
    assert cost.ratio == pytest.approx(2)
    assert again.ratio == pytest.approx(0.1)
    growth.draw_lines(growth.Grown({1: [1.0], 2: [1.5]}, {1: 2.0, 2: 3.0}), found, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 0


def test_both_stages_of_the_gpu_benchmark_run_on_a_cpu():
    rows, notes = gpu.measure(gpu.TINY, list(gpu.STAGES), ())
    assert [row.target for row in rows] == [0.55, 0.45]
    assert all(0 < row.ratio < 1 for row in rows)
    assert "peak from" in notes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_gpu_benchmark_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "--gpu"])
    with pytest.raises(SystemExit, match="sees none here; --tiny"):
        gpu.main()
