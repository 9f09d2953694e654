"""The engine: one thread runs the model for all requests; the event loops that ask are never blocked."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from threading import Condition, Thread

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from vlm.assembly.private_names import check_private_names
from vlm.config.schema import InferenceConfig
from vlm.data.encoding.labels import Tool
from vlm.data.sample import Turn
from vlm.data.vision.images import Medium
from vlm.inference.engine.batch import DecodingBatch, start_batch
from vlm.inference.engine.constraints import ConstraintCompiler
from vlm.inference.engine.options import Piece, SamplingOptions
from vlm.inference.engine.row import AnswerContext, Prepared, Row
from vlm.inference.generate import VisionLanguageModel, check_length

logger = logging.getLogger(__name__)

CLOSED = "the engine is closed"
SAMPLING_NAMES = ("max_new_tokens", "do_sample", "temperature", "top_p")
"""Generation options that each answer has of its own."""
STOP_NAMES = ("stop_strings", "tokenizer")
"""Generation options that end an answer at a text, which the engine does itself."""


class Engine:
    """Answers requests together: each joins the running batch between two tokens, and leaves it when it ends.

    Greedy answers are those of `vlm generate`; a seeded answer does not depend on which others are in the batch. A
    failure in one row ends that row; a batch that fails, as where memory is too small, is tried again in halves. Rows
    of models that cannot share a pass (with cross-attention to images, or a cache of another kind than those of
    `cache.JOINABLE_LAYERS`) take turns, token by token; those of models that keep their state in modules, one by one.

    Args:
        model: the model with its processor.
        max_batch: the largest number of rows that are generated at once; others wait in order.

    Attributes:
        constraints: compiles what `SamplingOptions.constraint` takes.

    Raises:
        ValueError: `max_batch` is below 1.
    """

    def __init__(self, model: VisionLanguageModel, max_batch: int = 8):
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: at least 1 is needed")
        check_private_names()
        self.model, self.max_batch = model, max_batch
        options = model.generation_options(InferenceConfig())
        own_ends = getattr(model.model, "generation_config").eos_token_id  # noqa: B009 - from a mixin
        ends = options.get("eos_token_id", own_ends)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.constraints = ConstraintCompiler(model.processor.tokenizer, ends)
        stops = tuple(options.get("stop_strings", ()))
        self._context = AnswerContext(
            model.processor.tokenizer, frozenset(ends), stops, self.constraints, model.model.device
        )
        self._options = {name: options[name] for name in options.keys() - {*SAMPLING_NAMES, *STOP_NAMES}}
        self._changed = Condition()
        self._waiting: deque[Row] = deque()
        self._starting: Row | None = None
        self._batches: list[DecodingBatch] = []
        self._limit = max_batch  # fewer after a failure
        self._is_closed = False
        self._thread = Thread(target=self._run, name="vlm-engine", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether it answers no more: it was closed, or failed itself."""
        return self._is_closed

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of rows that are being generated."""
        rows = {row for batch in list(self._batches) for row in batch.rows}
        return len(rows | ({self._starting} - {None}))

    def prepare(
        self, turns: Sequence[Turn], images: Sequence[Medium], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> Prepared:
        """Return a conversation as the model's inputs. CPU work: call it in a worker thread. Thread-safe.

        `tools` are those that the model may call, for templates that list them; `thinking` says whether it is to think
        before it answers, for templates that ask; None: as the model is set.

        Raises:
            ValueError: the model's template or processor refuses the conversation, or leaves nothing of it; or it has
                as many tokens as the model has positions.
        """
        inputs = self.model.inputs([turns], [images], device=torch.device("cpu"), tools=tools, thinking=thinking)
        length = int(inputs["attention_mask"].sum())
        check_length(length, self.model.positions, 1, "conversation")
        return Prepared(inputs, length)

    async def generate(self, prepared: Prepared, options: SamplingOptions) -> AsyncGenerator[Piece]:
        """Yield the answer piece by piece; call it on an event loop.

        The request enters the queue at the first `anext`. Closing the generator (`aclose`), or cancelling the task
        that iterates it, takes the row out of the queue, or out of the batch at the next token.

        Raises:
            ValueError: prompt and answer would exceed the model's positions, or an option does not fit the model; at
                the first `anext`. Later: the answer cannot keep to its constraint.
            RuntimeError: the engine is closed, or is closed while the answer is generated, or the model's pass failed,
                as where the row alone exceeds the memory.
        """
        check_length(prepared.num_prompt_tokens, self.model.positions, options.max_new_tokens)
        self._check_bias(options)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def deliver(piece: Piece | BaseException) -> None:
            """Hand a piece to the event loop; cancel the row if the loop is closed."""
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except RuntimeError:  # the loop is closed, and nobody waits
                row.is_cancelled = True

        row = Row(prepared, options, self._context, deliver)
        self._submit(row)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._cancel(row)

    def close(self) -> None:
        """End the thread after the current step, and every answer that is not complete. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _check_bias(self, options: SamplingOptions) -> None:
        size = self.model.model.config.get_text_config().vocab_size
        if wrong := [token for token in options.logit_bias if not 0 <= token < size]:
            raise ValueError(f"logit_bias: {wrong[0]} is not a token id; the vocabulary has {size:,}")

    def _submit(self, row: Row) -> None:
        with self._changed:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            self._waiting.append(row)
            self._changed.notify()

    def _cancel(self, row: Row) -> None:
        row.is_cancelled = True
        with self._changed:
            if row in self._waiting:
                self._waiting.remove(row)

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        failure: BaseException = RuntimeError(CLOSED)
        try:
            with torch.no_grad():
                while self._wait():
                    self._start_next()
                    for batch in list(self._batches):
                        self._step(batch)
        except BaseException as error:  # a fault of the engine itself: nobody must wait for ever
            logger.exception("the engine failed")
            failure = error
        finally:
            with self._changed:
                self._is_closed = True
                rows = [*self._waiting, *(row for batch in self._batches for row in batch.rows)]
                self._waiting.clear()
                self._batches.clear()
            for row in rows:
                row.fail(failure)

    def _wait(self) -> bool:
        """Wait until there is something to do; return whether there is, False where the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._waiting or self._batches)
            return not self._is_closed

    def _start_next(self) -> None:
        """Start the first row that waits, if there is a place: one at a time, as the running rows wait for it."""
        with self._changed:
            if not self._waiting or self.num_running >= self._limit:
                return
            row = self._starting = self._waiting.popleft()
        try:
            batch = start_batch(self.model, row, self._options)
        except Exception as error:
            self._give_back([row], error)
        else:
            self._join(batch)
        finally:
            self._starting = None

    def _join(self, batch: DecodingBatch) -> None:
        """Put a new batch to one that runs, if they can share a pass; one whose row has ended already is left out."""
        if not batch.has_own_state:  # noticed at the first row: further ones would overwrite what it has seen
            self.max_batch = self._limit = 1
        if not batch.rows:
            self._note_end(1)
            return
        other = next((other for other in self._batches if batch.is_joinable and other.is_joinable), None)
        if other is None:
            self._batches.append(batch)
            return
        try:
            self._batches[self._batches.index(other)] = DecodingBatch.join(other, batch)
        except Exception as error:
            self._give_back(batch.rows, error)

    def _step(self, batch: DecodingBatch) -> None:
        """Compute the next token of a batch's rows."""
        batch.remove_finished()
        num_rows = len(batch.rows)
        try:
            if batch.rows:
                batch.step()
        except Exception as error:
            self._batches.remove(batch)
            self._give_back(batch.rows, error)
            return
        self._note_end(num_rows - len(batch.rows))
        if not batch.rows:
            self._batches.remove(batch)

    def _note_end(self, number: int) -> None:
        """Allow more rows again after some ended well."""
        self._limit = min(self.max_batch, self._limit + number)

    def _give_back(self, rows: Sequence[Row], error: Exception) -> None:
        """Let rows wait again whose pass failed, and run fewer at once; a row that failed alone ends with the error.

        A row that goes on runs its prompt and its answer so far anew.
        """
        rows = [row for row in rows if not (row.is_finished or row.is_cancelled)]
        num_others = sum(len(batch.rows) for batch in self._batches)
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if len(rows) == 1 and not (is_memory and num_others):
            logger.error("an answer failed", exc_info=error)
            rows[0].fail(error)
        elif rows:
            self._limit = max(1, num_others + len(rows) // 2)
            logger.warning("a step of %d rows failed (%s); continuing with %d at once", len(rows), error, self._limit)
            with self._changed:
                self._waiting.extendleft(reversed(rows))
        if is_memory:
            error.__traceback__ = None  # its frames keep the tensors of the pass alive
            clear_device_cache(garbage_collection=True)
