"""Whether a run may use peft, whose import takes a tenth of a start. Imports the schema, and no torch.

Without it, transformers would take an adapter's checkpoint for one without weights of its own.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.checks.lora import QUANTIZABLE_PARTS
from vlm.config.derived import BASE_FILE
from vlm.config.schema import PARTS, RunConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", BASE_FILE)
"""Files of checkpoints that need another one."""


def may_use_peft(config: RunConfig) -> bool:
    """Return whether a run has an adapter or a quantised part, or may load an adapter's checkpoint."""
    model, trainer = config.model, config.trainer
    has_adapter = any(getattr(trainer.lora, part).r is not None for part in PARTS)
    is_quantized = any(getattr(model, part).quantization is not None for part in QUANTIZABLE_PARTS)
    return has_adapter or is_quantized or any(may_be_adapter(*checkpoint) for checkpoint in _checkpoints(config))


def _checkpoints(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    """Yield the checkpoints that a run loads, each with its revision on the Hub."""
    model, trainer = config.model, config.trainer
    if trainer.distillation.teacher is not None:
        yield trainer.distillation.teacher, trainer.distillation.teacher_revision
    if trainer.from_pretrained is not None:
        yield trainer.from_pretrained, None
    elif model.hf_name is not None:
        yield model.hf_name, model.revision
    else:
        for part in (model.visual_encoder, *model.visual_encoder.extra_encoders, model.language_model):
            yield part.hf_name, part.revision


def may_be_adapter(name: str, revision: str | None = None) -> bool:
    """Return whether a folder, or a name on the Hub, may be the checkpoint of an adapter.

    Of a name on the Hub, its cache tells, once transformers has looked there for the configuration of an adapter.
    """
    if (folder := Path(name)).is_dir():
        return any((folder / file).is_file() for file in ADAPTER_FILES)
    from huggingface_hub import try_to_load_from_cache  # few commands need it

    try:
        found = try_to_load_from_cache(name, ADAPTER_CONFIG, revision=revision)
    except ValueError:  # no name on the Hub, which is refused when it is opened
        return True
    return found is None or isinstance(found, str)  # anything else says that there is no such file
