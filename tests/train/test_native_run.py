"""Images at native resolution through a run: counted as they are encoded, trained, packed, saved, asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.data.vision.test_video import write_video
from tests.fixtures import losses
from tests.tiny_parts import NATIVE_ENCODERS, Parts, picture
from tests.train.step.test_packing import gradients
from vlm.assembly.packed_attention import use_packed_attention
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import BlankImageDataset, SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.inference.generate import VisionLanguageModel

SHAPES = [(40, 30), (20, 90), (24, 24), (70, 10)]
"""Widths and heights."""


@pytest.fixture(scope="module", params=NATIVE_ENCODERS)
def built(request: pytest.FixtureRequest, parts: Parts) -> tuple[Any, Any]:
    """A tiny model that reads images at native resolution, and its processor."""
    return parts.model(request.param, "llama", connector="pixel_shuffle", image_mode="native")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one image, of none, of several, and of a video beside an image."""
    folder = tmp_path_factory.mktemp("records")
    for number, shape in enumerate(SHAPES):
        picture(number, shape).save(folder / f"{number}.png")
    write_video(folder / "clip.mp4", 6)
    seen = [{"image": ["0.png"]}, {}, {"image": ["1.png", "2.png"]}, {"video": ["clip.mp4"], "image": ["3.png"]}]
    made = []
    for number, media in enumerate(seen):
        slots = "".join(f"<{kind}>\n" * len(files) for kind, files in media.items())
        turns = [{"from": "human", "value": slots + "what?"}, {"from": "gpt", "value": "a cat " * (1 + number)}]
        made.append({"id": f"r{number}", **media, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(made))
    return folder / "records.json"


@pytest.fixture(scope="module")
def data(built: tuple[Any, Any], records: Path) -> SampleDataset:
    config = DatasetConfig(path=str(records), max_frames=3, max_length=None)
    return load_dataset(config, SampleEncoder(built[1], 4096, truncate=False))


def normalised(processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "pixel_values": processor.normalise(batch["pixel_values"])} if "pixel_values" in batch else batch


def test_counted_lengths_are_encoded_lengths(data: SampleDataset):
    items: list[Any] = [data[index] for index in range(len(data))]
    assert [len(item["input_ids"]) for item in items] == data.lengths.tolist()
    grids = [item["image_grids"].tolist() if "image_grids" in item else [] for item in items]
    assert [len(each) for each in grids] == [1, 0, 2, 4]
    assert grids[2][0] != grids[2][1]


def test_a_row_is_read_as_alone_and_a_packed_row_too(built: tuple[Any, Any], data: SampleDataset):
    model, processor = built
    model.eval()  # DINOv3 draws random positions while it trains
    padded = Collator.of(processor, dummy_image(processor))
    logits, expected = [], {}
    for index in range(len(data)):
        outputs = model(**normalised(processor, dict(padded([data[index]]))), num_items_in_batch=1)
        outputs.loss.backward()
        logits.append(outputs.logits.detach())
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient
    items: list[Any] = [data[index] for index in range(len(data))]
    for collate in (padded, PackingCollator(padded)):
        batch = normalised(processor, dict(collate(items)))
        with use_packed_attention(model.config.get_text_config()):
            if collate is padded:
                model.language_model.config._attn_implementation = {"": "sdpa"}
            outputs = model(**batch, num_items_in_batch=1, use_cache=False)
            outputs.loss.backward()
        torch.testing.assert_close(outputs.logits.detach(), torch.cat(logits), atol=1e-5, rtol=1e-4)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3, msg=name)


def test_every_parameter_that_is_read_gets_a_gradient(built: tuple[Any, Any], data: SampleDataset):
    model, processor = built
    model(**normalised(processor, dict(Collator.of(processor)([data[0]])))).loss.backward()
    named = model.visual_encoder.named_parameters()
    without = {name for name, parameter in named if parameter.grad is None}
    model.zero_grad()
    assert without == set(model.config.unread_parameters)


