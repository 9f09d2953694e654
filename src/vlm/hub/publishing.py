"""Preparing a folder to publish: the model's files and no others, with a model card; the checkpoint stays unchanged.

The files of a repository are listed here (`MODEL_FILES`, the hub code, the user's own classes, card and loss plot).
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from vlm.checks.checkpoint import PREDICTION_MODEL_TYPE, check_final_folder
from vlm.checks.checkpoint_files import inspect_folder
from vlm.config.secrets import mask
from vlm.families.installed import is_family_type
from vlm.hub.card import model_card
from vlm.hub.certificates import read_certificates
from vlm.hub.cleaning import find_local_paths, without_paths
from vlm.hub.folders import JsonObject, read_json, write_json
from vlm.hub.former_names import copy_renamed, find_former_names
from vlm.hub.run_facts import RunSummary

if TYPE_CHECKING:
    from vlm.data.processor import Processor

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors")
WEIGHT_INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
CONFIG_FILES = (
    "config.json",
    GENERATION_FILE,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""Small JSON files, which are cleaned of paths."""

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = (*WEIGHT_FILES, WEIGHT_INDEX_FILE, *CONFIG_FILES, *VOCABULARY_FILES)
STATISTICS_SUFFIXES = (".running_mean", ".running_var")
"""Suffixes of tensors in weight files that are no parameters."""

CARD_FILE, PLOT_FILE = "README.md", "loss.png"

COMPOSED_MODEL_TYPE = "vlm"
"""The `model_type` of our models that are composed of parts."""


@dataclass(frozen=True)
class PreparedFolder:
    """A folder that is ready to upload."""

    folder: Path
    files: dict[str, int]
    """Name -> bytes."""
    skipped_files: list[str]
    """Other files of the checkpoint's folder."""

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(self.files.values())


def prepare_upload(
    checkpoint: Path,
    out: Path,
    run: RunSummary,
    *,
    repo: str | None = None,
    licence: str | None = None,
    allow_links: bool = False,
) -> PreparedFolder:
    """Fill an empty folder with the files to upload.

    Args:
        checkpoint: a complete checkpoint.
        out: the folder.
        run: the facts of its run, or of the run of the adapter that was merged.
        repo: the name on the Hub, for the example in the card.
        licence: its identifier on the Hub.
        allow_links: whether weights may be symbolic links, in a temporary folder.

    Raises:
        ValueError: the checkpoint is not complete, this version cannot read it, or a text names a path of this machine.
    """
    config = require_complete_checkpoint(checkpoint)
    processor = _require_readable(checkpoint)
    former_names = find_former_names(checkpoint)
    for name in sorted(file.name for file in checkpoint.iterdir() if is_model_file(file.name)):
        if name in CONFIG_FILES:
            write_json(out / name, without_paths(read_json(checkpoint / name), run.checkpoint))
        elif former_names and (name.endswith(".safetensors") or name == WEIGHT_INDEX_FILE):
            copy_renamed(checkpoint / name, out / name, former_names)
        elif name.endswith(".safetensors"):
            _link_or_copy(checkpoint / name, out / name, allow_links=allow_links)
        else:
            shutil.copyfile(checkpoint / name, out / name)
    for source in list_code_files(checkpoint, config):
        shutil.copyfile(source, out / source.name)
    _write_auto_maps(out)
    if run.plot is not None:
        shutil.copyfile(run.plot, out / PLOT_FILE)
    card = model_card(
        read_json(out / "config.json"),
        config,
        run,
        parameters(out, config),
        repo=repo,
        licence=licence,
        certificates=read_certificates(checkpoint),
    )
    (out / CARD_FILE).write_text(mask(card), encoding="utf-8")
    if places := list(find_local_paths(out, checkpoint, run.checkpoint)):
        raise ValueError(f"{'; '.join(places)}: these are paths of this machine, which must not be published")
    _write_reply_ends(out / GENERATION_FILE, processor)
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    copied = files.keys() - {CARD_FILE}
    return PreparedFolder(out, files, sorted(file.name for file in checkpoint.iterdir() if file.name not in copied))


def obsolete(there: Iterable[str], prepared: PreparedFolder) -> list[str]:
    """Return the files of a repository that belong to an earlier model or its code, and would mix with the new one."""
    code_and_plot = {PLOT_FILE, *(file.name for file in Path(__file__).parents[1].joinpath("models").glob("*.py"))}
    ours = {name for name in there if is_model_file(name) or fnmatch(name, "user_*.py") or name in code_and_plot}
    return sorted(ours - prepared.files.keys())


def is_model_file(name: str) -> bool:
    """Return whether a file of a checkpoint belongs to the model."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


# Is it a checkpoint?


def require_complete_checkpoint(checkpoint: Path) -> JsonObject:
    """Return the configuration of a checkpoint that holds all of its model; others, and unknown models, are refused."""
    check_final_folder(checkpoint)
    inspect_folder(checkpoint)
    config = read_json(checkpoint / "config.json")
    kind = get_body_config(config).get("model_type")
    if kind != COMPOSED_MODEL_TYPE and not is_family_type(kind):
        raise ValueError(f"{checkpoint}: model_type={kind} is neither a model of this framework nor of a known family")
    shards = read_json(checkpoint / WEIGHT_INDEX_FILE).get("weight_map")
    for name in sorted(set(shards.values())) if shards else ["model.safetensors"]:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} is incomplete: {name} is missing")
        read_shapes(checkpoint / name)
    needed = ["processor_config.json"] if kind == COMPOSED_MODEL_TYPE else []
    for name in [*needed, "tokenizer_config.json"]:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} is incomplete: {name} is missing; a run saves the processor with the model")
    return config


def read_shapes(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype and shape of each tensor of a safetensors file, such as `F32` and `[2, 3]`."""
    try:
        with safe_open(file, "np") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is incomplete, or no safetensors file: {error}") from error


