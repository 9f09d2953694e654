"""Saving a complete model: its weights under one set of names, and the ids at which its replies end.

transformers names weights on disk otherwise than in memory, and saves a model under the names that it was loaded from.
Under ZeRO-3 it takes every renaming that it knows for one that was used. `save_complete` decides anew: a model of this
framework has its own names, a family's those of the checkpoint that it began with, however either was trained.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from vlm.assembly.checkpoint import is_composed_model, is_prediction_model
from vlm.data.encoding.labels import reply_ending
from vlm.data.processor import Processor


def save_complete(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a complete model into a folder; the processor is saved apart.

    Args:
        model: the model.
        folder: where to.
        state: its tensors by their names in memory, where the model itself does not hold them whole (DeepSpeed).
    """
    use_canonical_names(model)
    if state is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=share_tied_tensors(model, state))


def use_canonical_names(model: PreTrainedModel) -> None:
    """Let a model be saved under the same names whatever it was loaded from, and whether its weights were sharded.

    transformers' renamings of outdated names are not reverted.
    """
    described: Any = model  # transformers sets the attribute, and declares it nowhere
    if is_composed_model(model) or is_prediction_model(model):
        described._weight_conversions = None  # as of a model that was just made
    elif (conversions := getattr(model, "_weight_conversions", None)) is not None:
        outdated = {repr(conversion) for conversion in get_checkpoint_conversion_mapping("legacy") or ()}
        described._weight_conversions = [
            conversion for conversion in conversions if conversion.was_used() and repr(conversion) not in outdated
        ]


def share_tied_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state in which tied parameters are one tensor, as in the model; ZeRO-1 and 2 copy each of its names."""
    names = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    tied = {name: state[group[0]] for group in names.values() for name in group[1:]}
    return {**state, **tied}


def set_reply_ends(model: PreTrainedModel, processor: Processor) -> None:
    """Note in a model's generation settings what ends a reply; a model that does not generate has none.

    Raises:
        ValueError: see `reply_ending`.
    """
    if model.can_generate():
        settings: Any = model.generation_config  # declared by a mixin, which PreTrainedModel does not name
        settings.update(**reply_end_settings(settings.eos_token_id, settings.pad_token_id, processor))


def reply_end_settings(
    eos_token_id: int | list[int] | None, pad_token_id: int | None, processor: Processor
) -> dict[str, Any]:
    """Return the fields of `generation_config.json` that end an answer.

    Args:
        eos_token_id: the ids that were there: the base's.
        pad_token_id: the id that was there.
        processor: its tokenizer has an EOS and perhaps a padding token, its template a special token behind replies.

    Returns:
        `eos_token_id`, a sorted list of all of these, and `pad_token_id`, the tokenizer's where it has one.

    Raises:
        ValueError: see `reply_ending`.
    """
    tokenizer: Any = processor.tokenizer  # declares ids as lists, and texts, too
    ends = {*(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]), tokenizer.eos_token_id}
    behind_reply = processor.special_tokens.findall(reply_ending(processor))
    ends.update(tokenizer.convert_tokens_to_ids(behind_reply))
    padding = pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"eos_token_id": sorted(ends - {None}) or None, "pad_token_id": padding}
