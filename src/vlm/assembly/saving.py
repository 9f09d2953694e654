"""Saves a complete model: its weights under one set of names, and the ids at which its replies end.

transformers may use different names of weights on disk and in memory, and saves a model under the names from which it
was loaded. Under ZeRO-3 it reverts every renaming that it knows, used or not. `save_complete` chooses the names itself,
however the model was trained: a model of this framework has its own names, a family's model those of its checkpoint.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from vlm.assembly.model_kinds import is_composed_model, is_prediction_model
from vlm.data.encoding.labels import reply_ending
from vlm.data.processor import Processor

SAMPLING_FLAGS = (
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "top_k",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""Generation settings that have an effect only with `do_sample=true`."""

BEAM_FLAGS = ("early_stopping", "length_penalty")
"""Generation settings that have an effect only with several beams."""


def save_complete(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a complete model into a folder, on the rank that calls this; the processor is saved separately.

    Args:
        model: the model.
        folder: the folder to write.
        state: its tensors by their names in memory, if the model itself does not have them whole (DeepSpeed).
    """
    use_canonical_names(model)
    writing: Any = model
    writing.should_save_on_this_rank = lambda is_main_process: is_main_process  # transformers would on the first alone
    try:
        if state is None:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict=share_tied_tensors(model, state))
    finally:
        del writing.should_save_on_this_rank


def use_canonical_names(model: PreTrainedModel) -> None:
    """Make a model use the same names on disk, whatever it was loaded from and however its weights were sharded.

    Renamings of outdated names by transformers are not reverted.
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
    """Set the tokens that end a reply in a model's generation settings, if it generates.

    Raises:
        ValueError: see `reply_ending`.
    """
    if model.can_generate():
        settings = model.generation_config
        settings.update(**reply_end_settings(settings.eos_token_id, settings.pad_token_id, processor))
        _unset_flags_without_effect(settings)


def _unset_flags_without_effect(settings: GenerationConfig) -> None:
    """Unset flags without effect, such as a temperature without `do_sample`, if transformers refuses to save them.

    Some published settings have them. transformers saves such settings only if nothing has changed since loading.
    """
    try:
        settings.validate(strict=True)
    except ValueError:
        flags = () if settings.do_sample is True else SAMPLING_FLAGS
        if settings.num_beams in (None, 1):
            flags = *flags, *BEAM_FLAGS
        for name in flags:
            setattr(settings, name, None)


def reply_end_settings(
    eos_token_id: int | list[int] | None, pad_token_id: int | None, processor: Processor
) -> dict[str, Any]:
    """Return the fields of `generation_config.json` that end an answer.

    Args:
        eos_token_id: the ids that were there: the base's.
        pad_token_id: the id that was there.
        processor: its tokenizer has an EOS and perhaps a padding token, its template a special token after replies.

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