def _require_readable(checkpoint: Path) -> "Processor":
    """Open the configuration and the processor with the code that will be published; return the processor."""
    from vlm.assembly.checkpoint import open_checkpoint

    try:
        opened = open_checkpoint(checkpoint)
        opened.check_weights()
        return opened.load_processor()
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"{checkpoint} cannot be read by the installed version: {str(error).splitlines()[0]}"
        ) from error


def _write_reply_ends(file: Path, processor: "Processor") -> None:
    """Write into generation settings what ends a reply: runs did not always; a model that only predicts has none."""
    from vlm.assembly.saving import reply_end_settings

    if file.is_file():
        settings = read_json(file)
        ends = reply_end_settings(settings.get("eos_token_id"), settings.get("pad_token_id"), processor)
        write_json(file, settings | ends)


def get_body_config(config: JsonObject) -> JsonObject:
    """Return the configuration of the vision-language model, with prediction heads or without."""
    if config.get("model_type") != PREDICTION_MODEL_TYPE:
        return config
    body = config.get("body_config")
    return body if isinstance(body, dict) else {}


# Code


def get_custom_classes(config: JsonObject) -> dict[str, str]:
    """Return the user's own classes: key of `auto_map` -> `file.Class`."""
    maps = {**(get_body_config(config).get("auto_map") or {}), **(config.get("auto_map") or {})}
    return {key: value for key, value in maps.items() if key == "Connector" or key.startswith("Head.")}


def list_code_files(checkpoint: Path, config: JsonObject) -> Iterator[Path]:
    """Yield the files of the installed package that read a checkpoint, and those of the user's own classes.

    A family's model has none.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    import vlm.models

    body = get_body_config(config)
    package = Path(vlm.models.__file__).parent
    composed = body["model_type"] == COMPOSED_MODEL_TYPE
    predicts = config["model_type"] == PREDICTION_MODEL_TYPE
    roots = ["configuration_vlm", "modeling_vlm", "processing_vlm"] if composed else []
    roots += ["configuration_prediction", "modeling_prediction"] if predicts else []
    files = {package / f"{name}.py" for name in roots}
    files |= {Path(needed) for root in list(files) for needed in get_relative_import_files(root)}
    yield from sorted(files)
    type_names = [body.get("connector", {}).get("type", ""), *(head["type"] for head in config.get("heads", []))]
    custom = get_custom_classes(config)
    if sum(":" in name for name in type_names) != len(custom):
        raise ValueError(f"{checkpoint} is incomplete: {', '.join(type_names)} is a class whose file is not there")
    for reference in sorted(set(custom.values())):
        file = checkpoint / f"{reference.partition('.')[0]}.py"
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: {file.name}, which has {reference}, is missing")
        yield file


def _write_auto_maps(out: Path) -> None:
    """Write into the published files which class belongs to which auto class."""
    from vlm.models.configuration_prediction import AUTO_MAP as PREDICTION_AUTO_MAP
    from vlm.models.configuration_vlm import AUTO_MAP as COMPOSED_AUTO_MAP

    config = read_json(out / "config.json")
    body, custom = get_body_config(config), get_custom_classes(config)
    if body["model_type"] == COMPOSED_MODEL_TYPE:
        body["auto_map"] = COMPOSED_AUTO_MAP | {key: value for key, value in custom.items() if key == "Connector"}
        auto_map = {"auto_map": {"AutoProcessor": COMPOSED_AUTO_MAP["AutoProcessor"]}}
        write_json(out / "processor_config.json", read_json(out / "processor_config.json") | auto_map)
    if config["model_type"] == PREDICTION_MODEL_TYPE:
        config["auto_map"] = PREDICTION_AUTO_MAP | custom
        if body["model_type"] != COMPOSED_MODEL_TYPE:
            del config["auto_map"]["AutoProcessor"]
    write_json(out / "config.json", config)


# Weights


def _link_or_copy(source: Path, target: Path, *, allow_links: bool) -> None:
    """Put a weight file into another folder: as the same file where the file system allows that, else as a copy."""
    source = source.resolve()  # a hard link to a symbolic link would be one itself
    try:
        os.link(source, target)
    except OSError:  # another file system
        if allow_links:
            target.symlink_to(source)
        else:
            shutil.copyfile(source, target)


def parameters(folder: Path, config: JsonObject) -> dict[str, int]:
    """Return the parameters of each part of a composed model and their `total`; for a family's model `total` alone."""
    counts = Counter[str]()
    for file in (file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        for name, (dtype, shape) in read_shapes(file).items():
            if dtype.startswith(("F", "BF")) and not name.endswith(STATISTICS_SUFFIXES):
                part = name.removeprefix("body.").partition(".")[0]
                counts[{"image_newline": "connector", "heads": "head"}.get(part, part)] += math.prod(shape)
    if get_body_config(config)["model_type"] != COMPOSED_MODEL_TYPE:
        return {"total": counts.total()}
    return {**counts, "total": counts.total()}
