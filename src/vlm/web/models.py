"""The one model that the page holds in memory. Needs no Gradio; torch comes with the first model."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any


class ModelHolder:
    """Loads a checkpoint when it is first asked for, and holds it until another one is.

    Args:
        base: where an adapter's base lies now, as `vlm generate --base`.
        trust_remote_code: let code out of checkpoints run.
    """

    def __init__(self, base: Sequence[str] = (), *, trust_remote_code: bool = False):
        self.base, self.trust_remote_code = list(base), trust_remote_code
        self._held: tuple[tuple[Any, ...], Any] | None = None
        self._lock = Lock()

    def model(self, checkpoint: str) -> Any:
        """A `VisionLanguageModel` of a checkpoint.

        Raises:
            ValueError: it is none, or has prediction heads.
        """
        return self._load(checkpoint, heads=False)

    def predictor(self, checkpoint: str) -> Any:
        """A `Predictor` of a checkpoint.

        Raises:
            ValueError: it is none, or has no prediction heads.
        """
        return self._load(checkpoint, heads=True)

    def release(self) -> None:
        """Let go of the model, so that a training finds the memory."""
        with self._lock:
            self._release_model()

    def _load(self, checkpoint: str, *, heads: bool) -> Any:
        with self._lock:
            key = (checkpoint, heads, _modified_at(checkpoint))
            if self._held is not None and self._held[0] == key:
                return self._held[1]
            self._release_model()  # before the other one is loaded: there may be no room for both
            from vlm.inference.generate import VisionLanguageModel
            from vlm.inference.predict import Predictor

            base = self.base if self._is_adapter_checkpoint(checkpoint) else ()
            kind = Predictor if heads else VisionLanguageModel
            model_or_predictor = kind.load(checkpoint, base=base, trust_remote_code=self.trust_remote_code)
            self._held = (key, model_or_predictor)
            return model_or_predictor

    def _is_adapter_checkpoint(self, checkpoint: str) -> bool:
        """Whether `base` is for it: one that is complete takes none, and the page has several to choose from."""
        from vlm.assembly.adapter_folder import is_adapter_checkpoint

        return is_adapter_checkpoint(checkpoint)

    def _release_model(self) -> None:
        if self._held is None:
            return
        self._held = None
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _modified_at(checkpoint: str) -> int | None:
    """When a folder was written: another run may have taken its place; None for a name on the Hub."""
    file = Path(checkpoint, "config.json")
    return file.stat().st_mtime_ns if file.is_file() else None
