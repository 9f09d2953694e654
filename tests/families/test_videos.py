"""Videos in families that know them: each stays a video, with the family's own tokens and inputs, from file to loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from tests.data.vision.test_video import RATE, torn, write_video
from tests.families.test_families import load
from tests.families.tiny_families import TINY, save_family
from tests.fixtures import losses
from tests.logits import supervised_losses
from tests.tiny_parts import picture, runs
from tests.train.test_distributed_runs import WHOLE, launch
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image, dummy_video
from vlm.data.dataset import BlankImageDataset, encode_sample, load_dataset, model_inputs
from vlm.data.encoding.labels import encode, encode_prompt
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, Clip, ImageRef, Sample, Turn, VideoRef
from vlm.data.sources import Source, parts_for_video
from vlm.data.tools.show import as_text, load_shown_records, write_page
from vlm.data.vision.frames import sample_clip
from vlm.data.vision.images import media_sizes_from_opened, open_media, read_media_sizes
from vlm.data.vision.video import num_frames, open_video, read_frames
from vlm.evaluation.loss import row_losses
from vlm.families.processing import FamilyProcessor, load_family_processor
from vlm.families.table import FAMILIES
from vlm.families.videos import make_metadata
from vlm.inference.generate import VisionLanguageModel

MAX_FRAMES = 4
"""Frames that are seen of a video."""

NAMES = ["llava-next-video", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "smolvlm", "internvl"]
MARKERS = {"picture": "<image>", "long": "<video>", "short": "<video>"}
MIXED = [
    ["long"], ["picture", "short"], [], ["picture"], ["short", "picture", "long"], ["long", "short"],
]  # fmt: skip
"""What the records show: images, videos of 20 frames and of three, and text only."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`long.mp4`, `short.mp4`, `image.png`, a torn video, and a tiny model of each family."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "long.mp4", 20)
    write_video(root / "short.mp4", 3)
    picture(1, (40, 30)).save(root / "picture.png")
    (root / "torn.mp4").write_bytes(torn(root, "long.mp4", 0.9))
    for name in NAMES:
        save_family(name, root / name)
    return root


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each row of `TINY` that knows videos."""
    return request.param


@pytest.fixture
def processor(name: str, folder: Path) -> FamilyProcessor:
    """Its processor."""
    return load_family_processor(str(folder / name), FAMILIES[TINY[name].model_type])


def make_sample(
    processor: FamilyProcessor, folder: Path, shown: list[str], *replies: str, asked: str = "what?"
) -> Sample:
    """A conversation that begins with images and videos."""
    parts: list[Any] = []
    for one in shown:
        if one == "picture":
            parts.append(ImageRef(folder / "picture.png"))
        else:
            parts += parts_for_video(VideoRef(folder / f"{one}.mp4"), MAX_FRAMES, processor, "x")
    turns = [Turn("user", (*parts, asked))]
    for place, reply in enumerate(replies):
        turns += [Turn("user", ("and?",))] if place else []
        turns.append(Turn("assistant", (reply,)))
    return Sample("x", tuple(turns))


def item(processor: FamilyProcessor, sample: Sample) -> dict[str, Any]:
    """A sample as a data worker hands it on."""
    opened = open_media(sample)
    sizes = media_sizes_from_opened(sample.media, opened, processor)
    return model_inputs(processor, encode(processor, sample, sizes), opened, sizes)


def test_every_family_that_knows_videos_is_tested():
    made = {name: FamilyProcessor(tiny.processor(), FAMILIES[tiny.model_type]) for name, tiny in TINY.items()}
    assert [name for name, processor in made.items() if processor.videos is not None] == NAMES
    assert FAMILIES["smolvlm"].video_template == DEFAULT_CHAT_TEMPLATE


SHOWN = [["long"], ["short"], ["long", "long"], ["picture", "long"]]


@pytest.mark.parametrize("shown", SHOWN, ids="+".join)
def test_a_prompt_is_what_the_familys_own_processor_makes(
    name: str, processor: FamilyProcessor, folder: Path, shown: list[str]
):
    if name == "smolvlm" and "picture" in shown:
        pytest.skip("its own call keeps the pixels of the videos only")
    sample = make_sample(processor, folder, shown)
    content: list[dict[str, Any]] = []
    metadata = []
    for part, opened in zip(sample.media, open_media(sample), strict=True):
        if isinstance(part, VideoRef):
            frames = np.stack([np.asarray(frame) for frame in opened.frames])
            content.append({"type": "video", "video": frames})
            clip = opened.clip
            metadata.append({
                "total_num_frames": clip.total_frames, "fps": clip.fps, "frames_indices": list(clip.frames),
                "duration": clip.total_frames / clip.fps, "height": clip.height, "width": clip.width,
            })  # fmt: skip
        else:
            content.append({"type": "image", "image": opened})
    conversation = [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}]
    theirs = processor.native.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        processor_kwargs={"do_sample_frames": False, "video_metadata": metadata},
    )  # fmt: skip
    sizes = read_media_sizes(sample, processor)
    ids = encode_prompt(processor, sample.turns, sizes)
    assert ids == theirs["input_ids"][0].tolist()
    inputs = processor.image_inputs(open_media(sample), sizes)
    inputs |= processor.text_inputs(ids, [-100] * len(ids), inputs)
    assert inputs.keys() == theirs.keys() - {"input_ids", "attention_mask"}
    for key, value in inputs.items():
        expected = torch.as_tensor(theirs[key])
        assert torch.equal(value.flatten(), expected.flatten()), key
        assert key in processor.per_sample_inputs + processor.per_token_inputs or value.shape == expected.shape, key


def test_extracted_frames_are_the_video_that_they_are_of(
    name: str, processor: FamilyProcessor, folder: Path, tmp_path: Path
):
    """The same tokens, the same inputs."""
    path = folder / "long.mp4"
    refs = []
    for number, frame in enumerate(read_frames(path, range(num_frames(path, "x")), "x")):
        frame.save(tmp_path / f"{number}.png")
        refs.append(ImageRef(tmp_path / f"{number}.png", is_extracted=True))
    rate = sample_clip(VideoRef(path), MAX_FRAMES, "x").fps
    made = []
    for video in (VideoRef(path), VideoRef(path, frames=tuple(refs), rate=rate)):
        content = (*parts_for_video(video, MAX_FRAMES, processor, "x"), "what?")
        made.append(item(processor, Sample("x", (Turn("user", content), Turn("assistant", ("this",))))))
    assert made[0].keys() == made[1].keys()
    for key, value in made[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(made[1][key])), key


def test_times_are_the_true_ones(folder: Path):
    processor = load_family_processor(str(folder / "qwen3-vl"), FAMILIES["qwen3_vl"])
    sample = make_sample(processor, folder, ["long"])
    text = processor.tokenizer.decode(encode_prompt(processor, sample.turns, read_media_sizes(sample, processor)))
    frames = [2, 7, 12, 17]
    for first, last in (frames[:2], frames[2:]):
        assert f"<{(first / RATE + last / RATE) / 2:.1f} seconds>" in text


@pytest.mark.parametrize("shown", [["long"], ["picture", "short"]], ids="+".join)
def test_exactly_the_replies_are_supervised(name: str, processor: FamilyProcessor, folder: Path, shown: list[str]):
    """A token that somebody spelled is no video."""
    spelled = f"what is <video> {processor.video_token}?"
    sample = make_sample(processor, folder, shown, "a cat", "two <video>", asked=spelled)
    encoded = encode(processor, sample, read_media_sizes(sample, processor))
    before, end = (" ", "<end_of_utterance>") if name == "smolvlm" else ("", "<|end|>")  # `Assistant:` ends a prompt
    expected = [f"{before}{reply}{end}" for reply in ("a cat", "two <video>")]
    assert [processor.tokenizer.decode(run) for run in runs(encoded.labels)] == expected


def test_a_batch_gives_each_row_what_it_would_get_alone(name: str, processor: FamilyProcessor, folder: Path):
    model = load(folder / name)
    rows = [
        item(processor, make_sample(processor, folder, shown, "yes" * (1 + place))) for place, shown in enumerate(MIXED)
    ]
    apart = dummy_video(processor) if processor.encodes_videos_separately else None
    plain = Collator.of(processor, dummy_image(processor))

    def compute_losses(collate: Collator, chosen: list[dict[str, Any]]) -> torch.Tensor:
        batch = collate([dict(row) for row in chosen])
        with torch.no_grad():
            return row_losses(supervised_losses(model, batch), batch["labels"])[0]

    alone = torch.cat([compute_losses(plain, [row]) for row in rows])
    for collate in (plain, Collator.of(processor, dummy_image(processor), video_dummy=apart)):
        assert torch.allclose(compute_losses(collate, rows), alone, atol=1e-4)
        assert torch.allclose(torch.cat([compute_losses(collate, [row]) for row in rows]), alone, atol=1e-4)
        assert torch.allclose(compute_losses(collate, rows[:4]), alone[:4], atol=1e-4)


def test_ranks_make_the_same_calls(name: str, processor: FamilyProcessor, folder: Path):
    """Whatever a batch holds, once videos are among the data and there are several ranks."""
    model = load(folder / name)
    apart = dummy_video(processor) if processor.encodes_videos_separately else None
    calls: list[list[str]] = []
    for key, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, key=key: calls[-1].append(key))
    for video_dummy in (apart, None):
        collate = Collator.of(processor, dummy_image(processor), video_dummy=video_dummy)
        calls.clear()
        for shown in MIXED:
            batch = collate([item(processor, make_sample(processor, folder, shown, "yes"))])
            calls.append([])
            with torch.no_grad():
                model(**batch)
        assert all(made == calls[0] for made in calls) == (video_dummy is apart)


def records(folder: Path, path: Path) -> Path:
    """Records of all kinds, one of them with a torn video."""
    made = []
    for place, shown in enumerate([*MIXED, ["torn"]]):
        files = {"image": [], "video": []}
        for one in shown:
            files["image" if one == "picture" else "video"].append(f"{one}.png" if one == "picture" else f"{one}.mp4")
        marks = "".join(MARKERS.get(one, "<video>") for one in shown)
        turns = [{"from": "human", "value": f"{marks}\nwhat?"}, {"from": "gpt", "value": f"a thing {place}"}]
        made.append({"id": str(place), **files, "conversations": turns})
    path.write_text(json.dumps(made))
    return path


def test_what_is_counted_is_what_is_encoded(name: str, processor: FamilyProcessor, folder: Path, tmp_path: Path):
    config = DatasetConfig(
        path=str(records(folder, tmp_path / "records.json")), image_folder=str(folder), max_frames=MAX_FRAMES,
        on_bad_sample="skip", max_skipped=0.5, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    encoder = SampleEncoder(processor, 4096, truncate=False)
    data = load_dataset(config, encoder)
    items = [encode_sample(data.sources[0], data.sample(index)) for index in range(len(data))]
    assert data.lengths.tolist() == [len(one["input_ids"]) for one in items]
    assert data.num_images.tolist() == [len(shown) for shown in MIXED]
    assert data.has_videos
    (bad,) = data.skipped
    assert bad.id == "6"
    assert "torn.mp4 does not open" in bad.reason
    assert bad.file == str(folder / "torn.mp4")

    for place, blank in enumerate(BlankImageDataset(data)[index] for index in range(len(data))):
        assert blank.keys() == items[place].keys()
        assert blank["input_ids"] == items[place]["input_ids"]
        for key in blank.keys() & {"pixel_values", "pixel_values_videos"}:
            assert blank[key].shape == items[place][key].shape
            assert not torch.equal(blank[key], items[place][key])

    shown = list(load_shown_records(config, encoder, number=7))
    assert "video of 4 frames 64×48" in as_text(shown[0], colours=False)
    write_page(shown, tmp_path / "page.html")
    seen = {"picture": 1, "long": MAX_FRAMES, "short": MAX_FRAMES if processor.inputs.equal_num_frames else 3}
    expected = sum(seen[one] for row in MIXED for one in row)
    assert (tmp_path / "page.html").read_text().count("<img") == expected


def test_counting_decodes_nothing(name: str, processor: FamilyProcessor, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("vlm.data.vision.video.read_frames", refuse)
    sample = make_sample(processor, folder, ["long"], "yes")
    (clip,) = read_media_sizes(sample, processor)
    assert clip == Clip((2, 7, 12, 17), 20, 48, 64, RATE)
    assert len(encode(processor, sample, [clip]).input_ids) > MAX_FRAMES


def test_a_single_frame_will_do(name: str, processor: FamilyProcessor, folder: Path):
    """Also where a model joins two frames to one."""
    parts = parts_for_video(VideoRef(folder / "long.mp4"), 1, processor, "x")
    row = item(processor, Sample("x", (Turn("user", (*parts, "what?")), Turn("assistant", ("yes",)))))
    with torch.no_grad():
        assert load(folder / name)(**Collator.of(processor)([row])).loss.isfinite()


def test_a_broken_video_is_a_bad_sample(name: str, processor: FamilyProcessor, folder: Path):
    source = Source(
        "x", DatasetConfig(path=str(folder)), folder, SampleEncoder(processor, 512, truncate=False), MAX_FRAMES
    )
    record = {"id": "7", "video": "torn.mp4", "conversations": [
        {"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "that"},
    ]}  # fmt: skip
    with pytest.raises(BadSample, match=r"record '7': video .*torn.mp4 does not open"):
        source.read(record)
    (video,) = source.read({**record, "video": "long.mp4"}).videos
    assert video.clip == sample_clip(VideoRef(folder / "long.mp4"), MAX_FRAMES, "7")
    broken = VideoRef(folder / "torn.mp4", video.clip)
    with pytest.raises(BadSample, match=r"torn.mp4 does not open"):
        open_video(broken, "7")


def test_videos_of_other_numbers_of_frames_are_refused_where_a_model_cannot_take_them(folder: Path):
    processor = load_family_processor(str(folder / "llava-onevision"), FAMILIES["llava_onevision"])
    rows = []
    for frames in (2, 4):
        video = VideoRef(folder / "long.mp4", sample_clip(VideoRef(folder / "long.mp4"), frames, "x"))
        sample = Sample("x", (Turn("user", (video, "what?")), Turn("assistant", ("yes",))))
        rows.append(item(processor, sample))
    with pytest.raises(ValueError, match=r"videos of one number of frames in a batch, got \[2, 4\]"):
        Collator.of(processor)(rows)


def test_training_and_asking(name: str, folder: Path, train_whole: Callable[..., Path], tmp_path: Path):
    run = train_whole(
        "finetune-llava-onevision", folder / name, tmp_path / "run", "trainer.deepspeed=null", "trainer.max_steps=2",
        f"dataset.path={records(folder, tmp_path / 'records.json')}", f"dataset.image_folder={folder}",
        f"dataset.max_frames={MAX_FRAMES}", "dataset.on_bad_sample=skip", "dataset.max_skipped=0.5",
        "dataset.eval_split=0.2",
        "trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false", "dataset.max_length=2048",
        "trainer.learning_rate.connector_learning_rate=1e-2", "trainer.learning_rate.visual_encoder_learning_rate=1e-2",
        "trainer.learning_rate.language_model_learning_rate=1e-2", "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=1", "model.attn_implementation=eager",
        "trainer.train_sampling_strategy=random", "trainer.warmup_steps=0",
    )  # fmt: skip
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line and line["loss"] > 0 for line in logged) == 2
    assert "<mark>" in (run / "first_batch.html").read_text()
    ours = VisionLanguageModel.load(run / "final", device="cpu")
    videos = [folder / "long.mp4", folder / "short.mp4"]
    asked = "<video> or <image> or <video>?"
    assert isinstance(
        ours.generate(asked, [folder / "picture.png"], videos, max_new_tokens=2, max_frames=MAX_FRAMES), str
    )
    turn, _ = ours.open_question(asked, [folder / "picture.png"], videos, MAX_FRAMES)
    assert [type(part) for part in turn.content] == [VideoRef, str, ImageRef, str, VideoRef, str]
    together = ours.generate(["<video>?", "what?"], videos=[videos[:1], videos[1:]], max_new_tokens=2, do_sample=False)
    assert together[0] == ours.generate("<video>?", videos=videos[:1], max_new_tokens=2)
    with pytest.raises(ValueError, match="the prompt has 1 <video>, but 2 videos were given"):
        ours.generate("<video>?", videos=videos)
    with pytest.raises(ValueError, match=r"torn.mp4 does not open"):
        ours.generate("what?", videos=[folder / "torn.mp4"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-onevision", "qwen3-vl"], indirect=True)
def test_two_ranks_reach_the_single_process(
    name: str, folder: Path, brief: list[str], train_whole: Callable[..., Path], tmp_path: Path
):
    """ZeRO-3, all parts training: ranks that see images, videos, both and neither at the same step."""
    made = json.loads(records(folder, tmp_path / "records.json").read_text())[:-1]
    rows = [made[0], made[3], made[1], made[2], made[2], made[4], made[3], made[5]]
    (tmp_path / "records.json").write_text(json.dumps([{**row, "id": str(place)} for place, row in enumerate(rows)]))
    words = [
        *WHOLE, f"dataset.path={tmp_path / 'records.json'}", f"dataset.image_folder={folder}",
        f"dataset.max_frames={MAX_FRAMES}", "dataset.max_length=2048",
    ]  # fmt: skip
    run = "finetune-llava-onevision"
    size = "trainer.per_device_train_batch_size="
    alone = train_whole(run, folder / name, tmp_path / "single", *words, "trainer.deepspeed=null", f"{size}2")
    words = ["-cn", run, *brief, *words, f"model.hf_name={folder / name}", "trainer.deepspeed=zero3"]
    launch([*words, f"trainer.output_dir={tmp_path / 'two'}", f"{size}1"])
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=5e-4)


def test_frames_of_a_variable_rate_have_their_own_times():
    """Transformers takes a frame's index over the rate for its time."""
    clip = Clip((6, 10, 13, 18), 20, 48, 64, 2.0, (0.6, 1.0, 4.0, 9.033))
    metadata = make_metadata(clip)
    assert metadata.timestamps == list(clip.times or ())
    assert metadata.duration == 10
    assert metadata.sampled_fps == 0.4
    constant = make_metadata(Clip((2, 7), 20, 48, 64, 29.97))
    assert (constant.frames_indices, constant.fps, constant.total_num_frames) == ([2, 7], 29.97, 20)
