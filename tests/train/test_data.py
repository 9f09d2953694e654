"""Every form in which data comes trains a few steps on files encoded as people have them."""

import json
import shutil
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from tests.fixtures import compose_config, run_lightly
from vlm.cli.train import main

NUMBER = 12


def encoded(number: int, kind: str = "JPEG") -> bytes:
    """A picture of noise, as a file."""
    pixels = np.random.default_rng(number).integers(0, 255, (36 + number, 48, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pictures(folder: Path) -> list[str]:
    """ImageRef files of three kinds."""
    names = [f"{number}.{('jpg', 'png', 'webp')[number % 3]}" for number in range(NUMBER)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(number, ("JPEG", "PNG", "WEBP")[number % 3]))
    return names


def lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def llava(folder: Path) -> list[str]:
    records = [
        {"id": name, "image": name, "conversations": [
            {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"picture {name}"},
        ]}
        for name in pictures(folder)
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    return [f"dataset.path={folder / 'data.json'}"]


def messages(folder: Path) -> list[str]:
    """System turn, pictures in mid-text, pictures by name and by order, a turn of text only."""
    records = [
        {"images": [name], "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "Compare "}, {"type": "image"},
                {"type": "text", "text": " with "}, {"type": "image", "image": "0.jpg"},
            ]},
            {"role": "assistant", "content": [{"type": "text", "text": "They differ."}]},
            {"role": "user", "content": "How?"}, {"role": "assistant", "content": "In their noise."},
        ]}
        for name in pictures(folder)
    ]  # fmt: skip
    lines(folder / "data.jsonl", records)
    return [f"dataset.path={folder / 'data.jsonl'}", "dataset.format=messages"]


def captions(folder: Path) -> list[str]:
    rows = "".join(f"{name}\tpicture {name}\n" for name in pictures(folder))
    (folder / "data.tsv").write_text(f"file\ttitle\n{rows}")
    keys = [f"dataset.options.{key}" for key in ("image_key=file", "caption_key=title", "prompt=[What?,Describe it.]")]
    return [f"dataset.path={folder / 'data.tsv'}", "dataset.format=caption", *keys]


def questions(folder: Path) -> list[str]:
    names = pictures(folder)
    records = [{"image": name, "question": "Which?", "choices": ["a", "b"], "answer": 1} for name in names[:6]]
    records += [{"image": name, "question": "What?", "answer": ["noise", "noise", "fog"]} for name in names[6:]]
    lines(folder / "data.jsonl", records)
    return [f"dataset.path={folder / 'data.jsonl'}", "dataset.format=question"]


def heads(folder: Path) -> list[str]:
    records = [
        {"source": "a", "images": [name], "videos": [], "system_prompt": "Judge.", "conversations": ["Is it?", "yes"]}
        for name in pictures(folder)
    ]
    lines(folder / "data.jsonl", records)
    return [f"dataset.path={folder / 'data.jsonl'}", "dataset.format=head"]


def rows() -> list[dict[str, Any]]:
    """Pictures as bytes in the record itself."""
    return [
        {"image": {"bytes": encoded(number), "path": None}, "caption": f"picture {number}"} for number in range(NUMBER)
    ]


def parquet(folder: Path) -> list[str]:
    pa.parquet.write_table(pa.Table.from_pylist(rows()), folder / "data.parquet")
    return [f"dataset.path={folder / 'data.parquet'}", "dataset.format=caption"]


def on_disk(folder: Path) -> list[str]:
    made = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made, "other": made.select([0])}).save_to_disk(folder / "data")
    return [f"dataset.path={folder / 'data'}", "dataset.format=caption", "dataset.split=train"]


def streamed_parquet(folder: Path) -> list[str]:
    return [*parquet(folder), "dataset.streaming=true", "dataset.shuffle_buffer=4"]


