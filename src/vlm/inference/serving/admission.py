"""Who is let in: places for answers, and threads that prepare them off the event loop."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from starlette.types import Receive

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.body import ClientLeft, wait_until_client_leaves
from vlm.inference.serving.errors import RequestError

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Admission:
    """Counts answers that are written or wait; use it as `with admission.places(n):`.

    Args:
        config: the limits.

    Attributes:
        num_taken: places that are taken.
    """

    def __init__(self, config: ServingConfig):
        self.limit = config.max_batch + config.max_queue
        self.max_queue = config.max_queue
        self.num_taken = 0

    def places(self, number: int) -> "Places":
        """Take places for so many answers.

        Raises:
            RequestError: there are not so many (429).
        """
        if self.num_taken + number > self.limit:
            raise RequestError(
                f"{self.num_taken} answers are being written or wait, and at most {self.max_queue} may wait "
                "(serving.max_queue); try again later",
                status=429, code="rate_limit_exceeded",
            )  # fmt: skip
        self.num_taken += number
        return Places(self, number)


class Places:
    """Places for answers; they are given back at the end of a `with`."""

    def __init__(self, admission: Admission, number: int):
        self._admission, self._number = admission, number

    def __enter__(self) -> "Places":
        """Keep the places."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the places back."""
        self._admission.num_taken -= self._number


class WorkerThreads:
    """A few threads for what would hold up the event loop; a cancelled caller leaves the line.

    Work that has begun cannot be stopped: its thread is taken until it ends, whoever still waits for it.

    Args:
        number: the number of threads.
    """

    def __init__(self, number: int):
        self._executor = ThreadPoolExecutor(number, thread_name_prefix="vlm-serve")
        self._free = asyncio.Semaphore(number)

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return what a function returns that a thread runs."""
        await self._free.acquire()
        try:
            work = self._executor.submit(function, *args, **kwargs)
        except BaseException:
            self._free.release()
            raise
        loop = asyncio.get_running_loop()
        future = asyncio.wrap_future(work)
        work.add_done_callback(lambda _: _call_soon(loop, self._free.release))
        return await future

    def close(self) -> None:
        """End the threads; what waits for one is not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _call_soon(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    """Call an action on an event loop from another thread; a loop that has ended needs none."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(action)


async def run_while_client_stays(
    receive: Receive, work: Coroutine[object, object, Result], seconds: float
) -> Result:  # fmt: skip
    """Return the result of work that is cancelled when the client leaves, or after some time.

    Raises:
        ClientLeft: the client closed the connection.
        RequestError: the time is over (503).
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_until_client_leaves(receive))
    try:
        await asyncio.wait({task, watcher}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ClientLeft
        raise RequestError(
            f"the answer took more than {seconds:g} seconds, waiting included (serving.request_seconds)",
            status=503, code="request_timeout",
        )  # fmt: skip
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
