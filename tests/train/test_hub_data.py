"""A data set on the Hub, through the real client, from a server on this machine that answers as the Hub does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.hub.server import LocalHub, Repository
from tests.train.test_data import rows

TRAIN = """
import json, sys
from vlm.cli.train import main
for words in json.load(sys.stdin):
    main(words)
"""


@pytest.fixture
def endpoint() -> Iterator[str]:
    buffer = BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows()), buffer)
    hub = LocalHub()
    files = {"train.parquet": buffer.getvalue()}
    hub.repositories["datasets/owner/name"] = Repository(branches={"main": [files]})
    with hub.running():
        yield hub.address


def test_a_data_set_on_the_hub_trains_stored_and_streamed(endpoint: str, common: list[str], tmp_path: Path):
    ours = [word for word in common if not word.startswith("dataset.")]
    words = ["-cn", "pretrain-smol", *ours, "dataset.path=hf://owner/name", "dataset.format=caption",
             "trainer.max_steps=2", "trainer.save_strategy=no", "trainer.num_samples=0"]  # fmt: skip
    runs = [
        [*words, f"trainer.output_dir={tmp_path / 'stored'}"],
        [*words, f"trainer.output_dir={tmp_path / 'streamed'}", "dataset.streaming=true"],
    ]
    environment = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], input=json.dumps(runs), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("stored", "streamed"):
        assert (tmp_path / name / "final" / "model.safetensors").is_file()
    given = json.loads((tmp_path / "stored" / "data.json").read_text())["train"]["sources"]
    assert [(one["path"], one["samples"]) for one in given] == [("hf://owner/name", 12)]
