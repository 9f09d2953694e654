"""Importing: a foreign checkpoint is written as a complete checkpoint of this framework.

Weights go from file to file, one at a time. What was written is then loaded, and compared with the source.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from vlm.assembly.compose import compose, make_generation_config
from vlm.assembly.saving import reply_end_settings
from vlm.hub.folders import create_folder, read_json, write_json
from vlm.hub.import_readback import compare_import
from vlm.hub.layouts import COMPUTED_BUFFER_SUFFIXES, rename_to_ours
from vlm.hub.shards import LARGEST_SHARD, ShardWriter, read_shard
from vlm.hub.sources import ForeignCheckpoint, read_source
from vlm.hub.templates import default_template, find_working_template
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")

ENCODER_PREFIX = "visual_encoder."

log = logging.getLogger(__name__)


def import_checkpoint(
    name: str,
    out: Path,
    *,
    base_model: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    image_mode: str | None = None,
    dtype: torch.dtype | None = None,
    largest_shard: int = LARGEST_SHARD,
) -> tuple[VLMConfig, VLMProcessor]:
    """Write a foreign checkpoint as one of this framework, and return its configuration and processor.

    Args:
        name: a local folder or a name on the Hub.
        out: a new folder.
        base_model: the language model under an adapter or a projector.
        vision_tower: the encoder, in place of the one that the source names.
        template: as `dataset.template`; None: the source's, else the one for its language model.
        image_mode: as `dataset.image_mode`; None: the source's.
        dtype: precision of the weights; None: the language model's.
        largest_shard: most bytes of a written file.

    Raises:
        ValueError: the checkpoint cannot be imported, with why and what to do; or what was written computes something
            else than the source, as transformers' own classes read it.
    """
    source = read_source(name, base_model, vision_tower)
    with create_folder(out) as folder:
        parts = folder / "parts"
        config, processor = _compose_model(source, parts, template, image_mode)
        shutil.rmtree(parts)
        if len(processor.tokenizer) > config.text_config.vocab_size:
            config.text_config.vocab_size = -(-len(processor.tokenizer) // 64) * 64
        with torch.device("meta"):
            model = VLMForConditionalGeneration(config)
        config.dtype = dtype or _common_dtype(source)
        config.vision_config.dtype = config.text_config.dtype = config.dtype
        _write_weights(source, model, folder, config.dtype, largest_shard)
        config.architectures = [type(model).__name__]
        custom_object_save(model, folder, config)  # pyright: ignore[reportArgumentType] - or a configuration, it says
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        settings = _make_generation_config(source)
        settings.update(**reply_end_settings(settings.eos_token_id, settings.pad_token_id, processor))
        settings.save_pretrained(folder)
        for reason in compare_import(name, source, folder, processor):
            log.warning(reason)
    return config, processor


def _compose_model(
    source: ForeignCheckpoint, parts: Path, template: str | None, image_mode: str | None
) -> tuple[VLMConfig, VLMProcessor]:
    """Compose the model as a run does, from folders that hold the parts' configurations and no weights."""
    tokenizer = parts / "language_model"
    source_template, texts = _stage_tokenizer(source, tokenizer)
    source.text_config.save_pretrained(tokenizer)
    recipe = source.recipe
    staged = replace(recipe, language_model=replace(recipe.language_model, hf_name=str(tokenizer)))
    if source.vision_config is not None:
        encoder = parts / "visual_encoder"
        source.vision_config.save_pretrained(encoder)
        source.image_processor.save_pretrained(encoder)
        staged = replace(staged, visual_encoder=replace(recipe.visual_encoder, hf_name=str(encoder)))
    if template is None and source_template is None:
        template = default_template(source.text_config.model_type, texts)
    config, processor = compose(staged, template, image_mode or source.image_mode)
    config.recipe = asdict(recipe)
    config.vision_config.name_or_path = recipe.visual_encoder.hf_name
    config.text_config.name_or_path = recipe.language_model.hf_name
    processor.tokenizer.name_or_path = recipe.language_model.hf_name
    processor.tokenizer.init_kwargs["name_or_path"] = recipe.language_model.hf_name
    return config, processor


def _stage_tokenizer(source: ForeignCheckpoint, folder: Path) -> tuple[str | None, list[str]]:
    """Copy the tokenizer's files; return the chat template that works here, which is copied too, and all templates."""
    folder.mkdir(parents=True)
    for pattern in TOKENIZER_FILES:
        for file in source.text_folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    settings = read_json(folder / "tokenizer_config.json")
    jinja = source.text_folder / "chat_template.jinja"
    templates = [
        jinja.read_text(encoding="utf-8") if jinja.is_file() else None,
        read_json(source.text_folder / "chat_template.json").get("chat_template"),
        settings.get("chat_template"),
    ]
    texts = [text for text in templates if isinstance(text, str) and text]
    template = find_working_template(texts, source.recipe.image_token)
    if settings:
        settings.pop("chat_template", None)
        write_json(folder / "tokenizer_config.json", settings)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return template, texts


