"""The subcommand `vlm models`: lists parts and families from the tables, the YAML files and installed libraries."""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

import torch
from omegaconf import OmegaConf
from tabulate import tabulate
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from vlm.config.packaged import packaged_names
from vlm.config.shown import PresentableParser, presentable
from vlm.families.meta_model import AutoClass, get_auto_class
from vlm.families.table import FAMILIES
from vlm.models.connectors import CONNECTORS
from vlm.models.head_tasks import NUM_OUTPUTS_BY_TASK
from vlm.models.poolings import POOLINGS

ATTENTION_FLAGS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn", "flex": "_supports_flex_attn"}
"""Attention implementation -> the attribute of a model class that says whether the class supports it."""


def main(words: Sequence[str]) -> None:
    """Print tables of parts, families and installed libraries; with `--check`, what is proved of a family."""
    args = parse(words)
    if args.check is None:
        list_models()
        return
    from vlm.cli.model_check import check  # a small model and its processor are slow to import

    try:
        check(args.check, trust_remote_code=args.trust_remote_code, json_file=args.json, markdown_file=args.markdown)
    except (ValueError, OSError) as error:
        sys.exit(f"vlm models: {presentable(error)}")


def parse(words: Sequence[str]) -> Namespace:
    """Return the options of the command line."""
    purpose = "Parts and families of models that can be trained, and what each of them takes."
    parser = PresentableParser("vlm models", description=purpose)
    told = (
        "prove on a small model what training takes for granted of a model (a name on the Hub or a folder), of a "
        "model_type, or of `all` types of the installed transformers; the exit status is 1 where a proof fails"
    )
    parser.add_argument("--check", metavar="MODEL", help=told)
    parser.add_argument("--trust-remote-code", action="store_true", help="let code of the repository of MODEL run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: write the verdicts to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --check: write a page with their table")
    args = parser.parse_args(words)
    if args.check is None and (args.json or args.markdown or args.trust_remote_code):
        parser.error("--json, --markdown and --trust-remote-code need --check")
    return args


def list_models() -> None:
    """Print tables of parts, families and installed libraries."""
    connectors = ((name, (kind.__doc__ or "").strip().split("\n")[0]) for name, kind in CONNECTORS.items())
    columns = ("family", "model_type", "model=", "images", "videos", "attention", "quantised")
    sections: list[tuple[str, list[tuple[str, ...]]]] = [
        ("Visual encoders: model/visual_encoder=…, or the hf_name of any CLIP, SigLIP, DINOv2 or timm model",
         [("name", "hf_name"), *part_rows("visual_encoder")]),
        ("Connectors: model/connector=…, or model.connector.type=package.module:Class",
         [("name", "what it is"), *connectors]),
        ("Language models: model/language_model=…, or the hf_name of any AutoModelForCausalLM",
         [("name", "hf_name"), *part_rows("language_model")]),
        ("Whole models: model=…, or model.hf_name=… of the same family", [columns, *family_rows()]),
        ("Prediction heads: model/head=" + ", ".join(NUM_OUTPUTS_BY_TASK) + "; model.head.pooling=…",
         [("pooling", "what is read"), *POOLINGS.items()]),
        ("Quantised: the share of its weights that model.language_model.quantization and "
         "model.visual_encoder.quantization (4bit, 8bit) may reach.\nInstalled here", [*installed_rows()]),
    ]  # fmt: skip
    tables = [(title, tabulate(rows, tablefmt="plain", disable_numparse=True)) for title, rows in sections]
    print("\n\n".join(f"{title}\n{indent(table, '  ')}" for title, table in tables))


def part_rows(part: str) -> Iterator[tuple[str, str]]:
    """Yield the packaged choices of a part, and the models that they load."""
    folder = resources.files("vlm.config").joinpath("model", part)
    for name in packaged_names("vlm.config", f"model/{part}", ".yaml"):
        values = OmegaConf.create(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
        yield name, values.hf_name or "any, by its hf_name" if "hf_name" in values else ""


def family_rows() -> Iterator[tuple[str, ...]]:
    """Yield the families, with the attention implementations of the installed classes."""
    for model_type, family in FAMILIES.items():
        config = CONFIG_MAPPING[model_type]()
        auto = get_auto_class(config)
        kind = auto._model_mapping[type(config)]
        attention = ["eager", *(name for name, flag in ATTENTION_FLAGS.items() if getattr(kind, flag))]
        videos = "as videos" if family.videos else "as frames"
        share = f"{get_quantizable_share(auto, config):.0%}"
        yield family.name, model_type, ", ".join(family.choices), "several", videos, ", ".join(attention), share


def get_quantizable_share(auto: AutoClass, config: PreTrainedConfig) -> float:
    """Return the share of a model's weights in Linear layers, at its family's default size."""
    with torch.device("meta"):
        model = auto.from_config(config)
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(module.weight.numel() for module in linear) / sum(weight.numel() for weight in model.parameters())


def installed_rows() -> Iterator[tuple[str, str]]:
    """Yield which libraries for attention, quantisation and videos are installed."""
    yield "flash_attention_2", "yes" if is_flash_attn_2_available() else "no: pip install 'small-vlm[flash]'"
    for package, extra, use in (("bitsandbytes", "quant", "4bit, 8bit"), ("av", "video", "videos")):
        is_installed = find_spec(package) is not None
        yield use, f"{package}: yes" if is_installed else f"{package}: no: pip install 'small-vlm[{extra}]'"
