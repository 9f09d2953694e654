"""Single passes of a model over prompts: prompts that wait are put into one batch, in the order in which they came."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vlm.data.batching.collator import Collator
from vlm.data.processor import Processor, SampleInputs
from vlm.inference.generate import on_device

Result = TypeVar("Result")


class Batcher(Generic[Result]):
    """Runs a model over prompts of all requests, a batch at a time, in a thread of its own.

    Args:
        processor: the model's.
        device: where the model is.
        run: takes a batch of inputs, padded on the right; returns what each row gets.
        max_batch: the most prompts of a batch.
    """

    def __init__(
        self,
        processor: Processor,
        device: torch.device,
        run: Callable[[dict[str, Tensor]], list[Result]],
        max_batch: int,
    ):
        self.processor, self.device, self.max_batch = processor, device, max_batch
        self._run = run
        self._collate = Collator.of(processor, left=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlm-serve-model")
        self._waiting: list[tuple[SampleInputs, asyncio.Future[Result]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def run(self, rows: Sequence[SampleInputs]) -> list[Result]:
        """Return the result of each prompt; a caller that is cancelled leaves the line.

        Raises:
            Exception: what the model raised on the batch of one of them.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in rows]
        self._waiting += zip(rows, futures, strict=True)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    async def _work(self) -> None:
        """Take batches until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            self._waiting = [(row, future) for row, future in self._waiting if not future.done()]
            batch, self._waiting = self._waiting[: self.max_batch], self._waiting[self.max_batch :]
            if not batch:
                return
            try:
                results = await loop.run_in_executor(self._thread, self._run_rows, [row for row, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    @torch.no_grad()
    def _run_rows(self, rows: Sequence[SampleInputs]) -> list[Result]:
        return self._run(on_device(self._collate(rows), self.processor, self.device))

    def close(self) -> None:
        """End the thread after its batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)
