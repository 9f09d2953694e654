"""Exporting: a checkpoint of this framework is written in a format that other programs load without our code.

Weights go from file to file, one at a time.
"""

from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm.assembly.adapter_folder import is_adapter_checkpoint
from vlm.assembly.checkpoint import is_composed_config, open_checkpoint
from vlm.assembly.family import read_config
from vlm.checks.checkpoint import checkpoint_problem
from vlm.hub.folders import JsonObject, create_folder, read_json, resolve_folder, write_json
from vlm.hub.layouts import PrefixPairs, rename_to_foreign
from vlm.hub.processors import PROBE_WORD, make_transformers_processor
from vlm.hub.shards import LARGEST_SHARD, ShardWriter, read_shard, weight_files
from vlm.hub.targets import EXPORT_FORMATS
from vlm.models import VLMProcessor


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
        ValueError: the format has no place for a part of the model; every reason is listed.
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
    with create_folder(out) as folder:
        _write_weights(name, checkpoint, folder, target.weight_prefixes(config.connector["type"]), largest_shard)
        theirs = make_transformers_processor(config, processor, prepares_images=format_name == "llava")
        write_json(folder / "config.json", target.make_config(config, processor))  # names tokens that were just added
        settings = read_json(checkpoint / "generation_config.json")
        write_json(folder / "generation_config.json", settings | generation_ids(settings, processor))
        theirs.save_pretrained(folder)
        _rename_tokenizer_fields(folder / "tokenizer_config.json")
        return _differences(theirs, processor)


def _write_weights(name: str, checkpoint: Path, folder: Path, weight_prefixes: PrefixPairs, largest_shard: int) -> None:
    files = weight_files(checkpoint)
    if not files:
        raise ValueError(f"{name} holds no weights; a run's complete model is its folder `final`")
    writer = ShardWriter(folder, largest_shard)
    for ours, tensor in tqdm(chain.from_iterable(map(read_shard, files)), desc="weights", unit=""):
        theirs = rename_to_foreign(ours, weight_prefixes)
        if theirs is None:
            raise ValueError(f"{name}: the format has no name for the weight {ours}")
        writer.add(theirs, tensor)
    writer.finish()


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


def generation_ids(settings: JsonObject, processor: VLMProcessor) -> JsonObject:
    """Return the ids that end an answer: the checkpoint's, the tokenizer's EOS, and the template's end of a reply.

    `vlm generate` computes them each time; other programs read them in `generation_config.json`.
    """
    reply = "\ufdd0"
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}]
    after_reply = processor.apply_chat_template(talk).rpartition(reply)[2].lstrip(" ")
    recorded = settings.get("eos_token_id")
    ends = {*(recorded if isinstance(recorded, list) else [recorded]), processor.tokenizer.eos_token_id}
    if token := processor.special_tokens.match(after_reply):
        ends.add(processor.tokenizer.convert_tokens_to_ids(token.group()))
    return {"eos_token_id": sorted(ends - {None}), "pad_token_id": processor.tokenizer.pad_token_id}


def _differences(theirs: Any, ours: VLMProcessor) -> list[str]:
    """Return where the exported processor gives other ids than ours, by calling both."""
    differences = []
    first = {"role": "user", "content": f"{ours.image_token}\n{PROBE_WORD}?"}
    second = {"role": "user", "content": f"Is {ours.image_token} like {ours.image_token}?"}
    for talk in ([first], [first, {"role": "assistant", "content": "A cat."}, second]):
        text = theirs.apply_chat_template(talk, add_generation_prompt=True)
        rendered = ours.apply_chat_template(talk, add_generation_prompt=True)
        sizes = [(1, 1)] * rendered.count(ours.image_token)
        expected = [token for token in ours.tokenize(rendered, (), sizes)[0] if token != ours.image_token_id]
        exported = theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
        if [token for token in exported if token != ours.image_token_id] != expected:
            turns = "one turn" if len(talk) == 1 else "several turns"
            differences.append(
                f"conversations of {turns} become other token ids: this tokenizer joins texts across images"
            )
    return differences
