"""Pictures in tiles through a run: counted as they are encoded, trained, saved, asked, and kept by further stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from tests.data.vision.test_video import write_video
from tests.fixtures import losses
from tests.tiny_parts import Parts, picture
from tests.train.test_distributed_runs import launch
from vlm.assembly.compose import build_model, compose
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.model_schema import AnyResConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import BlankImageDataset, SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.inference.generate import VisionLanguageModel
from vlm.train.checkpoints.find import find_whole_checkpoint

GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
SHAPES = [(40, 30), (20, 90), (24, 24), (70, 10)]
"""Widths and heights."""


@pytest.fixture(scope="module")
def tiled(parts: Parts) -> tuple[Any, Any]:
    """A tiny model that sees pictures in tiles, and its processor."""
    recipe = parts.recipe("siglip")
    recipe.anyres = AnyResConfig(GRIDS)
    config, processor = compose(recipe, None, None)
    return build_model(recipe, config, processor, torch.float32, seed=0), processor


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one picture, of none, of several, of a video, and of a video beside a picture."""
    folder = tmp_path_factory.mktemp("records")
    for number, shape in enumerate(SHAPES):
        picture(number, shape).save(folder / f"{number}.png")
    Image.new("RGB", (50, 30), "red").save(folder / "red.jpg")
    write_video(folder / "clip.mp4", 6)
    seen = [{"image": ["0.png"]}, {}, {"image": ["1.png", "2.png"]}, {"video": ["clip.mp4"]}, {"image": ["red.jpg"]},
            {"video": ["clip.mp4"], "image": ["3.png"]}]  # fmt: skip
    made = []
    for number, media in enumerate(seen):
        slots = "".join(f"<{kind}>\n" * len(files) for kind, files in media.items())
        turns = [{"from": "human", "value": slots + "what?"}, {"from": "gpt", "value": "a cat " * (1 + number)}]
        made.append({"id": f"r{number}", **media, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(made))
    return folder / "records.json"


@pytest.fixture(scope="module")
def data(tiled, records: Path) -> SampleDataset:
    config = DatasetConfig(path=str(records), max_frames=3, max_length=None)
    return load_dataset(config, SampleEncoder(tiled[1], 4096, truncate=False))


def normalised(processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "pixel_values": processor.normalise(batch["pixel_values"])}


def test_counted_lengths_are_encoded_lengths(data: SampleDataset):
    items: list[Any] = [data[index] for index in range(len(data))]
    assert [len(item["input_ids"]) for item in items] == data.lengths.tolist()
    views = [item["image_views"].tolist() if "image_views" in item else [] for item in items]
    assert views[1] == []
    assert views[2] == [1, 1]
    assert views[3] == [0, 0, 0]
    assert views[5][1:] == [0, 0, 0]
    assert min(views[0][0], views[4][0], views[5][0]) > 1  # the only picture beside a video is tiled


def test_every_batch_makes_the_same_module_calls(tiled, data: SampleDataset):
    """Encoder, connector and newline once in each forward pass, with gradients, whatever the pictures are."""
    model, processor = tiled
    collate = Collator.of(processor, dummy_image(processor))
    batches = [collate([data[index] for index in rows]) for rows in ([0, 1, 2, 3, 4, 5], [1], [3], [2])]
    counts: list[list[int]] = []
    model.train()
    for batch in batches:
        calls = [0, 0, 0]
        modules = (model.visual_encoder, model.connector, model.image_newline)

        def counted(place: int, calls: list[int] = calls) -> Callable[..., None]:
            return lambda *_: calls.__setitem__(place, calls[place] + 1)

        handles = [module.register_forward_pre_hook(counted(place)) for place, module in enumerate(modules)]
        model.zero_grad()
        model(**normalised(processor, batch)).loss.backward()
        for handle in handles:
            handle.remove()
        counts.append(calls)
        trained = [*model.connector.parameters(), *model.image_newline.parameters()]
        assert all(parameter.grad is not None for parameter in trained)
    assert counts == [[1, 1, 1]] * len(batches)
    assert model.image_newline.weight.grad.abs().max() > 0


def test_a_dummy_is_a_frame_and_changes_no_loss(tiled, data: SampleDataset):
    model, processor = tiled
    ids, inputs = dummy_image(processor)
    assert ids.count(processor.image_token_id) == 4
    assert inputs["image_views"].tolist() == [0]
    plain = model(**Collator.of(processor)([data[1]])).loss
    with_dummy = model(**normalised(processor, Collator.of(processor, (ids, inputs))([data[1]]))).loss
    assert torch.allclose(plain, with_dummy, atol=1e-6)


def test_blank_pictures_are_as_large(data: SampleDataset):
    blank = BlankImageDataset(data)
    for index in range(len(data)):
        item: Any = data[index]
        other = blank[index]
        assert list(other["input_ids"]) == list(item["input_ids"])
        if "image_views" in item:
            assert torch.equal(other["image_views"], item["image_views"])
            assert other["pixel_values"].shape == item["pixel_values"].shape
            assert not torch.equal(other["pixel_values"], item["pixel_values"])


def test_a_row_is_answered_as_alone(tiled, data: SampleDataset):
    """Tiles of one row do not leak into another: padded together or by itself, its logits are the same."""
    model, processor = tiled
    model.eval()
    collate = Collator.of(processor)
    whole = {name: value for name, value in collate([data[i] for i in range(6)]).items() if name != "labels"}
    with torch.no_grad():
        together = model(**normalised(processor, whole)).logits
        for index in (0, 2, 3, 4, 5):
            batch = {name: value for name, value in collate([data[index]]).items() if name != "labels"}
            alone = model(**normalised(processor, batch)).logits[0]
            assert torch.allclose(together[index, : len(alone)], alone, atol=1e-5)


def test_placeholders_that_do_not_fit_name_the_row(tiled, data: SampleDataset):
    model, processor = tiled
    batch = normalised(processor, Collator.of(processor)([data[0], data[1], data[4]]))
    rows = [int((ids == processor.image_token_id).sum()) for ids in batch["input_ids"]]
    moved = {**batch, "input_ids": batch["input_ids"].clone()}
    place = int((batch["input_ids"][2] == processor.image_token_id).nonzero()[0])
    moved["input_ids"][2, place] = 5  # one too few in a row, one too many in another: as many as before
    moved["input_ids"][1, 0] = processor.image_token_id
    with pytest.raises(ValueError, match=rf"row 1 does not fit: row -> count {{0: {rows[0]}, 1: 1, 2: {rows[2] - 1}}}"):
        model(**moved)
    with pytest.raises(ValueError, match="image_sizes and image_views are missing"):
        model(**{name: value for name, value in batch.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match=r"are \d+ views, but pixel_values hold"):
        model(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    with pytest.raises(ValueError, match="1 sizes of images given, but the text has 2 <image>"):
        processor.tokenize("<image> <image>", (), [(3, 4)])


def test_plain_transformers_ask_it(tiled, tmp_path: Path):
    """The processor's own call, the chat template, generation and the pipeline, for one picture and for several."""
    model, processor = tiled
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded.image_newline.weight, model.image_newline.weight)
    reader = AutoProcessor.from_pretrained(tmp_path)
    assert reader.anyres == processor.anyres == loaded.config.anyres
    items = [{"type": "image", "image": picture(number, shape)} for number, shape in enumerate(SHAPES)]
    asked = {"type": "text", "text": "what is it?"}
    talks = [[{"role": "user", "content": [*seen, asked]}] for seen in ([items[0]], [], items[1:3], [items[3]])]
    inputs = reader.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["image_views"].tolist()[1:3] == [1, 1]
    assert inputs["image_sizes"].tolist() == [[height, width] for width, height in SHAPES]
    answers = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    ready = VisionLanguageModel(loaded, reader)
    for row, talk in enumerate(talks):
        single = reader.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
        alone = loaded.generate(**single, max_new_tokens=4, do_sample=False)
        assert answers[row, -4:].tolist() == alone[0, -4:].tolist()
    said = ready.generate("<image>what is it?", [picture(0, SHAPES[0])], max_new_tokens=4)
    ask: Any = pipeline("image-text-to-text", model=loaded, processor=reader)
    answer = ask(text=talks[0], max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == said
    assert set(reader(images=[picture(0), picture(1)])) == {"pixel_values", "image_sizes", "image_views"}


# Runs

TILED = ("model.anyres.grids=[[1,2],[2,1],[2,2]]", "dataset.max_length=256")


@pytest.fixture(scope="module")
def trained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the connector on tiles, evaluated at its end."""
    folder = tmp_path_factory.mktemp("runs") / "tiled"
    return train(
        "pretrain-smol", folder, *TILED, "dataset.eval_split=0.25", "trainer.eval_strategy=epoch",
        "trainer.num_train_epochs=1",
    )  # fmt: skip


def test_a_run_trains_the_newline_with_the_connector(trained: Path):
    state = load_file(Path(find_whole_checkpoint(trained) or "") / "trained.safetensors")
    assert "image_newline.weight" in state
    assert all(name.startswith(("connector.", "image_newline.")) for name in state)
    final = load_file(trained / "final" / "model.safetensors")
    assert torch.equal(final["image_newline.weight"], state["image_newline.weight"])
    assert "**answer**" in (trained / "samples.md").read_text()
    ready = VisionLanguageModel.load(trained / "final", device="cpu")
    assert ready.processor.anyres["grids"] == [[1, 2], [2, 1], [2, 2]]
    assert isinstance(ready.generate("what?", [picture()], max_new_tokens=2), str)


def test_a_further_stage_keeps_the_tiles(trained: Path, train: Callable[..., Path], tmp_path: Path):
    start = f"trainer.from_pretrained={trained / 'final'}"
    second = train("pretrain-smol", tmp_path / "b", start, "trainer.max_steps=1", "trainer.num_samples=0")
    config = json.loads((second / "final" / "config.json").read_text())
    assert config["anyres"]["grids"] == [[1, 2], [2, 1], [2, 2]]
    assert "image_newline.weight" in load_file(second / "final" / "model.safetensors")
    with pytest.raises(ValueError, match=r"dataset.image_mode=pad: with model.anyres"):
        train("pretrain-smol", tmp_path / "c", start, "dataset.image_mode=pad", "trainer.max_steps=1")


def test_a_stage_may_begin_with_tiles_and_end_them(train: Callable[..., Path], tmp_path: Path):
    """As LLaVA-NeXT's second stage does: its checkpoint knows squares only, and the newline starts fresh."""
    short = ("trainer.max_steps=1", "trainer.num_samples=0")
    first = train("pretrain-smol", tmp_path / "a", *short)
    assert "image_newline.weight" not in load_file(first / "final" / "model.safetensors")
    second = train("pretrain-smol", tmp_path / "b", f"trainer.from_pretrained={first / 'final'}", *TILED, *short)
    newline = load_file(second / "final" / "model.safetensors")["image_newline.weight"]
    assert 0.05 < newline.std() < 0.5
    recipe = json.loads((second / "final" / "config.json").read_text())["recipe"]
    assert recipe["anyres"]["grids"] == [[1, 2], [2, 1], [2, 2]]
    third = train("pretrain-smol", tmp_path / "c", f"trainer.from_pretrained={second / 'final'}",
                  "model.anyres.grids=[]", *short)  # fmt: skip
    assert "image_newline.weight" not in load_file(third / "final" / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_with_other_tiles_reach_the_single_process(
    common: list[str], train: Callable[..., Path], trained: Path, tmp_path: Path
):
    """ZeRO-3: a rank without pictures, or with fewer tiles, waits for no other, and generation finds the newline."""
    words = [
        f"trainer.from_pretrained={trained / 'final'}", "trainer.learning_rate.language_model_learning_rate=1e-3",
        "trainer.train_sampling_strategy=sequential", "trainer.max_steps=4",
    ]  # fmt: skip
    single = train("finetune-smol", tmp_path / "single", *words, "trainer.per_device_train_batch_size=2")
    launch([
        "-cn", "finetune-smol", *common, *words, "trainer.per_device_train_batch_size=1", "trainer.deepspeed=zero3",
        f"trainer.output_dir={tmp_path / 'two'}",
    ])  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=2e-4)
    newlines = [load_file(folder / "final" / "model.safetensors")["image_newline.weight"]
                for folder in (tmp_path / "two", single, trained)]  # fmt: skip
    assert torch.allclose(newlines[0], newlines[1], atol=1e-4)
    assert not torch.equal(newlines[1], newlines[2])
    assert "**answer**" in (tmp_path / "two" / "samples.md").read_text()


# Refusals


@pytest.mark.parametrize(
    ("recipe", "image_mode", "message"),
    [
        ({"connector": "resampler", "options": {"num_queries": 4}}, None, "resampler makes form no grid"),
        ({"strategy": "cls+patch"}, None, "no grid"),
        ({}, "pad", "dataset.image_mode=square is needed"),
    ],
)
def test_parts_that_give_no_grid_are_refused(parts: Parts, recipe: dict[str, Any], image_mode, message: str):
    wanted = parts.recipe("clip", **recipe)
    wanted.anyres = AnyResConfig(GRIDS)
    with pytest.raises(ValueError, match=message):
        compose(wanted, None, image_mode)


@pytest.mark.parametrize("options", [{"factor": 3}, {"factor": 1}])
def test_connectors_that_keep_a_smaller_grid_tile_too(parts: Parts, options: dict[str, Any]):
    recipe = parts.recipe("siglip", connector="pixel_shuffle", options=options)
    recipe.anyres = AnyResConfig(GRIDS)
    config, processor = compose(recipe, None, None)
    model = build_model(recipe, config, processor, torch.float32, seed=0).eval()
    inputs = processor(images=[picture(0, shape) for shape in SHAPES], text=["<image> a cat"] * len(SHAPES))
    assert model(**inputs).logits.isfinite().all()
