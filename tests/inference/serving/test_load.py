"""Many clients at once, hostile ones among them: the good ones get their answers, and memory stays flat.

`make load` runs the long form, for the seconds that `VLM_LOAD_SECONDS` says.
"""

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.inference.engine.asking import running
from tests.inference.serving.load_clients import HOSTILE, Load, put_under_load
from tests.inference.serving.running import NAME, listen, make_endpoint
from tests.waiting import wait_until
from vlm.inference.generate import VisionLanguageModel

SECONDS = float(os.environ.get("VLM_LOAD_SECONDS", "60"))
NUM_GOOD, NUM_HOSTILE = 60, 40
LARGEST_SPREAD = 8.0
"""The largest ratio of the 99th percentile of good clients' times to their median. Requests are answered in order, so
each waits for about as many others as any; answers of twice the length, images, and hostile requests that keep a place
in the batch until it is noticed that their client left make the rest."""
GROWTH = 0.15
"""The largest growth of resident memory, as a share, from a third of the time on to the end."""


def check(load: Load) -> None:
    """Hold what clients met against what has to be."""
    assert load.faults == []
    assert load.seconds
    assert load.health_seconds
    assert load.quantile(0.99) <= LARGEST_SPREAD * load.quantile(0.5)


def accepts(port: int) -> bool:
    """Whether somebody listens there: the model is loaded before."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_good_clients_get_their_answers_among_hostile_ones(model: VisionLanguageModel):
    """The short form, within this process; slow machines answer fewer requests."""
    with running(model, 8) as engine, listen(make_endpoint(engine)) as port:
        load = asyncio.run(put_under_load(port, 6, len(HOSTILE), 0.5))
        assert load.faults == []
        assert load.seconds
        assert load.health_seconds
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)


@pytest.mark.load
def test_an_endpoint_under_load_for_a_minute(model: VisionLanguageModel, tmp_path: Path):
    model.model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "vlm", "serve", str(tmp_path), "--name", NAME, "--port", "0", "--device", "cpu"]
    command += ["serving.max_tokens=400"]
    with (
        (tmp_path / "log.txt").open("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            port = int(re.findall(r":(\d+)/v1", server.stdout.readline())[0])
            wait_until(lambda: accepts(port), server)
            memory: list[tuple[float, int]] = []
            process = psutil.Process(server.pid)

            async def watch_memory(load: Load) -> None:
                while not load.is_over:
                    memory.append((load.end - time.monotonic(), process.memory_info().rss))
                    await asyncio.sleep(0.25)

            load = asyncio.run(put_under_load(port, NUM_GOOD, NUM_HOSTILE, SECONDS, [watch_memory]))
            assert server.poll() is None
        finally:
            server.terminate()
        log.seek(0)
        written = log.read()
    before = max(rss for left, rss in memory if left > SECONDS * 2 / 3)
    after = max(rss for left, rss in memory if left < SECONDS / 3)
    figures = {
        "answers": len(load.seconds), "p50": load.quantile(0.5), "p99": load.quantile(0.99),
        "/health at most": max(load.health_seconds), "MB before": before / 2**20, "MB after": after / 2**20,
        "statuses": dict(load.statuses),
    }  # fmt: skip
    print(figures)
    check(load)
    assert after <= (1 + GROWTH) * before, figures
    assert "Traceback" not in written, written[-3000:]
    for attack in HOSTILE:
        assert any(kind == attack.__name__ for kind, _ in load.statuses)
