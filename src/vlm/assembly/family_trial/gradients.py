"""The proof about gradients: which parameters the loss of training reaches, each part trained alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from vlm.assembly.family_trial.conversations import SIZES, draw_image, draw_video, one_turn
from vlm.assembly.family_trial.subject import Subject, list_names, supervised_next
from vlm.assembly.family_trial.verdicts import DisprovedError, describe_unused
from vlm.assembly.logit_proofs import choose_tokens
from vlm.families.parts import get_form
from vlm.models.text_loss import SupervisedScores, token_losses

PART_NAMES = ("visual_encoder", "connector", "language_model")
LARGE = (1200, 900)
"""Height and width of an image that models of several resolutions take another way than the small ones."""
NUM_WORDS = 200
"""Tokens of a question that experts, groups and tables of tokens differ in."""
LOSS_TOLERANCE = 1e-4
"""The largest difference of losses, over their norm, that is arithmetic in another order."""
NUDGE = 1e-4
"""How far parameters are moved, over their size, to see whether logits depend on them: no choice among many flips."""
NUM_NUDGES = 3

Batch = dict[str, Tensor]


def prove_gradients(subject: Subject) -> str:
    """With each part trained alone, gradients reach exactly its parameters, but for those that no reply depends on.

    Those are declared, or found: no gradient of any batch reaches them, and moving them moves no logit. Runs freeze
    them. A part most of whose parameters are such fails.

    Returns:
        What was found.
    """
    check_loss(subject)
    model, names = subject.model, subject.names
    every = [name for name, _ in model.named_parameters()]
    idle: list[str] = []
    try:
        for part in PART_NAMES:
            own = [name for name in every if names.part_of(name) == part]
            idle += prove_part(subject, part, own)
    finally:
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
    idle_forms = set(map(get_form, idle))
    return describe_unused(shorten_forms(idle_forms, set(map(get_form, every)) - idle_forms))


def check_loss(subject: Subject) -> None:
    """Check that the loss as training computes it is that of all logits of a plain call.

    Raises:
        DisprovedError: it is another.
    """
    conversation = one_turn(draw_image(1))
    subject.alone_logits(conversation)  # names a shape that the loss is not computed of
    batch = subject.make_batch(conversation)
    keep = supervised_next(batch["labels"])
    with torch.no_grad():
        losses, targets, _ = SupervisedScores(subject.model)(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = subject.model(**inputs, use_cache=False).logits
    if logits.shape[:-1] != keep.shape:
        raise DisprovedError(f"without logits_to_keep, ids {tuple(keep.shape)} have logits {tuple(logits.shape)}")
    expected = token_losses(logits[keep], targets)
    if losses.shape != expected.shape or not float((losses - expected).norm()) <= LOSS_TOLERANCE * expected.norm():
        raise DisprovedError(
            f"the loss of a reply as training computes it is {float(losses.mean()):.4g}, that of all logits "
            f"{float(expected.mean()):.4g}"
        )


def prove_part(subject: Subject, part: str, own: Sequence[str]) -> list[str]:
    """Return the parameters of a part that no reply depends on, besides those that are declared.

    Raises:
        DisprovedError: gradients reach what they must not reach, or not what they have to.
    """
    names, reached, tried = subject.names, set[str](), list[Batch]()
    needed = {name for name in own if not names.is_unused(name)}
    for number, makes_batch in enumerate(_batch_makers(subject)):
        if needed <= reached and number >= len(SIZES):
            break
        tried.append(makes_batch())
        reached |= find_reached(subject, tried[-1], set(own))
    if not needed <= reached and (video := _make_video(subject)) is not None:
        tried.append(video)
        reached |= find_reached(subject, video, set(own))
    missed = [name for name in own if name in needed - reached]
    if last := _last_layer(subject).intersection(missed):  # what is of images there moves no reply in this layer alone
        reached |= last & find_reached(subject, tried[0], last, everywhere=True)
        missed = [name for name in missed if name not in reached]
    if strays := [name for name in reached if name not in own]:
        raise DisprovedError(f"with the {part} trained alone, gradients reach {list_names(strays)}")
    if read := [name for name in own if name in reached and names.is_unused(name)]:
        raise DisprovedError(f"{list_names(read)} gets gradients, but is declared as unused")
    told = f"with the {part} trained alone, no gradient reaches {list_names(missed)}"
    if len(missed) * 2 > len(needed):
        raise DisprovedError(f"{told}: most of its parameters")
    reached_forms = set(map(get_form, reached))
    if partly := [name for name in missed if get_form(name) in reached_forms]:
        raise DisprovedError(
            f"with the {part} trained alone, no gradient reaches {list_names(partly)}, but others of the same name in "
            "other layers; parameters that no reply depends on have to be declared as unused"
        )
    if missed and not are_idle(subject, missed, tried):
        raise DisprovedError(f"{told}, although logits change with them")
    return missed


def _batch_makers(subject: Subject) -> Iterator[Callable[[], Batch]]:
    """Yield what makes batches that take different ways through a model: sizes of images, many words."""
    for seed, size in enumerate((*SIZES, LARGE), start=1):
        yield partial(_make_batch, subject, draw_image(seed, size))
    words = subject.processor.tokenizer.decode(choose_tokens(subject.processor, NUM_WORDS))
    yield partial(_make_batch, subject, draw_image(1), question=words, reply=words)


def _make_video(subject: Subject) -> Batch | None:
    """Return a batch with a video; None if the family takes none, or fails on them, which another proof tells."""
    if subject.processor.videos is None:
        return None
    try:
        video = subject.make_batch(one_turn(draw_video(3, subject.processor)))
        with torch.no_grad():
            subject.reply_logits(video)
    except (TypeError, LookupError, RuntimeError, ValueError):
        return None
    return video


def _make_batch(subject: Subject, *media: object, **texts: str) -> Batch:
    return subject.make_batch(one_turn(*media, **texts))  # pyright: ignore[reportArgumentType] - images


def find_reached(subject: Subject, batch: Batch, trained: set[str], *, everywhere: bool = False) -> set[str]:
    """Return the parameters that gradients of a batch reach while only these train.

    With `everywhere`, gradients are of the logits at all positions, else of those at the reply.
    """
    model = subject.model
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained and parameter.is_floating_point())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.flatten(0, -2) if everywhere else subject.reply_logits(batch)
    if not logits.requires_grad:
        return set()
    logits.float().log_softmax(-1)[:, ::7].square().mean().backward()
    reached = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    model.zero_grad(set_to_none=True)
    return reached


@torch.no_grad()
def are_idle(subject: Subject, names: Iterable[str], batches: Iterable[Batch]) -> bool:
    """Return whether no logit of a reply changes when parameters move a little; a choice that flips is no change.

    What only chooses, such as the tokens that sparse attention reads, has no gradient. A move so small flips no choice
    in some of several tries, where it changes everything that logits are computed from in all of them.
    """
    idle = [subject.model.get_parameter(name) for name in names]
    generator = torch.Generator().manual_seed(0)

    def moved_logits(batch: Batch) -> Tensor:
        """Return the logits after each parameter has moved a little, then move the parameters back."""
        kept = [parameter.clone() for parameter in idle]
        for parameter in filter(torch.is_floating_point, idle):
            parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
        try:
            return subject.reply_logits(batch)
        finally:
            for parameter, value in zip(idle, kept, strict=True):
                parameter.copy_(value)

    for batch in batches:
        still = subject.reply_logits(batch)
        if not any(torch.equal(still, moved_logits(batch)) for _ in range(NUM_NUDGES)):
            return False
    return True


def _last_layer(subject: Subject) -> set[str]:
    """Return the parameters of the language model's last layer, whose states at images nothing reads."""
    depth = subject.model.config.get_text_config().num_hidden_layers
    decoder = cast(nn.Module, subject.model.get_decoder())
    layers = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == depth]
    last = {id(parameter) for layer in layers for parameter in layer[-1].parameters()}
    return {name for name, parameter in subject.model.named_parameters() if id(parameter) in last}


def shorten_forms(idle: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return what the forms of idle parameters begin with and no other form does, as short as modules can be named."""
    others, short = tuple(others), dict[str, None]()
    for form in sorted(idle):
        words = form.split(".")
        beginnings = [".".join(words[:number]) + "." for number in range(1, len(words))]
        fitting = (start for start in beginnings if not any(other.startswith(start) for other in others))
        short.setdefault(next(fitting, form))
    return list(short)
