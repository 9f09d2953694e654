"""The one model that the page holds in memory, and what is known of others. Needs no Gradio, nor torch without one."""

from collections.abc import Collection, Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from huggingface_hub import try_to_load_from_cache

from vlm.checks.checkpoint_files import MAX_BYTES, check_regular, read_object

if TYPE_CHECKING:
    from vlm.inference.generate import VisionLanguageModel
    from vlm.inference.predict import Predictor

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Files that may hold a checkpoint's chat template, the first one first."""
THINKING_SETTING = "enable_thinking"
"""What templates read, as `vlm.models.processing_messages` has it, which comes with torch."""

Loaded = TypeVar("Loaded", "VisionLanguageModel", "Predictor")


class ModelHolder:
    """Loads a checkpoint when it is first requested, and holds it until another one is.

    Args:
        base: the new place of an adapter's base, as in `vlm generate --base`.
        trusted: checkpoints whose code may run: names that the command line gave, not what a visitor types.
    """

    def __init__(self, base: Sequence[str], trusted: Collection[str] = ()):
        self.base, self.trusted = list(base), frozenset(trusted)
        self._loaded: VisionLanguageModel | Predictor | None = None
        self._key: tuple[str, int | None] | None = None
        self._lock = RLock()

    def load(self, kind: type[Loaded], checkpoint: str) -> Loaded:
        """Return the model of a checkpoint; ValueError if it is no checkpoint, or one of another kind."""
        from vlm.assembly.adapter_folder import is_adapter_checkpoint

        with self._lock:
            key = (checkpoint, _modified_at(checkpoint))
            if self._key == key and isinstance(self._loaded, kind):
                return self._loaded
            self.release()  # before the other one is loaded: memory may not hold both
            base = self.base if is_adapter_checkpoint(checkpoint) else ()  # complete checkpoints take no base
            loaded = kind.load(checkpoint, base=base, trust_remote_code=checkpoint in self.trusted)
            self._key, self._loaded = key, loaded
            return loaded

    def release(self) -> None:
        """Release the model, so that a training run has its memory."""
        with self._lock:
            if self._loaded is None:
                return
            self._loaded = None
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def knows_thinking(checkpoint: str | None) -> bool:
    """Return whether a checkpoint's chat template asks if the model is to think; False if its files are not here."""
    return THINKING_SETTING in _read_template(checkpoint) if checkpoint else False


def _read_template(checkpoint: str) -> str:
    """Return the chat template of a folder, or of a name on the Hub that was loaded before; empty without any."""
    for name in TEMPLATE_FILES:
        found = Path(checkpoint, name)
        if not Path(checkpoint).is_dir():
            try:
                cached = try_to_load_from_cache(checkpoint, name)
            except ValueError:  # no name of a repository
                return ""
            found = Path(cached if isinstance(cached, str) else "")
        if found.is_file():
            try:
                if found.suffix == ".jinja":
                    check_regular(found, MAX_BYTES[name])
                    return found.read_text(encoding="utf-8")
                template = read_object(found).get("chat_template")
            except (ValueError, OSError):  # loading the checkpoint says what is wrong with it
                return ""
            if template:
                return str(template)
    return ""


def _modified_at(checkpoint: str) -> int | None:
    """Return when a folder was written, as another run may replace it; None for a name on the Hub."""
    file = Path(checkpoint, "config.json")
    return file.stat().st_mtime_ns if file.is_file() else None
