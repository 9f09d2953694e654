"""Exporting: a checkpoint of this framework is written in a format that other programs load without our code.

Weights go from file to file, one at a time. What was written is then read back, and compared with the checkpoint.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import ProcessorMixin

from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.model_kinds import is_composed_model
from vlm.assembly.round_trip import quiet_loading
from vlm.assembly.saving import reply_end_settings
from vlm.hub.folders import create_folder, read_json, write_json
from vlm.hub.opening import OpenedCheckpoint, name_weights, open_for_export, read_shapes, refuse_incompatible
from vlm.hub.processors import PROBE_WORD, find_transparency_difference, make_transformers_processor
from vlm.hub.readback import Probe, Readback, find_differences, find_memory_shortage, make_probe
from vlm.hub.shards import LARGEST_SHARD, ShardWriter, read_shard, weight_files
from vlm.hub.targets import EXPORT_FORMATS
from vlm.models import VLMConfig, VLMProcessor

WITH_DTYPE = ("gguf", "onnx")
"""Formats that can be written in another precision than the checkpoint's."""


def export_checkpoint(
    name: str,
    out: Path,
    format_name: str,
    *,
    vision_tower: str | None = None,
    dtype: str | None = None,
    largest_shard: int = LARGEST_SHARD,
) -> list[str]:
    """Write a checkpoint of this framework in another format.

    Args:
        name: a run's folder `final`, or a name on the Hub.
        out: a new folder.
        format_name: a name of the table `EXPORT_FORMATS`, `gguf` or `onnx`.
        vision_tower: the name of the encoder for `llava-original`, in place of the recorded name.
        dtype: the precision of `gguf` and `onnx`; the checkpoint's by default.
        largest_shard: most bytes of a written file of LLaVA's formats.

    Returns:
        What differs from the checkpoint, as sentences; empty where nothing differs.

    Raises:
        ValueError: the format has no place for a part of the model, where every reason is listed; the weights are not
            those of the model; or what reads the format does not find them all, or computes something else.
    """
    if vision_tower is not None and format_name != "llava-original":
        raise ValueError(f"--vision-tower={vision_tower} is recorded by --format llava-original only")
    if dtype is not None and format_name not in WITH_DTYPE:
        raise ValueError(
            f"--dtype={dtype}: --format {format_name} keeps the checkpoint's precision; only gguf "
            "and onnx accept --dtype"
        )
    opened = open_for_export(name)
    if format_name in EXPORT_FORMATS:
        return _export_llava(opened, out, format_name, vision_tower, largest_shard)
    return find_exporter(format_name).export(opened, out, dtype)


class Exporter(NamedTuple):
    """What exports to a format that needs further packages.

    Attributes:
        find_incompatibilities: returns every reason why a model of a configuration and processor does not fit.
        export: writes an opened checkpoint into a new folder, in a precision; returns what differs, as sentences.
    """

    find_incompatibilities: Callable[[VLMConfig, VLMProcessor], Iterable[str]]
    export: Callable[[OpenedCheckpoint, Path, str | None], list[str]]


def find_exporter(format_name: str) -> Exporter:
    """Return what exports to `gguf` or `onnx`.

    Raises:
        ValueError: a package is missing.
    """
    try:
        if format_name == "gguf":
            from vlm.hub.gguf import exporting as gguf

            return Exporter(gguf.find_incompatibilities, gguf.export_gguf)
        from vlm.hub.onnx import exporting as onnx

        return Exporter(onnx.find_incompatibilities, onnx.export_onnx)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--format {format_name} needs the package {error.name}: pip install 'small-vlm[export]'"
        ) from error


