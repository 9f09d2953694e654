"""What `vlm models --details` adds to the lists: it imports torch and transformers, and takes seconds."""

from collections.abc import Iterator
from importlib.util import find_spec

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from vlm.cli.model_listing import Section, part_sections, print_sections
from vlm.families.meta_model import NotAFamilyError, build_meta_model, get_auto_class
from vlm.families.table import FAMILIES
from vlm.models.connectors import CONNECTORS
from vlm.models.head_tasks import NUM_OUTPUTS_BY_TASK
from vlm.models.poolings import POOLINGS
from vlm.models.vocabulary import find_vocabulary_head

ATTENTION_FLAGS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn", "flex": "_supports_flex_attn"}
"""Attention implementation -> the attribute of a model class that says whether the class supports it."""


def list_details() -> None:
    """Print tables of parts, of the models that are packaged by name, and of installed libraries."""
    encoders, language_models = part_sections()
    connectors = ((name, (kind.__doc__ or "").strip().split("\n")[0]) for name, kind in CONNECTORS.items())
    columns = ("family", "model_type", "model=", "attention", "quantised")
    sections: list[Section] = [
        encoders,
        (
            "Connectors: model/connector=…, or model.connector.type=package.module:Class",
            [("name", "what it is"), *connectors],
        ),
        language_models,
        ("Whole models by name: model=…", [columns, *family_rows()]),
        (
            "Prediction heads: model/head=" + ", ".join(NUM_OUTPUTS_BY_TASK) + "; model.head.pooling=…",
            [("pooling", "what is read"), *POOLINGS.items()],
        ),
        (
            "Quantised: the share of its weights that model.language_model.quantization and "
            "model.visual_encoder.quantization (4bit, 8bit) may reach.\nInstalled here",
            [*installed_rows()],
        ),
    ]
    print_sections(sections)


def family_rows() -> Iterator[tuple[str, ...]]:
    """Yield the families with packaged models, with the attention implementations of the installed classes."""
    for model_type, family in FAMILIES.items():
        if not family.choices:
            continue
        config = CONFIG_MAPPING[model_type]()
        auto = get_auto_class(config)
        kind = auto._model_mapping[type(config)]
        attention = ["eager", *(name for name, flag in ATTENTION_FLAGS.items() if getattr(kind, flag))]
        try:
            share = f"{get_quantizable_share(config):.0%}"
        except NotAFamilyError:  # sizes that fit together are in checkpoints alone
            share = "-"
        yield family.name, model_type, ", ".join(family.choices), ", ".join(attention), share


def get_quantizable_share(config: PreTrainedConfig) -> float:
    """Return the share of a model's weights in Linear layers, at its family's default size."""
    model = build_meta_model(config)
    head = find_vocabulary_head(model)
    linear = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(module.weight.numel() for module in linear) / sum(weight.numel() for weight in model.parameters())


def installed_rows() -> Iterator[tuple[str, str]]:
    """Yield which libraries for attention, quantisation and videos are installed."""
    yield "flash_attention_2", "yes" if is_flash_attn_2_available() else "no: pip install 'small-vlm[flash]'"
    for package, extra, use in (("bitsandbytes", "quant", "4bit, 8bit"), ("av", "video", "videos")):
        is_installed = find_spec(package) is not None
        yield use, f"{package}: yes" if is_installed else f"{package}: no: pip install 'small-vlm[{extra}]'"
