"""Places and threads: what is taken is given back, whoever leaves when."""

import asyncio
import threading

import pytest

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.admission import Admission, WorkerThreads, run_while_client_stays
from vlm.inference.serving.body import ClientLeft
from vlm.inference.serving.errors import RequestError


def test_places_are_given_back():
    admission = Admission(ServingConfig(max_batch=2, max_queue=1, max_prepared_bytes=5000))
    with admission.places(2), admission.places(1), admission.memory(4000):
        with pytest.raises(RequestError, match="max_queue"):
            admission.places(1)
        with pytest.raises(RequestError, match="max_prepared_bytes") as refused:
            admission.memory(2000)
        assert refused.value.status == 503
        assert (admission.num_taken, admission.prepared_bytes) == (3, 4000)
    assert (admission.num_taken, admission.prepared_bytes) == (0, 0)


def test_a_thread_is_taken_until_its_work_ends():
    """A caller that leaves frees no thread that still works: the next one waits for it."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert go_on.wait(60)
        return "done"

    async def play() -> None:
        threads = WorkerThreads(1)
        first = asyncio.create_task(threads.run(work))
        await asyncio.to_thread(begun.wait)
        first.cancel()
        second = asyncio.create_task(threads.run(lambda: "second"))
        third = asyncio.create_task(threads.run(lambda: "third"))
        await asyncio.sleep(0.05)
        assert not second.done()
        second.cancel()
        go_on.set()
        assert await third == "third"
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0)
        assert await threads.run(lambda: "still there") == "still there"
        threads.close()

    asyncio.run(play())


def test_work_ends_with_its_client_or_its_time():
    async def play() -> None:
        left, ended = asyncio.Event(), []

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def work(result: str | None) -> str:
            try:
                if result is None:
                    await asyncio.Event().wait()
                return str(result)
            finally:
                ended.append(result)

        assert await run_while_client_stays(receive, work("answer"), 60) == "answer"
        with pytest.raises(RequestError, match="request_seconds"):
            await run_while_client_stays(receive, work(None), 0.01)
        left.set()
        with pytest.raises(ClientLeft):
            await run_while_client_stays(receive, work(None), 60)
        assert ended == ["answer", None, None]

    asyncio.run(play())
