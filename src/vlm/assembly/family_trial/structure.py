"""Proofs about parts, gradients and saving: what of the model trains, and whether it comes back from the disk."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from vlm.assembly.family_trial.conversations import draw_image, draw_video, one_turn, read_natively
from vlm.assembly.family_trial.subject import Subject, compute_reply_logits, list_names, relative_difference
from vlm.assembly.family_trial.verdicts import DisprovedError
from vlm.assembly.opening import quiet_loading
from vlm.assembly.saving import save_complete, set_reply_ends
from vlm.families.meta_model import get_auto_class
from vlm.families.processing import FamilyProcessor
from vlm.models.vocabulary import find_vocabulary_head

PART_NAMES = ("visual_encoder", "connector", "language_model")
SAVED_TOLERANCE = 1e-5
"""The largest difference of logits after loading, over the norm of those before: the same weights in the same code."""


def prove_parts(subject: Subject) -> None:
    """Every parameter belongs to one part, no part is empty, and transformers' own names of the parts agree."""
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
    if empty := [part for part, own in members.items() if not own]:
        raise DisprovedError(f"no parameter belongs to the {' and the '.join(empty)}")
    for wrong, module, label in _named_modules(subject):
        if strays := [name for name, own in model.named_parameters() if own is not None and names.part_of(name) == wrong
                      and any(own is inner for inner in module.parameters())]:  # fmt: skip
            raise DisprovedError(f"{list_names(strays)} of {label} belongs to the {wrong}")


def _named_modules(subject: Subject) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (a part that must not have its parameters, a module, how transformers names it)."""
    model = subject.model
    for getter, layer in (("get_input_embeddings", model.get_input_embeddings()),
                          ("get_output_embeddings", find_vocabulary_head(model))):  # fmt: skip
        if layer is not None:
            yield "visual_encoder", layer, getter
            yield "connector", layer, getter
    encoder = model.get_encoder(modality="image")
    if encoder not in (None, model, model.base_model) and not any(
        inner is model.get_input_embeddings() for inner in encoder.modules()
    ):
        yield "language_model", encoder, "get_encoder(modality='image')"


def prove_gradients(subject: Subject) -> None:
    """With each part trained alone, gradients reach exactly its parameters, but for those that are declared unused."""
    media = [draw_image(1)]
    batches = [subject.make_batch(one_turn(*media)), subject.make_batch(one_turn(draw_image(2, (96, 96))))]
    model, names = subject.model, subject.names
    parameters = dict(model.named_parameters())
    try:
        for part in PART_NAMES:
            own = [name for name in parameters if names.part_of(name) == part]
            reached = _find_reached(subject, batches, set(own))
            needed = [name for name in own if not names.is_unused(name)]
            if subject.processor.videos is not None and not set(needed) <= set(reached):
                video = subject.make_batch(one_turn(draw_video(3, subject.processor)))
                reached += _find_reached(subject, [video], set(own))
            if strays := [name for name in reached if name not in own]:
                raise DisprovedError(f"with the {part} trained alone, gradients reach {list_names(strays)}")
            if missed := [name for name in needed if name not in reached]:
                raise DisprovedError(
                    f"with the {part} trained alone, no gradient reaches {list_names(missed)}; what no reply depends "
                    "on has to be declared as unused"
                )
            if read := [name for name in own if name in reached and names.is_unused(name)]:
                raise DisprovedError(f"{list_names(read)} gets gradients, but is declared as unused")
    finally:
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)


def _find_reached(subject: Subject, batches: list[dict[str, Tensor]], trained: set[str]) -> list[str]:
    """Return the parameters that gradients of any batch reach while only these train."""
    model = subject.model
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained and parameter.is_floating_point())
    reached: dict[str, None] = {}
    for batch in batches:
        logits = subject.reply_logits(batch)
        if not logits.requires_grad:
            return []
        logits.float().log_softmax(-1)[:, ::7].square().mean().backward()
        reached |= dict.fromkeys(
            name for name, parameter in model.named_parameters()
            if parameter.grad is not None and bool(parameter.grad.any())
        )  # fmt: skip
        model.zero_grad(set_to_none=True)
    return list(reached)


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
                folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=remote,
                attn_implementation=model.config._attn_implementation,
            )  # fmt: skip
        loaded, info = cast(tuple[PreTrainedModel, Mapping[str, Iterable[object]]], result)
        native = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
    problems = {"missing_keys": "lacks", "unexpected_keys": "has no place for", "mismatched_keys": "changes"}
    for key, problem in problems.items():
        if wrong := sorted(map(str, info[key])):
            raise DisprovedError(f"the saved model {problem}: {list_names(wrong)}")
    difference = relative_difference(expected, compute_reply_logits(loaded.eval(), batch))
    if not difference <= SAVED_TOLERANCE:
        raise DisprovedError(f"logits of the saved model differ by {difference:.2g} of their norm")
    if type(native) is not type(subject.processor.native):
        raise DisprovedError(f"the saved processor loads as {type(native).__name__}")
    read = FamilyProcessor(native, subject.processor.family)
    before, after = (read_natively(one, conversation)["input_ids"].tolist() for one in (subject.processor, read))
    if before != after:
        raise DisprovedError("the saved processor gives other ids for the same conversation")
