"""The bytes of tensors that are alive at once, counted operation by operation, of real tensors or of fake ones.

Each operation's outputs are looked at; a storage counts from then on until nothing refers to it. What a kernel
allocates and frees within one operation is not seen, nor what the allocator keeps in reserve.
"""

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within, counts the bytes of storages that operations make.

    Attributes:
        now: bytes that are alive.
        peak: the most bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}
        self._known = {_storage_key(tensor) for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Iterable[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation, and count what it returns."""
        outputs = func(*args, **(kwargs or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, Tensor):
                self._count(value)
        return outputs

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