def streamed_folder(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    for part in range(3):
        pa.parquet.write_table(pa.Table.from_pylist(rows()), folder / "data" / f"train-{part}.parquet")
    return [f"dataset.path={folder / 'data'}", "dataset.format=caption", "dataset.streaming=true"]


def shards(folder: Path) -> list[str]:
    for part in range(2):
        with webdataset.TarWriter(str(folder / f"{part:02d}.tar")) as sink:
            for number, row in enumerate(rows()):
                name = f"{part}{number:04d}"
                sink.write({"__key__": name, "jpg": row["image"]["bytes"], "txt": row["caption"]})
    path = f'dataset.path="{folder}/{{00..01}}.tar"'
    return [path, "dataset.format=caption", "dataset.streaming=true"]


def piped(folder: Path) -> list[str]:
    shards(folder)
    path = f'dataset.path="pipe:cat {folder}/00.tar"'
    return [path, "dataset.format=caption", "dataset.streaming=true", "dataset.allow_pipe=true"]


def videos(folder: Path) -> list[str]:
    for number in range(2):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for shade in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 25 * shade, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    records = [
        {"video": f"{number % 2}.mp4", "conversations": [
            {"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "it gets brighter"},
        ]}
        for number in range(NUMBER)
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    return [f"dataset.path={folder / 'data.json'}", "dataset.max_frames=3"]


def mixed(folder: Path) -> list[str]:
    """A YAML of the user's own names several sources."""
    for name, make in (("talk", messages), ("table", parquet)):
        (folder / name).mkdir()
        make(folder / name)
    (folder / "mixed.yaml").write_text(
        "defaults: [pretrain-smol, _self_]\n"
        "dataset:\n"
        "  sources:\n"
        f"    talk: {{path: {folder / 'talk' / 'data.jsonl'}, format: messages, max_samples: 6}}\n"
        f"    table: {{path: {folder / 'table' / 'data.parquet'}, format: caption, weight: 2, template: plain}}\n"
    )
    return ["--config-dir", str(folder), "-cn", "mixed"]


FORMS = {
    make.__name__: make
    for make in (
        llava, messages, captions, questions, heads, parquet, on_disk, streamed_parquet, streamed_folder, shards,
        piped, videos, mixed,
    )
}  # fmt: skip


@pytest.fixture
def start(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`start(*words)` trains on the tiny parts and returns the run directory, with `command` from the command line."""
    ours = [word for word in common if not word.startswith(("dataset.", "trainer.per_device"))]
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)

    def run(*words: str, steps: int = 2, command: bool = False) -> Path:
        output = tmp_path / "run"
        settings = [
            "trainer.per_device_train_batch_size=4",
            f"trainer.output_dir={output}",
            f"trainer.max_steps={steps}",
            "trainer.save_strategy=no",
        ]
        overrides = [*ours, *settings, *words]
        if "-cn" in words:
            main(overrides)
        elif command:
            main(["-cn", "pretrain-smol", *overrides])
        else:
            run_lightly(compose_config("pretrain-smol", overrides), "pretrain-smol", overrides)
        return output

    return run


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains(start, tmp_path: Path, form: str):
    folder = tmp_path / "data"
    folder.mkdir()
    output = start(*FORMS[form](folder))
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()[:2]]
    assert all(0 < loss < 20 for loss in losses)
    assert (output / "final" / "model.safetensors").is_file()
    page = (output / "first_batch.html").read_text()
    assert "<mark>" in page
    assert "image token" in page


def test_a_mixture_says_what_each_source_gives(start, tmp_path: Path):
    output = start(*mixed(tmp_path))
    given = json.loads((output / "data.json").read_text())["train"]["sources"]
    assert [(one["source"], one["records"], one["samples"]) for one in given] == [("talk", 12, 6), ("table", 12, 24)]
    assert [one["images"] for one in given] == [12, 24]


def test_a_torn_picture_found_on_the_way_is_listed(start, tmp_path: Path):
    words = llava(tmp_path)
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) // 2])
    skips = ["dataset.on_bad_sample=skip", "dataset.check_samples=0", "trainer.train_sampling_strategy=sequential"]
    output = start(*words, *skips, steps=9)
    (skipped,) = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["record"], skipped["id"], skipped["file"]) == (3, "3.jpg", str(tmp_path / "3.jpg"))
    assert "truncated" in skipped["reason"]


def test_what_was_left_out_before_a_run_was_resumed_stays_listed(start, tmp_path: Path):
    words = llava(tmp_path)
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:700])
    words += ["dataset.on_bad_sample=skip", "dataset.check_samples=0", "trainer.save_strategy=steps",
              "trainer.save_steps=3"]  # fmt: skip
    output = start(*words, steps=3)
    listed = (output / "skipped.jsonl").read_text()
    assert "0.jpg" in listed
    shutil.rmtree(output / "final")
    start(*words, steps=3)
    assert (output / "skipped.jsonl").read_text() == listed


def test_a_torn_picture_found_on_the_way_stops_a_run_that_skips_nothing(start, tmp_path: Path):
    words = llava(tmp_path)
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:700])
    for workers in (0, 1):
        with pytest.raises(SystemExit, match=r"data.json, record 3: record '3.jpg': image .*3.jpg does not open"):
            start(*words, "dataset.check_samples=0", f"trainer.dataloader_num_workers={workers}", steps=3, command=True)


def test_a_run_on_its_evaluation_records_is_refused_where_that_is_asked(start, tmp_path: Path):
    words = llava(tmp_path)
    same = words[0].replace("dataset.path", "dataset.eval_path")
    with pytest.raises(SystemExit, match=r"dataset.overlap=refuse: of 12 evaluation records, 12 share an image with"):
        start(*words, same, "trainer.eval_strategy=epoch", "dataset.overlap=refuse", steps=1, command=True)


def test_too_many_torn_pictures_stop_a_run(start, tmp_path: Path):
    words = llava(tmp_path)
    for name in ("0.jpg", "3.jpg", "6.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:700])
    skips = ["dataset.on_bad_sample=skip", "dataset.check_samples=0"]
    with pytest.raises(SystemExit, match=r"2 of 12 records cannot be used, more than dataset.max_skipped=0.1 allows"):
        start(*words, *skips, steps=9, command=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_as_it_would_have(start, tmp_path: Path, workers: int):
    words = [*shards(tmp_path), "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.num_samples=0",
             f"trainer.dataloader_num_workers={workers}", "dataset.shuffle_buffer=5"]  # fmt: skip

    def losses(output: Path) -> list[float]:
        found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in found if "loss" in line]

    whole = losses(start(*words, steps=8))
    assert len(set(whole)) == 8
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    shutil.rmtree(tmp_path / "run" / "final")
    assert losses(start(*words, steps=8)) == whole