def _common_dtype(source: ForeignCheckpoint) -> torch.dtype:
    """Return the dtype of the language model's first weight in floating point."""
    for store in source.stores:
        for file in store.files:
            for name, tensor in read_shard(file):
                ours = rename_to_ours(name, store.table) or name
                if ours.startswith("language_model.") and tensor.is_floating_point():
                    return tensor.dtype
    raise ValueError("the source contains no language model weights")


def _write_weights(
    source: ForeignCheckpoint, model: VLMForConditionalGeneration, folder: Path, dtype: torch.dtype, largest_shard: int
) -> None:
    """Write every weight of `model` out of the source, under our names; refuses missing, unknown and unlike ones."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.text_config.tie_word_embeddings:
        del expected["language_model.lm_head.weight"]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    with_vocabulary = {f"{name}.weight" for name, module in model.named_modules() if module in tables}
    table = source.stores[-1].table
    deltas = {rename_to_ours(name, table) or name: delta for name, delta in source.adapter.deltas.items()}
    writer, missing = ShardWriter(folder, largest_shard), set(expected)
    with tqdm(total=len(expected), desc="weights", unit="", disable=None) as bar:

        def write(name: str, tensor: Tensor) -> None:
            """Write a tensor under our name, with its adapter's change, and with rows for all tokens."""
            if name in deltas:
                tensor = deltas.pop(name).add_to(tensor)
            if name in with_vocabulary:
                tensor = extend_rows(tensor, expected[name][0])
            if tensor.shape != expected[name]:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but {tuple(expected[name])} is needed")
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
            missing.remove(name)
            bar.update()

        for name, tensor in _read_tensors(source, set(expected)):
            write(name, tensor)
        if source.encoder is not None and any(name.startswith(ENCODER_PREFIX) for name in missing):
            encoder = AutoModel.from_pretrained(source.encoder, config=model.config.vision_config)
            for name, tensor in encoder.state_dict(prefix=ENCODER_PREFIX).items():
                if name in missing:
                    write(name, tensor)
    _raise_for_weights("the source lacks", missing)
    unknown = {name for name in deltas if not _is_optional_weight(name)}
    _raise_for_weights("the adapter targets modules that the model does not have:", unknown)
    writer.finish()


def _read_tensors(source: ForeignCheckpoint, expected: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the source's weights under our names, each once; those that an adapter brings come first."""
    done: set[str] = set()
    for name, tensor in source.adapter.replacements.items():
        ours = rename_to_ours(name, source.stores[-1].table) or name
        _raise_for_weights("the model has no place for these weights of the adapter:", {ours} - expected)
        done.add(ours)
        yield ours, tensor
    for store in source.stores:
        unknown = set()
        for file in store.files:
            for name, tensor in read_shard(file):
                ours = rename_to_ours(name, store.table) or name
                if ours in expected and ours not in done:
                    done.add(ours)
                    yield ours, tensor
                elif ours not in expected and not _is_optional_weight(ours):
                    unknown.add(ours)
        _raise_for_weights("the model has no place for these weights:", unknown)


def _is_optional_weight(name: str) -> bool:
    """Return whether a weight may be left out: an encoder's (unread layers, pooling), a tied or a computed one."""
    return name.startswith((ENCODER_PREFIX, "language_model.lm_head.")) or name.endswith(COMPUTED_BUFFER_SUFFIXES)


def _raise_for_weights(problem: str, names: set[str]) -> None:
    if names:
        raise ValueError(f"{problem} {len(names)} weights, such as {', '.join(sorted(names)[:5])}")


def extend_rows(table: Tensor, rows: int) -> Tensor:
    """Return embeddings or a vocabulary head with more rows, `(vocabulary, width) -> (rows, width)`.

    A new row is the mean of the old ones, so a new token's logit is the mean of the others' and never the largest.
    """
    missing = rows - len(table)
    if missing <= 0:
        return table
    mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(missing, *table.shape[1:])])


def _make_generation_config(source: ForeignCheckpoint) -> GenerationConfig:
    """Return the ids that the source itself begins and ends answers with."""
    if (source.text_folder / "generation_config.json").is_file():
        return make_generation_config(GenerationConfig.from_pretrained(source.text_folder))
    return make_generation_config(GenerationConfig.from_model_config(source.text_config))
