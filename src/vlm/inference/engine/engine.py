"""The engine: one thread runs the model for all requests; the event loops that ask are never blocked."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlm.data.sample import Turn
from vlm.data.vision.images import Medium
from vlm.inference.engine.constraints import ConstraintCompiler
from vlm.inference.engine.options import Piece, SamplingOptions
from vlm.inference.generate import VisionLanguageModel


@dataclass(frozen=True)
class Prepared:
    """A conversation as the model's inputs, on the CPU; may be generated from any number of times.

    Args:
        inputs: the inputs of one row, as `VisionLanguageModel.inputs` returns them.
        num_prompt_tokens: number of its tokens, those of images included.
    """

    inputs: dict[str, Tensor]
    num_prompt_tokens: int


class Engine:
    """Answers requests together: each joins the running batch between two tokens, and leaves it when it ends.

    Greedy answers are those of `vlm generate`; a seeded answer does not depend on which others are in the batch. A
    failure in one row ends that row; a batch that runs out of memory is tried again in halves.

    Args:
        model: the model with its processor.
        max_batch: the largest number of rows that are generated at once; others wait in order.

    Attributes:
        constraints: compiles what `SamplingOptions.constraint` takes.
    """

    constraints: ConstraintCompiler

    def __init__(self, model: VisionLanguageModel, max_batch: int = 8):
        self.model, self.max_batch = model, max_batch

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a place in the batch."""
        raise NotImplementedError

    @property
    def num_running(self) -> int:
        """Number of rows that are being generated."""
        raise NotImplementedError

    def prepare(self, turns: Sequence[Turn], images: Sequence[Medium]) -> Prepared:
        """Return a conversation as the model's inputs. CPU work: call it in a worker thread. Thread-safe.

        Raises:
            ValueError: the model's template or processor refuses the conversation, or leaves nothing of it; or it has
                as many tokens as the model has positions.
        """
        raise NotImplementedError

    def generate(self, prepared: Prepared, options: SamplingOptions) -> AsyncGenerator[Piece]:
        """Yield the answer piece by piece; call it on an event loop.

        The request enters the queue at the first `anext`. Closing the generator (`aclose`), or cancelling the task
        that iterates it, takes the row out of the queue, or out of the batch at the next token.

        Raises:
            ValueError: prompt and answer would exceed the model's positions; at the first `anext`.
            RuntimeError: the engine is closed, or is closed while the answer is generated.
            torch.OutOfMemoryError: the row alone exceeds the memory.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the thread after the current step, and every answer that is not complete. May be called twice."""
        raise NotImplementedError
