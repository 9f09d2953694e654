"""`dataset.max_image_tokens` on every family and on composed models: nothing takes more, and it is saved."""

import json
import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedConfig

from tests.families.tiny_families import TINY, save_family
from tests.fixtures import compose_config
from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.image_budget import ImageMeter, VideoMeter, limit_image_tokens, most_tile_tokens
from vlm.assembly.resolve import resolve_model
from vlm.cli.main import main
from vlm.data.encoding.processor_errors import ProcessorRefusalError
from vlm.data.sample import Clip
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES
from vlm.inference.generate import VisionLanguageModel
from vlm.models.anyres import AnyRes

BUDGETS = {
    "llava-next": 60, "llava-next-video": 60, "llava-onevision": 60, "qwen2-vl": 9, "qwen2.5-vl": 9, "qwen3-vl": 9,
    "idefics3": 30, "smolvlm": 30, "internvl": 15, "phi4-multimodal": 600,
}  # fmt: skip
"""Row of `TINY` whose images have different numbers of tokens -> a budget that large ones exceed."""
FIXED = {"llava-1.5": 16, "llava-interleave": 16, "paligemma": 16, "gemma3": 10, "mllama": 1}
"""The others -> the tokens of every image."""
FEW = ("qwen2.5-vl", "llava-onevision", "smolvlm")
EXTREME = [(300, 1), (1, 300), (1, 1), (2, 3), (10_000, 10_000), (10_000, 500), (500, 10_000), (4000, 3000)]
"""Heights and widths."""


def make_processor(name: str) -> FamilyProcessor:
    return FamilyProcessor(TINY[name].processor(), FAMILIES[TINY[name].model_type])


@cache
def make_limited(name: str, budget: int) -> FamilyProcessor:
    processor = make_processor(name)
    limit_image_tokens(processor, PreTrainedConfig(), budget)
    return processor


def test_every_family_is_here():
    assert {*BUDGETS, *FIXED} == set(TINY)


