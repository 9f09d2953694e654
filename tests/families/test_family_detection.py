"""A detection set is finetuned, measured by its boxes and drawn: on a Qwen-like and on a PaliGemma-like model."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.families.test_families import folders
from vlm.cli.main import main
from vlm.data.records.objects import read_object
from vlm.evaluation.object_metrics import OBJECT_METRICS, ObjectAnswer, pair_value
from vlm.inference.generate import VisionLanguageModel

FIXTURES = (folders,)
"""Of the other file of this folder; pytest finds them by their names."""

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
SIDE, CELL = 32, 8
METRICS = "trainer.eval_metrics=[iou,acc@0.5,point_in_box,exact_match]"
CONVENTIONS = {"qwen2.5-vl": "qwen2.5-vl", "paligemma": "paligemma"}


def make_detections(folder: Path, number: int, seed: int) -> Path:
    """Coloured rectangles on grey, whose corners lie on a grid; every third file has to be turned upright."""
    folder.mkdir()
    chance = random.Random(seed)
    records = []
    for index in range(number):
        x, y = (sorted(chance.sample(range(0, SIDE + 1, CELL), 2)) for _ in range(2))
        box = [x[0], y[0], x[1], y[1]]
        label, colour = chance.choice(list(COLOURS.items()))
        image = Image.new("RGB", (SIDE, SIDE), (chance.randint(90, 160),) * 3)
        image.paste(colour, tuple(box))
        exif = Image.Exif()
        if index % 3 == 0:  # as a camera that was held sideways stores it
            image, exif[274] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{index}.png", exif=exif)
        turns = [{"from": "human", "value": "<image>\ndetect"}, {"from": "gpt", "value": "<objects>"}]
        objects = [{"label": label, "box": box}]
        records.append({"id": str(index), "image": f"{index}.png", "objects": objects, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def words_of(tmp_path: Path, train: int, evaluation: int) -> list[str]:
    rate = "3e-3"
    return [
        f"dataset.path={make_detections(tmp_path / 'train', train, 1)}", f"dataset.image_folder={tmp_path / 'train'}",
        f"dataset.eval_path={make_detections(tmp_path / 'eval', evaluation, 2)}",
        f"dataset.eval_image_folder={tmp_path / 'eval'}", "dataset.max_length=512", METRICS,
        "trainer.eval_strategy=epoch", "trainer.deepspeed=null", "trainer.bf16=false", "trainer.tf32=null",
        "trainer.activation_checkpointing=false", "trainer.gradient_accumulation_steps=1", "trainer.save_strategy=no",
        "model.attn_implementation=eager", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=20",
        "inference.max_new_tokens=70", f"trainer.learning_rate.connector_learning_rate={rate}",
        f"trainer.learning_rate.visual_encoder_learning_rate={rate}",
        f"trainer.learning_rate.language_model_learning_rate={rate}",
    ]  # fmt: skip


def last_evaluation(run: Path) -> dict[str, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval_iou" in line][-1]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_detection_set_is_finetuned_measured_and_drawn(
    name: str, folders: Callable[[str], Path], train_whole: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """The whole way in a few steps, too few to learn anything."""
    run = train_whole(
        "finetune-llava-onevision", folders(name), tmp_path / "run", *words_of(tmp_path, 8, 4), "trainer.max_steps=2"
    )
    measured = last_evaluation(run)
    assert {"eval_iou", "eval_acc@0.5", "eval_point_in_box", "eval_exact_match"} <= measured.keys()
    samples = (run / "samples.md").read_text()
    reference = samples.partition("**reference**: ")[2].partition("\n")[0]
    assert reference.startswith("<loc" if name == "paligemma" else '```json [ {"bbox_2d": [')
    drawn = sorted((run / "samples").glob("*-0.png"))
    assert drawn
    with Image.open(drawn[-1]) as image:
        assert image.size == (320, 320)
    ready = VisionLanguageModel.load(run / "final", device="cpu")
    assert ready.processor.coordinates == CONVENTIONS[name]
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(tmp_path / "eval" / "records.json"), "--metrics", "iou,acc@0.5", "--max-new-tokens", "70"]
    main(["eval", str(run / "final"), *words, "--device", "cpu", "--num-workers", "0", "--output", "results"])
    results = json.loads(Path("results/results.json").read_text())
    assert results["metrics"]["iou"]["value"] == pytest.approx(measured["eval_iou"])
    rows = [json.loads(line) for line in Path("results/answers.jsonl").read_text().splitlines()]
    records = json.loads((tmp_path / "eval" / "records.json").read_text())
    assert [row["true_objects"] for row in rows] == [record["objects"] for record in records]
    assert all("objects" in row for row in rows)


def best_constant(records: Path, name: str) -> float:
    """The value of a metric for the one object that is right most often, whatever the image."""
    true = [read_object(record["objects"][0], "", "") for record in json.loads(records.read_text())]
    return max(
        sum(pair_value(OBJECT_METRICS[name], ObjectAnswer([constant], [one])) for one in true) / len(true)
        for constant in set(true)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVENTIONS)
def test_boxes_are_learned(name: str, folders: Callable[[str], Path], train_whole: Callable[..., Path], tmp_path: Path):
    """A tiny model finds rectangles in images that it has not seen, far more often than any one answer does."""
    words = words_of(tmp_path, 2000, 64)
    run = train_whole(
        "finetune-llava-onevision", folders(name), tmp_path / "run", *words,
        "trainer.per_device_train_batch_size=32", "trainer.per_device_eval_batch_size=64", "trainer.max_steps=600",
        "trainer.eval_strategy=steps", "trainer.eval_steps=600",
    )  # fmt: skip
    measured, lines = last_evaluation(run), (run / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[-1] < losses[0] / 10
    for metric in ("iou", "acc@0.5"):
        assert measured[f"eval_{metric}"] > 2 * best_constant(tmp_path / "eval" / "records.json", metric)