def test_blank_images_are_as_large_and_a_dummy_changes_nothing(built: tuple[Any, Any], data: SampleDataset):
    model, processor = built
    blank = BlankImageDataset(data)
    for index in range(len(data)):
        item: Any = data[index]
        assert list(blank[index]["input_ids"]) == list(item["input_ids"])
    model.eval()
    plain = model(**Collator.of(processor)([data[1]])).loss
    with_dummy = model(**normalised(processor, dict(Collator.of(processor, dummy_image(processor))([data[1]])))).loss
    assert torch.allclose(plain, with_dummy, atol=1e-6)


def test_inputs_that_do_not_fit_are_refused(built: tuple[Any, Any], data: SampleDataset):
    model, processor = built
    batch = normalised(processor, dict(Collator.of(processor)([data[0], data[2]])))
    with pytest.raises(ValueError, match="pixel_values and image_grids are missing"):
        model(**{name: value for name, value in batch.items() if name != "image_grids"})
    with pytest.raises(ValueError, match=r"are \d+ patches, but pixel_values hold"):
        model(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    moved = batch["input_ids"].clone()
    moved[0, int((moved[0] == processor.image_token_id).nonzero()[0])] = 5
    with pytest.raises(ValueError, match="row 0 does not fit"):
        model(**{**batch, "input_ids": moved})


def test_plain_transformers_ask_it(built: tuple[Any, Any], tmp_path: Path):
    model, processor = built
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    reader = AutoProcessor.from_pretrained(tmp_path)
    assert reader.native == processor.native == loaded.config.native
    items = [{"type": "image", "image": picture(number, shape)} for number, shape in enumerate(SHAPES)]
    asked = {"type": "text", "text": "what is it?"}
    talks = [[{"role": "user", "content": [*seen, asked]}] for seen in ([items[0]], [], items[1:3], [items[3]])]
    inputs = reader.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    answers = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    for row, talk in enumerate(talks):
        single = reader.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
        alone = loaded.generate(**single, max_new_tokens=4, do_sample=False)
        assert answers[row, -4:].tolist() == alone[0, -4:].tolist()


# Runs


def test_a_run_packs_evaluates_and_resumes(train: Callable[..., Path], parts: Parts, tmp_path: Path):
    encoder = f"model.visual_encoder.hf_name={parts.encoder('siglip2_naflex')}"
    words = (
        encoder, "model/connector=mlp",
        "model.native.max_tokens=40", "dataset.max_length=512", "dataset.eval_split=0.25", "trainer.packing=true",
        "trainer.max_tokens_per_batch=512", "trainer.eval_strategy=epoch", "trainer.num_train_epochs=1",
        "trainer.learning_rate.visual_encoder_learning_rate=1e-4",
    )  # fmt: skip
    run = train("finetune-smol", tmp_path / "run", *words)
    assert all(torch.isfinite(torch.tensor(losses(run))))
    assert "**answer**" in (run / "samples.md").read_text()
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["native"]["max_patches"] == 40
    ready = VisionLanguageModel.load(run / "final", device="cpu")
    assert isinstance(ready.generate("what?", [picture()], max_new_tokens=2), str)
    start = (encoder, f"trainer.from_pretrained={run / 'final'}")
    second = train("finetune-smol", tmp_path / "second", *start, "trainer.max_steps=1", "trainer.num_samples=0",
                   "dataset.max_length=512", "trainer.learning_rate.visual_encoder_learning_rate=1e-4")  # fmt: skip
    assert json.loads((second / "final" / "config.json").read_text())["native"] == config["native"]
    with pytest.raises(ValueError, match=r"dataset.image_mode=pad: .* was trained on native images"):
        train("finetune-smol", tmp_path / "third", *start, "dataset.image_mode=pad")
    with pytest.raises(ValueError, match=r"dataset.cache_features=true: images at native resolution"):
        train("pretrain-smol", tmp_path / "fourth", *start, "dataset.cache_features=true")
