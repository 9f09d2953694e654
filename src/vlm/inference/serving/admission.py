"""Who is let in: places for answers, and threads that prepare them off the event loop."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, TypeVar

from starlette.types import Receive

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.body import ClientLeft, wait_until_client_leaves
from vlm.inference.serving.errors import RequestError

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Admission:
    """Counts answers that are written or wait, and the bytes of their inputs; use it as `with admission.places(n):`.

    Args:
        config: the limits.

    Attributes:
        num_taken: places that are taken.
        prepared_bytes: bytes of inputs that are held.
    """

    def __init__(self, config: ServingConfig):
        self.limit = config.max_batch + config.max_queue
        self.max_queue = config.max_queue
        self.max_bytes = config.max_prepared_bytes
        self.num_taken = self.prepared_bytes = 0

    def places(self, number: int) -> AbstractContextManager[None]:
        """Take places for so many answers.

        Raises:
            RequestError: there are not so many (429).
        """
        if self.num_taken + number > self.limit:
            raise RequestError(
                f"{self.num_taken} answers are running or waiting, and at most {self.max_queue} may wait "
                "(serving.max_queue); try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        self.num_taken += number
        return self._give_back(number, 0)

    def memory(self, number: int) -> AbstractContextManager[None]:
        """Take so many bytes for inputs that are ready.

        Raises:
            RequestError: there are not so many (503).
        """
        if self.prepared_bytes + number > self.max_bytes:
            reason = f"its prompt and images take {number:,} bytes, and others have {self.prepared_bytes:,} of the"
            message = f"{reason} {self.max_bytes:,} that are allowed (serving.max_prepared_bytes)"
            raise RequestError(message, status=503, code="overloaded")
        self.prepared_bytes += number
        return self._give_back(0, number)

    @contextmanager
    def _give_back(self, num_places: int, num_bytes: int) -> Iterator[None]:
        try:
            yield
        finally:
            self.num_taken -= num_places
            self.prepared_bytes -= num_bytes


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


async def run_while_client_stays(receive: Receive, work: Coroutine[object, object, Result], seconds: float) -> Result:
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
            status=503,
            code="request_timeout",
        )
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
