"""Proofs about parts and saving: what each part of the model is, and whether all come back from the disk."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from vlm.assembly.family_trial.conversations import draw_image, one_turn, read_natively
from vlm.assembly.family_trial.gradients import PART_NAMES
from vlm.assembly.family_trial.subject import Subject, list_names, relative_difference, supervised_next
from vlm.assembly.family_trial.verdicts import DisprovedError
from vlm.assembly.opening import quiet_loading
from vlm.assembly.saving import save_complete, set_reply_ends
from vlm.families.derive_parts import reads_images
from vlm.families.meta_model import get_auto_class
from vlm.families.processing import FamilyProcessor
from vlm.models.vocabulary import find_vocabulary_head

SAVED_TOLERANCE = 1e-5
"""The largest difference of logits after loading, over the norm of those before: the same weights in the same code."""


def prove_parts(subject: Subject) -> str:
    """Every parameter belongs to one part, no part is empty, and transformers' own names of the parts agree.

    Returns:
        Which parts the model does without by its own structure, and why.
    """
    model, names = subject.model, subject.names
    members: dict[str, list[str]] = {part: [] for part in PART_NAMES}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        try:
            part = names.part_of(name)
        except ValueError as error:
            raise DisprovedError(str(error)) from error
        if owners.setdefault(id(parameter), part) != part:
            raise DisprovedError(f"{name} belongs to {part} and, under another name, to {owners[id(parameter)]}")
        members[part].append(name)
    lacking = {part: describe_lack(subject, part) for part, own in members.items() if not own}
    if empty := [part for part, reason in lacking.items() if not reason]:
        raise DisprovedError(f"no parameter belongs to the {' and the '.join(empty)}")
    for wrong, module, label in _named_modules(subject):
        if strays := [
            name
            for name, own in model.named_parameters()
            if own is not None and names.part_of(name) == wrong and any(own is inner for inner in module.parameters())
        ]:
            raise DisprovedError(f"{list_names(strays)} of {label} belongs to the {wrong}")
    return "; ".join(lacking.values())


def describe_lack(subject: Subject, part: str) -> str:
    """Return why a model has no such part, by its own names of modules; "" where it has to have one."""
    model = subject.model
    encoder = model.get_encoder(modality="image")
    has_encoder = encoder not in (None, model, model.base_model)
    has_unnamed = any(reads_images(module) for module in model.modules() if module not in (model, model.base_model))
    if part == "visual_encoder" and not has_encoder and not has_unnamed:
        return "get_encoder names no visual encoder: patches go straight into the connector"
    if part == "connector" and (has_encoder or has_unnamed):
        own = (encoder, model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        named = {id(parameter) for module in own if module is not None for parameter in module.parameters()}
        others = [name for name, parameter in model.named_parameters() if id(parameter) not in named]
        if all(map(subject.names.is_unused, others)):
            return "nothing lies between the visual encoder and the language model that the model names"
    return ""


def _named_modules(subject: Subject) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (a part that must not have its parameters, a module, how transformers names it)."""
    model = subject.model
    for getter, layer in (
        ("get_input_embeddings", model.get_input_embeddings()),
        ("get_output_embeddings", find_vocabulary_head(model)),
    ):
        if layer is not None:
            yield "visual_encoder", layer, getter
            yield "connector", layer, getter
    encoder = model.get_encoder(modality="image")
    if encoder not in (None, model, model.base_model) and not any(
        inner is model.get_input_embeddings() for inner in encoder.modules()
    ):
        yield "language_model", encoder, "get_encoder(modality='image')"


@torch.no_grad()
def prove_saving(subject: Subject) -> None:
    """What `final` holds loads in plain transformers, model and processor, with equal logits and ids."""
    conversation = one_turn(draw_image(1))
    model, batch = subject.model, subject.make_batch(conversation)
    expected = subject.alone_logits(conversation)
    with TemporaryDirectory(prefix="vlm-trial-") as folder, quiet_loading():
        set_reply_ends(model, subject.processor)
        save_complete(model, Path(folder))
        subject.processor.save_pretrained(folder)
        auto, remote = get_auto_class(model.config), subject.trust_remote_code
        with torch.random.fork_rng(devices=[]):
            result = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=remote,
                attn_implementation=model.config._attn_implementation,
            )
        loaded, info = cast(tuple[PreTrainedModel, Mapping[str, Iterable[object]]], result)
        native = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
    problems = {"missing_keys": "lacks", "unexpected_keys": "has no place for", "mismatched_keys": "changes"}
    for key, problem in problems.items():
        if wrong := sorted(map(str, info[key])):
            raise DisprovedError(f"the saved model {problem}: {list_names(wrong)}")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = loaded.eval()(**inputs, use_cache=False).logits  # of all positions, as plain transformers does it
    difference = relative_difference(expected, logits[supervised_next(batch["labels"])])
    if not difference <= SAVED_TOLERANCE:
        raise DisprovedError(f"logits of the saved model differ by {difference:.2g} of their norm")
    if type(native) is not type(subject.processor.native):
        raise DisprovedError(f"the saved processor loads as {type(native).__name__}")
    read = FamilyProcessor(native, subject.processor.family)
    before, after = (read_natively(one, conversation)["input_ids"].tolist() for one in (subject.processor, read))
    if before != after:
        raise DisprovedError("the saved processor gives other ids for the same conversation")
