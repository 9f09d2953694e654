"""Exporting: a checkpoint of this framework is written in a format that other programs load without our code.

Weights go from file to file, one at a time. What was written is then read back, and compared with the checkpoint.
"""

import gc
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vlm.assembly.adapter_folder import is_adapter_checkpoint
from vlm.assembly.checkpoint import is_composed_config, is_composed_model, open_checkpoint
from vlm.assembly.family import read_config
from vlm.assembly.round_trip import quiet_loading, saved_tensors
from vlm.assembly.saving import reply_end_settings
from vlm.checks.checkpoint import checkpoint_problem
from vlm.hub.folders import JsonObject, create_folder, read_json, resolve_folder, write_json
from vlm.hub.layouts import FORMER_PREFIXES, PrefixPairs, rename_to_foreign, rename_to_ours
from vlm.hub.processors import PROBE_WORD, find_transparency_difference, make_transformers_processor
from vlm.hub.readback import Probe, Readback, find_differences, find_memory_shortage, make_probe
from vlm.hub.shards import LARGEST_SHARD, ShardWriter, read_meta_tensors, read_shard, weight_files
from vlm.hub.targets import EXPORT_FORMATS
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor


def export_checkpoint(
    name: str, out: Path, format_name: str, *, vision_tower: str | None = None, largest_shard: int = LARGEST_SHARD
) -> list[str]:
    """Write a checkpoint of this framework in another format.

    Args:
        name: a run's folder `final`, or a name on the Hub.
        out: a new folder.
        format_name: a name of the table `EXPORT_FORMATS`.
        vision_tower: the name of the encoder for `llava-original`, in place of the recorded name.
        largest_shard: most bytes of a written file.

    Returns:
        What differs from the checkpoint, as sentences; empty where nothing differs.

    Raises:
        ValueError: the format has no place for a part of the model, where every reason is listed; the weights are not
            those of the model; or what reads the format does not find them all, or computes something else.
    """
    target = EXPORT_FORMATS[format_name]
    checkpoint = resolve_folder(name)
    if problem := checkpoint_problem(str(checkpoint)):
        raise ValueError(problem)
    if is_adapter_checkpoint(checkpoint):
        raise ValueError(f"{name} is an adapter on a base; merge it first: vlm merge-lora {name} MERGED")
    config = read_config(str(checkpoint), name)
    if not is_composed_config(config):
        raise ValueError(
            f"{name} is a {config.model_type} checkpoint, which others load as it is; exported are composed models"
        )
    if vision_tower is not None:
        if format_name != "llava-original":
            raise ValueError(f"--vision-tower={vision_tower} is a name that --format llava-original alone writes down")
        config.recipe["visual_encoder"]["hf_name"] = vision_tower
    processor = open_checkpoint(checkpoint).load_composed_processor()
    if problems := list(target.incompatibilities(config, processor)):
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"{name} does not fit --format {format_name}:{listing}")
    probe = make_probe(processor)
    names = _name_weights(name, checkpoint, config, target.weight_prefixes(config.connector["type"]))
    with create_folder(out) as folder:
        theirs = make_transformers_processor(config, processor, prepares_images=format_name == "llava")
        values = target.make_config(config, processor)  # names tokens that were just added
        shapes = {names[ours]: tensor for ours, tensor in _shapes(checkpoint).items() if ours in names}
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


def _shapes(checkpoint: Path) -> JsonObject:
    """Return the weights of a checkpoint as meta tensors, by their names on disk."""
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in read_meta_tensors(file).items()}


def _name_weights(name: str, checkpoint: Path, config: VLMConfig, weight_prefixes: PrefixPairs) -> dict[str, str]:
    """Return name on disk -> foreign name of each weight of a checkpoint; copies of tied ones are left out.

    Raises:
        ValueError: weights are missing, or are none of the model's, or the format has no name for one.
    """
    with torch.device("meta"):
        model = VLMForConditionalGeneration(config)
    complete = model.state_dict()
    needed = saved_tensors(model, complete)
    found = {rename_to_ours(weight, FORMER_PREFIXES) or weight: weight for weight in _shapes(checkpoint)}
    if not found:
        raise ValueError(f"{name} holds no weights; a run's complete model is its folder `final`")
    for problem, weights in (
        ("lacks", needed.keys() - found),
        ("has no place for", found.keys() - needed - complete.keys()),
    ):
        if weights:
            raise ValueError(
                f"{name} is not the model that its config.json describes: it {problem} {len(weights)} weights, such as "
                f"{', '.join(sorted(weights)[:3])}"
            )
    names = {found[ours]: rename_to_foreign(ours, weight_prefixes) for ours in found if ours in needed}
    if unnamed := sorted(ours for ours, foreign in names.items() if foreign is None):
        raise ValueError(f"{name}: the format has no name for the weight {unnamed[0]}")
    return {ours: foreign for ours, foreign in names.items() if foreign is not None}


def _write_weights(checkpoint: Path, folder: Path, names: Mapping[str, str], largest_shard: int) -> None:
    """Write the weights that have a foreign name under it."""
    writer = ShardWriter(folder, largest_shard)
    for ours, tensor in tqdm(chain.from_iterable(map(read_shard, weight_files(checkpoint))), desc="weights", unit=""):
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
        raise ValueError(f"{name} was not exported: what was written has {'; '.join(problems)}")


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


def _differences(theirs: Any, ours: VLMProcessor) -> list[str]:
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
