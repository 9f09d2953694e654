"""Opening a checkpoint of this framework: its configuration, and its model with its processor, ready to be asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from vlm.assembly.adapter_folder import is_adapter_checkpoint
from vlm.assembly.adapter_folder import load as load_on_base
from vlm.assembly.family import get_auto_class, load_family_config
from vlm.assembly.quantization import quantization_config_of
from vlm.families.processing import FamilyProcessor
from vlm.families.table import get_family
from vlm.models import VLMConfig, VLMPredictionConfig
from vlm.models.connectors import CONNECTORS
from vlm.models.heads import HEADS


def checkpoint_config(checkpoint: str | Path) -> Any:
    """The configuration of a checkpoint: of a composed model, of a family's, or of one with prediction heads.

    Raises:
        ValueError: it is none, or there is no such folder.
    """
    folder = Path(checkpoint)
    if not folder.joinpath("config.json").is_file():
        if folder.exists():
            raise ValueError(f"{checkpoint} holds no config.json; a run's complete model is its folder `final`")
        if len(folder.parts) != 2 or str(checkpoint).startswith((".", "/", "~")):
            raise ValueError(f"{checkpoint}: no such folder (seen from {Path.cwd()}), nor a name on the Hub")
    config = AutoConfig.from_pretrained(checkpoint)
    if isinstance(config, VLMConfig | VLMPredictionConfig):
        return config
    return load_family_config(str(checkpoint))


def load_checkpoint(
    checkpoint: str | Path, config: Any, *, device: str | None = None, dtype: str = "auto",
    quantization: str | None = None, base: Sequence[str] = (), trust_remote_code: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """The model of a checkpoint in evaluation mode, and its processor.

    Args:
        checkpoint: a run's `final` folder, or a Hub name.
        config: its configuration, see `checkpoint_config`.
        device: `cuda`, `cpu` …; None: a GPU where there is one.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        quantization: `8bit` or `4bit` for the language model; it is then placed where bitsandbytes puts it.
        base: where an adapter's base lies now, if it was moved: a folder, or `part=folder` for each part.
        trust_remote_code: let code out of the checkpoint run; only needed where a part is a class of its author's.

    Raises:
        ValueError: options that do not fit it.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(place)
    if trust_remote_code:
        register_remote_classes(config, str(checkpoint))
    quantization_by_part = {} if quantization is None else {"language_model": quantization}
    if is_adapter_checkpoint(checkpoint):
        model: Any = load_on_base(
            checkpoint, base_paths=base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), quantization=quantization_by_part,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    elif base:
        raise ValueError(f"base={base[0]}: {checkpoint} is complete, it needs none")
    else:
        if quantization_by_part and isinstance(config, VLMPredictionConfig):
            raise ValueError(f"quantization={quantization}: {checkpoint} has prediction heads, it is loaded as it is")
        model = get_checkpoint_class(config).from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=trust_remote_code,
            quantization_config=quantization_config_of(config, quantization_by_part),
        )  # fmt: skip
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    body = config.body_config if isinstance(config, VLMPredictionConfig) else config
    if not isinstance(body, VLMConfig):
        processor = FamilyProcessor(processor, get_family(body.model_type))
    if quantization_by_part and device is not None and torch.device(device).type != model.device.type:
        raise ValueError(f"device={device}: quantised weights lie on {model.device.type} already")
    return (model.eval() if quantization_by_part else model.to(place).eval()), processor


def check_device(name: str) -> None:
    """Raise ValueError where there is no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from error


def get_checkpoint_class(config: Any) -> Any:
    """The auto class that a checkpoint's model loads through."""
    if isinstance(config, VLMPredictionConfig):
        return AutoModel
    return AutoModelForImageTextToText if isinstance(config, VLMConfig) else get_auto_class(config)


def register_remote_classes(config: Any, checkpoint: str) -> None:
    """Put the connector and head classes that travel with a checkpoint, if any do, in the tables under their names.

    This package's model classes take the place of the checkpoint's own code, which would have done it.
    """
    if isinstance(config, VLMPredictionConfig):
        for one in config.settings:
            if one.type not in HEADS and f"Head.{one.name}" in config.auto_map:
                HEADS[one.type] = get_class_from_dynamic_module(config.auto_map[f"Head.{one.name}"], checkpoint)
    body = config.body_config if isinstance(config, VLMPredictionConfig) else config
    if isinstance(body, VLMConfig):
        kind, own = body.connector["type"], {**body.auto_map, **config.auto_map}
        if kind not in CONNECTORS and "Connector" in own:
            CONNECTORS[kind] = get_class_from_dynamic_module(own["Connector"], checkpoint)