def _export_llava(
    opened: OpenedCheckpoint, out: Path, format_name: str, vision_tower: str | None, largest_shard: int
) -> list[str]:
    """Write one of LLaVA's formats; see `export_checkpoint`."""
    target = EXPORT_FORMATS[format_name]
    name, checkpoint, config, processor = opened
    if vision_tower is not None:
        config.recipe["visual_encoder"]["hf_name"] = vision_tower
    refuse_incompatible(name, format_name, target.incompatibilities(config, processor))
    probe = make_probe(processor)
    names = name_weights(name, checkpoint, config, target.weight_prefixes(config.connector["type"]))
    with create_folder(out) as folder:
        theirs = make_transformers_processor(config, processor, prepares_images=format_name == "llava")
        values = target.make_config(config, processor)  # names tokens that were just added
        shapes = {names[ours]: tensor for ours, tensor in read_shapes(checkpoint).items() if ours in names}
        if problems := target.readback.find_problems(values, config, shapes):
            raise ValueError(f"{name} cannot be read as {format_name}: {'; '.join(problems)}")
        _write_weights(checkpoint, folder, names, largest_shard)
        write_json(folder / "config.json", values)
        settings = read_json(checkpoint / "generation_config.json")
        ends = reply_end_settings(settings.get("eos_token_id"), settings.get("pad_token_id"), processor)
        write_json(folder / "generation_config.json", settings | ends)
        theirs.save_pretrained(folder)
        _rename_tokenizer_fields(folder / "tokenizer_config.json")
        differences = [*_differences(theirs, processor), *find_transparency_difference(theirs, processor, format_name)]
        return [*differences, *_compare(name, checkpoint, folder, config, target.readback, probe)]


def _write_weights(checkpoint: Path, folder: Path, names: Mapping[str, str], largest_shard: int) -> None:
    """Write the weights that have a foreign name under it."""
    writer = ShardWriter(folder, largest_shard)
    for ours, tensor in tqdm(
        chain.from_iterable(map(read_shard, weight_files(checkpoint))), desc="weights", unit="", disable=None
    ):
        if ours in names:
            writer.add(names[ours], tensor)
    writer.finish()


def _compare(
    name: str, checkpoint: Path, folder: Path, config: VLMConfig, readback: Readback, probe: Probe
) -> Iterator[str]:
    """Refuse an export whose outputs are not the checkpoint's; yield why they were not compared, if they were not."""
    if shortage := find_memory_shortage(folder):
        yield f"names and shapes of the weights were checked, outputs were not compared: {shortage}"
        return
    with quiet_loading():
        model = open_checkpoint(checkpoint).load_model()
    assert is_composed_model(model)
    expected = readback.own_outputs(model.eval(), probe)
    del model
    gc.collect()  # before the export is loaded: memory holds one model at a time
    if problems := list(find_differences(expected, readback.read_outputs(folder, config, probe))):
        raise ValueError(f"{name} was not exported: the files written have {'; '.join(problems)}")


def _rename_tokenizer_fields(file: Path) -> None:
    """Rename fields of transformers 5 that version 4 cannot read to names that both read.

    The class becomes the one that takes `tokenizer.json` as it is; that of version 4 would return `token_type_ids` too.
    """
    values = read_json(file)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["model_input_names"] = ["input_ids", "attention_mask"]
    if extra := values.pop("extra_special_tokens", None):
        values["additional_special_tokens"] = list(extra.values()) if isinstance(extra, dict) else extra
    for name in ("auto_map", "backend", "is_local", "local_files_only", "name_or_path"):
        values.pop(name, None)
    write_json(file, values)


def _differences(theirs: ProcessorMixin, ours: VLMProcessor) -> list[str]:
    """Return where the exported processor gives other ids than ours, by calling both."""
    differences = []
    first = {"role": "user", "content": f"{ours.image_token}\n{PROBE_WORD}?"}
    within = {"role": "user", "content": f"Is {ours.image_token} like {ours.image_token}?"}
    talks = {
        "of one turn": [first],
        "of several turns": [first, {"role": "assistant", "content": "A cat."}, first],
        "with images within sentences": [within],
    }
    for kind, talk in talks.items():
        text = theirs.apply_chat_template(talk, add_generation_prompt=True)
        rendered = ours.apply_chat_template(talk, add_generation_prompt=True)
        sizes = [(1, 1)] * rendered.count(ours.image_token)
        expected = [token for token in ours.tokenize(rendered, (), sizes)[0] if token != ours.image_token_id]
        exported = theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
        if [token for token in exported if token != ours.image_token_id] != expected:
            differences.append(f"conversations {kind} become other token ids: this tokenizer joins texts across images")
    return differences
