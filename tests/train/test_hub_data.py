"""A data set on the Hub, through the real client, from a server on this machine that answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.train.test_data_runs import rows

COMMIT = "a" * 40
FILE = "train.parquet"
TRAIN = """
import json, sys
from vlm.__main__ import main
for words in json.load(sys.stdin):
    main(words)
"""


class Hub(BaseHTTPRequestHandler):
    """What `datasets` asks for of a repository with one file."""

    protocol_version = "HTTP/1.1"
    content = b""

    def log_message(self, *_: object) -> None: ...

    def answer(self, body: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        mark = hashlib.sha1(self.content).hexdigest()
        if path == f"/api/datasets/owner/name/tree/{COMMIT}":
            entry = {"type": "file", "oid": mark, "size": len(self.content), "path": FILE}
            self.answer(json.dumps([entry]).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/datasets/owner/name") and "/tree/" not in path:
            facts = {"id": "owner/name", "sha": COMMIT, "private": False, "siblings": [{"rfilename": FILE}]}
            self.answer(json.dumps(facts).encode(), {"Content-Type": "application/json"})
        elif path == f"/datasets/owner/name/resolve/{COMMIT}/{FILE}":
            self.answer_range(f'"{mark}"')
        else:
            self.answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)

    def answer_range(self, mark: str) -> None:
        """The file, or the part of it that is asked for."""
        headers = {"ETag": mark, "Accept-Ranges": "bytes"}
        if not (asked := self.headers.get("Range")):
            self.answer(self.content, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), int(last) + 1 if last else len(self.content)
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(self.content)) - 1}/{len(self.content)}"
        self.answer(self.content[start:stop], headers, 206)


@pytest.fixture
def endpoint() -> Iterator[str]:
    buffer = BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows()), buffer)
    Hub.content = buffer.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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