def slow_but(names: tuple[str, ...], of: object) -> list[object]:
    """The names, each but a few marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize("name", slow_but(FEW, BUDGETS))
def test_no_image_of_any_size_takes_more_than_the_budget(name: str):
    processor, before, budget = make_limited(name, BUDGETS[name]), make_processor(name), BUDGETS[name]
    meters = ImageMeter(processor), ImageMeter(before)
    settings = [each.native.image_processor.to_dict() for each in (processor, before)]
    draw = random.Random(0)
    random_sizes = [(int(4000 ** draw.random()) + 5, int(4000 ** draw.random()) + 5) for _ in range(60)]
    sizes = EXTREME + random_sizes if meters[0].device == "meta" else random_sizes[:20]
    counts = {size: [meter(own, size) for meter, own in zip(meters, settings, strict=True)] for size in sizes}
    assert max(new or 0 for (h, w), (new, _) in counts.items() if max(h, w) <= 20 * min(h, w)) <= budget
    assert max(old or 0 for _, old in counts.values()) > budget
    for (height, width), (new, _) in counts.items():
        if new is None or height * width >= 10**6:
            continue
        refused = pytest.raises(ProcessorRefusalError, match="its sides differ too much")
        with refused if new > budget else nullcontext():
            ids, _ = processor.tokenize(processor.image_token, (), [(height, width)])
            assert len(ids) - len(processor.tokenize("", (), ())[0]) == new


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_number_of_tokens_is_taken_or_refused(name: str):
    processor = make_processor(name)
    settings = processor.to_dict()
    limit_image_tokens(processor, PreTrainedConfig(), FIXED[name])
    assert processor.native.image_processor.image_token_budget == FIXED[name]
    if FIXED[name] > 1:
        with pytest.raises(ValueError, match=rf"needs at least {FIXED[name]} tokens per image; give {FIXED[name]}"):
            limit_image_tokens(processor := make_processor(name), PreTrainedConfig(), FIXED[name] - 1)
        assert processor.to_dict() == settings


def test_frames_of_videos_take_no_more_than_the_budget():
    processor, before = make_limited("qwen2.5-vl", 9), make_processor("qwen2.5-vl")
    clips = [Clip(tuple(range(number)), number, 200, 300, 1.0) for number in (1, 2, 5, 8)]
    for clip in clips:
        new, old = (each.tokenize("<|video_pad|>", (), [clip])[0] for each in (processor, before))
        assert len(new) <= 9 * len(clip.frames)
        assert len(new) < len(old)


def test_frames_that_no_option_shrinks_are_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    with caplog.at_level(logging.INFO, "vlm"):
        limit_image_tokens(make_processor("internvl"), PreTrainedConfig(), 6)
        assert caplog.messages == ["dataset.max_image_tokens=6: max_patches 4 -> 1"]
        monkeypatch.setattr(VideoMeter, "_count", lambda self, expansion: 99)
        limit_image_tokens(make_processor("internvl"), PreTrainedConfig(), 15)
    assert caplog.messages[-1] == (
        "dataset.max_image_tokens=15: a frame of a video takes 99 tokens, which no option changes"
    )


def test_images_that_are_too_unequal_are_refused_with_the_number():
    processor = make_limited("qwen2.5-vl", 9)
    with pytest.raises(ProcessorRefusalError, match=r"190 x 1 pixels take \d+ tokens, more than the budget of 9"):
        processor.tokenize(processor.image_token, (), [(1, 190)])


def test_plain_transformers_sees_the_same_pixels_from_what_was_saved(tmp_path: Path):
    processor, image = make_limited("qwen2.5-vl", 9), Image.new("RGB", (300, 200))
    processor.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    theirs = plain.image_processor([image], return_tensors="pt")
    ours = processor.image_inputs([image])
    assert theirs["image_grid_thw"].prod() // 4 <= 9
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(("grid", "max_tiles"), [((2, 3), None), ((3, 3), 4), ((1, 6), 4), ((1, 1), None)])
def test_the_most_tokens_of_a_grid_are_not_exceeded_and_nearly_reached(grid: tuple[int, int], max_tiles: int | None):
    tiling = AnyRes([grid], 16, 4, max_tiles)
    sizes = [(height, width) for height in range(4, 130, 3) for width in range(4, 130, 3)]
    counts = [tiling.image_tokens([size])[0] for size in sizes]
    most = most_tile_tokens(tiling, grid)
    assert 0.85 * most <= max(counts) <= most


def test_a_composed_model_uses_the_grids_within_the_budget(common: list[str]):
    words = [*common, "model/anyres=llava-next", "dataset.image_mode=null"]
    _, whole = resolve_model(compose_config("pretrain-smol", words))
    assert whole.tiling is not None
    sizes = [(300, 300), (50, 400), (400, 50), (30, 30)]
    most = max(whole.tiling.image_tokens([size])[0] for size in sizes)
    square = len(whole.image_token_ids())
    limited = compose_config("pretrain-smol", [*words, f"dataset.max_image_tokens={most - 1}"])
    model_config, processor = resolve_model(limited)
    assert processor.tiling is not None
    assert 0 < len(processor.tiling.grids) < len(whole.tiling.grids)
    assert model_config.anyres == processor.anyres == vars(processor.tiling)  # pyright: ignore[reportAttributeAccessIssue]
    assert max(processor.tiling.image_tokens([size])[0] for size in sizes) < most
    alone, processor = resolve_model(compose_config("pretrain-smol", [*words, f"dataset.max_image_tokens={square}"]))
    assert alone.anyres is None
    assert processor.tiling is None
    with pytest.raises(ValueError, match=rf"the model needs at least {square} tokens per image"):
        resolve_model(compose_config("pretrain-smol", [*words, f"dataset.max_image_tokens={square - 1}"]))


def test_an_image_that_was_too_large_trains_and_is_seen_as_small_afterwards(
    train_whole: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With a budget, a run trains a record that it leaves out without one; what it saves answers about it."""
    save_family("qwen2.5-vl", tmp_path / "model")
    processor = json.loads((tmp_path / "model/processor_config.json").read_text())
    processor["image_processor"]["size"]["longest_edge"] = 100_000
    (tmp_path / "model/processor_config.json").write_text(json.dumps(processor))
    records = []
    for name, side in (("small", 24), ("large", 300)):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
    (tmp_path / "records.json").write_text(json.dumps(records))

    def start(folder: str, *words: str) -> Path:
        return train_whole(
            "finetune-llava-onevision", tmp_path / "model", tmp_path / folder, "trainer.deepspeed=null",
            "trainer.max_steps=1", "trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false",
            f"dataset.path={tmp_path / 'records.json'}", f"dataset.image_folder={tmp_path}", "dataset.max_length=128",
            "dataset.over_length=skip", "trainer.per_device_train_batch_size=2", "trainer.num_samples=0",
            "trainer.gradient_accumulation_steps=1", "trainer.train_sampling_strategy=random", *words,
        )  # fmt: skip

    dropped = (start("without") / "skipped.jsonl").read_text()
    assert "large" in dropped
    assert "dataset.max_image_tokens bounds the tokens of an image" in dropped
    run = start("with", "dataset.max_image_tokens=64")
    assert not (run / "skipped.jsonl").exists() or not (run / "skipped.jsonl").read_text()
    model = VisionLanguageModel.load(run / "final", device="cpu")
    count = len(model.processor.tokenize(model.processor.image_token, (), [(300, 300)])[0])
    assert 32 < count <= 64
    assert model.generate("what?", [tmp_path / "large.png"], max_new_tokens=2)
    again = VisionLanguageModel.load(run / "final", device="cpu", max_image_tokens=16)
    assert len(again.processor.tokenize(again.processor.image_token, (), [(300, 300)])[0]) <= 16
    words = ["-cn", "finetune-llava-onevision", f"trainer.from_pretrained={run / 'final'}"]
    data = [f"dataset.path={tmp_path / 'records.json'}", f"dataset.image_folder={tmp_path}"]
    main(["data", "show", "--output", str(tmp_path / "page.html"), *words, *data])
    shown = capsys.readouterr().out
    assert "dataset.max_image_tokens=64, " in shown
    assert f"300×300 (seen as 64×64, {count} tokens)" in shown
    assert "dataset.max_image_tokens=64" in (tmp_path / "page.html").read_text()


def test_the_grids_of_a_family_shrink_in_its_model_for_inference(tmp_path: Path):
    save_family("llava-next", tmp_path)
    model, processor = open_checkpoint(tmp_path).load_for_inference(device="cpu", max_image_tokens=60)
    ours = VisionLanguageModel(model, processor)
    assert len(model.config.image_grid_pinpoints) < 5
    assert ours.generate("what?", [Image.new("RGB", (300, 300))], max_new_tokens=2) is not None
