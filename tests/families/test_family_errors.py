"""Images and videos that a family's own processor refuses: the record is named with file and reason, others go on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.families.tiny_families import TINY, save_family
from tests.tiny_parts import picture
from vlm.assembly.family import load_family_config, load_family_model
from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.schema import InferenceConfig
from vlm.data.dataset import load_dataset, model_inputs
from vlm.data.encoding.labels import encode
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.sample import BadSample, Clip, ImageRef, MediaSize, Sample, Turn, VideoRef
from vlm.data.skipped import Skipped
from vlm.data.sources import make_sources
from vlm.data.token_counts import TokenCounter, count_record
from vlm.data.tools.show import load_shown_records
from vlm.data.vision.images import Medium
from vlm.data.vision.video import DecodedVideo
from vlm.families.processing import FamilyProcessor, load_family_processor
from vlm.families.table import FAMILIES
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.generate_file import generate_file

EXTREME_SIZES = [(300, 1), (1, 300), (1, 1), (2, 3), (3, 1)]
"""Widths and heights."""
WITH_VIDEOS = ("llava-next-video", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "smolvlm", "internvl")
REFUSES_LINES = {"qwen2-vl", "qwen2.5-vl", "qwen3-vl", "phi4-multimodal"}
"""Families that refuse images 300 times as wide as high."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a row of `TINY`, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            save_family(name, root / name)
        return root / name

    return folder


def load_processor(name: str, folders: Callable[[str], Path]) -> FamilyProcessor:
    return load_family_processor(str(folders(name)), FAMILIES[TINY[name].model_type])


def is_taken(processor: FamilyProcessor, sample: Sample, medium: Medium, size: MediaSize) -> bool:
    """Whether a sample of one image or video is encoded; a refusal must be a bad sample that names the file."""

    def make_inputs(sample: Sample) -> object:
        return model_inputs(processor, encode(processor, sample, [size]), [medium], [size], sample)

    problem = value_or_bad_sample(make_inputs, sample)
    if not isinstance(problem, BadSample):
        return True
    assert problem.__cause__ is not None
    assert problem.file == str(sample.media[0].path), problem
    assert "the processor refuses" in problem.reason
    return False


@pytest.mark.parametrize("name", TINY)
def test_images_of_extreme_sizes_are_encoded_or_named(name: str, folders: Callable[[str], Path]):
    processor = load_processor(name, folders)
    sample = Sample("x", (Turn("user", (ImageRef(Path("line.png")), "what?")), Turn("assistant", ("a",))))
    for width, height in EXTREME_SIZES:
        taken = is_taken(processor, sample, Image.new("RGB", (width, height)), (height, width))
        assert taken != (name in REFUSES_LINES) or (width, height) not in EXTREME_SIZES[:2]


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos_of_extreme_sizes_are_encoded_or_named(name: str, folders: Callable[[str], Path]):
    processor = load_processor(name, folders)
    number = processor.inputs.min_frames
    for width, height in EXTREME_SIZES:
        clip = Clip(tuple(range(number)), number, height, width, 1.0)
        sample = Sample("x", (Turn("user", (VideoRef(Path("a.mp4"), clip), "what?")), Turn("assistant", ("a",))))
        video = DecodedVideo([Image.new("RGB", (width, height))] * number, clip)
        taken = is_taken(processor, sample, video, clip)
        assert taken != name.startswith("qwen") or (width, height) not in EXTREME_SIZES[:2]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Three records of an image each; the first one is a line."""
    Image.new("RGB", (300, 1)).save(tmp_path / "line.png")
    picture(1, (40, 30)).save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a"}]
    lines = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in ("line", "red", "red")]
    (tmp_path / "records.json").write_text(json.dumps(lines))
    return tmp_path / "records.json"


def test_counting_training_and_showing_leave_out_the_record(records: Path, folders: Callable[[str], Path]):
    encoder = SampleEncoder(load_processor("qwen2.5-vl", folders), 500, truncate=False)
    config = DatasetConfig(path=str(records), cache_dir=str(records.parent / "cache"), max_skipped=0.5)
    config.on_bad_sample = "error"
    with pytest.raises(ValueError, match=r"record 0: record 'line': the processor refuses image .*line\.png: absolute"):
        load_dataset(config, encoder)
    config.on_bad_sample = "skip"
    data = load_dataset(config, encoder)
    assert len(data) == 2
    (skipped,) = data.skipped
    assert (skipped.record, skipped.id, skipped.file) == (0, "line", str(records.parent / "line.png"))
    assert not any(isinstance(data[index], Skipped) for index in range(2))
    (source,) = make_sources(config, encoder)
    assert count_record(source, 0, decode=True, counter=TokenCounter(encoder))[-2] == skipped.reason
    problems = [shown.problem for shown in load_shown_records(config, encoder, number=3)]
    assert problems == [skipped.reason, None, None]


def test_a_file_of_questions_and_a_question_say_why(records: Path, folders: Callable[[str], Path], tmp_path: Path):
    name = str(folders("qwen2.5-vl"))
    model = load_family_model(name, load_family_config(name), dtype="auto")
    ours = VisionLanguageModel(model, load_processor("qwen2.5-vl", folders))
    with pytest.raises(ValueError, match=r"^the processor refuses image .*: absolute aspect ratio"):
        ours.generate("what?", [str(records.parent / "line.png")])
    rows = generate_file(
        ours,
        SourceConfig(path=str(records)),
        tmp_path / "answers.jsonl",
        InferenceConfig(max_new_tokens=2),
        cache=tmp_path / "cache",
        fingerprint="x",
        num_workers=0,
        max_frames=2,
    )
    assert ["absolute aspect ratio" in str(row["error"]) for row in rows] == [True, False, False]
    assert rows[0]["image_path"] == str(records.parent / "line.png")
    assert rows[1]["answer"] is not None
